"""Bundles on the Hugging Face hub: what is sent there, and how they come back.

Invariant: nothing that says where a swarm or this machine's files are is sent; what is fetched is of one commit, and
only the files that a bundle has.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP client's
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)

from corolla.errors import BundleError, UsageError
from corolla.files import scratch_folder, write_json
from corolla.json_files import load_object
from corolla.models.checkpoints.hub import hub_answers
from corolla.models.checkpoints.prompt_files import DEEP_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS, PROMPT_FILE
from corolla.text import one_line
from corolla.tuning.card import model_card
from corolla.tuning.described import BUNDLE_FILE, CARD_FILE, CURVE_FILE, METRICS_FILE, Described
from corolla.tuning.report import REPORT_FILE, read_history, report_page

AS_THEY_ARE = (PEFT_WEIGHTS, DEEP_WEIGHTS, METRICS_FILE)
NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def check_push(name: str, token: str | None) -> None:
    """Raises `UsageError` for what cannot be the name of a repository, and where nobody is logged in."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r:.100} is no name on the hub; give one such as me/my-bot.")
    if token is None and get_token() is None:
        raise UsageError("To share on the hub, log in with `hf auth login`, or give a token (HF_TOKEN).")


def push_bundle(
    bundle: Described,
    folder: Path,
    name: str,
    *,
    token: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Send the bundle in `folder` to the repository `name`, made if it is not there; gives its address.

    Raises `UsageError`, and `BundleError` when the hub does not take it.
    """
    check_push(name, token)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        with scratch_folder() as copy:
            _write_copy(bundle, folder, Path(copy), name)
            address = api.create_repo(name, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=copy, commit_message="A prompt trained with Corolla")
    except (HfHubHTTPError, HTTPError, HFValidationError, OSError, ValueError) as error:
        reason = one_line(str(error).strip().split("\n", 1)[0]).rstrip(".")
        raise BundleError(
            f"The bundle could not be sent to {name} ({reason}); it is still in {folder}, send it again with "
            f"corolla.load_bundle({str(folder)!r}).push_to_hub({name!r})."
        ) from error
    return str(address)


def _write_copy(bundle: Described, folder: Path, copy: Path, name: str) -> None:
    shared = _for_others(bundle)
    model = shared.model.name
    # A picture has the model's name in it.
    for file in (*AS_THEY_ARE, *([CURVE_FILE] if model == bundle.model.name else [])):
        if (folder / file).is_file():
            shutil.copyfile(folder / file, copy / file)
    write_json(copy / BUNDLE_FILE, shared.to_dict())
    for file, key in ((PROMPT_FILE, "model"), (PEFT_CONFIG, "base_model_name_or_path")):
        if (folder / file).is_file():
            write_json(copy / file, load_object(folder / file) | {key: model})
    page = report_page(shared, read_history(folder), name)
    (copy / REPORT_FILE).write_text(page, encoding="utf-8")
    (copy / CARD_FILE).write_text(model_card(shared, model, name), encoding="utf-8")


def _for_others(bundle: Described) -> Described:
    """Without the swarm's addresses, and with the last part only of names that are paths of this machine."""
    training = {key: _last_part(one) for key, one in bundle.training.items() if key != "swarm"}
    model = replace(bundle.model, name=_last_part(bundle.model.name))
    return replace(bundle, model=model, training=training)


def _last_part(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path = Path(value)
    try:
        local = path.exists() or path.is_absolute() or value.startswith(("~", "./", "../"))
    except (OSError, ValueError):  # a text, too long for a name
        local = False
    return path.name or value if local else value


def fetch_bundle(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> Path | None:
    """The folder, in the hub's cache, of the bundle `name`; None where that is no bundle, or no hub answers.

    Raises `BundleError` for a bundle whose files are not all there.
    """
    if not NAME.fullmatch(name):
        return None
    offline = not hub_answers(endpoint)  # then what is in the cache is taken, and nothing is waited for
    place: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "endpoint": endpoint,
        "local_files_only": offline,
    }
    try:
        first = Path(hf_hub_download(name, BUNDLE_FILE, revision=revision, **place))
    except (HfHubHTTPError, HTTPError, HFValidationError, OSError):  # no such file or repository, no network
        return None
    folder = first.parent
    try:
        deep = load_object(first).get("mode") == "deep_ptune"
    except (OSError, ValueError) as error:
        raise BundleError(f"The {BUNDLE_FILE} of {name} cannot be read.") from error
    needed = (PROMPT_FILE, DEEP_WEIGHTS) if deep else (PROMPT_FILE, PEFT_WEIGHTS, PEFT_CONFIG)
    for file in (*needed, METRICS_FILE):
        try:
            hf_hub_download(name, file, revision=folder.name, **place)
        except (EntryNotFoundError, LocalEntryNotFoundError) as error:
            if file in needed:
                raise BundleError(f"{name} lacks {file}, so it is no whole bundle.") from error
        except (HfHubHTTPError, HTTPError, OSError) as error:
            raise BundleError(f"{file} of {name} could not be fetched ({one_line(error)}).") from error
    return folder
