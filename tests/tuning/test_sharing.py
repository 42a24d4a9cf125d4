"""A bundle goes to the hub and comes back the same, without what is nobody's business."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tests.hub_stand_in import REPOSITORY, serving
from tests.tuning.tiny_setup import ABOUT, conversations, local_model, settings

from corolla.cli.partner import find_partner
from corolla.errors import BundleError, UsageError
from corolla.models.checkpoints.prompt_files import load_prompt
from corolla.tuning.batches import prepare
from corolla.tuning.bundle import ModelInfo, load_bundle
from corolla.tuning.sharing import check_push, fetch_bundle, push_bundle
from corolla.tuning.tune import tune

SWARM = {"swarm": {"peers": ["/ip4/203.0.113.9/tcp/1/p2p/x"]}, "data": "/home/ann/talks.jsonl"}
HERE = ModelInfo("/home/ann/models/tiny", ABOUT.identity)


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "out"
    chosen = settings(steps=2)
    tune(
        local_model(tiny_folder), chosen, prepare(tokenizer, chosen, conversations()), out, HERE, notes=SWARM
    )
    return out


def test_a_bundle_goes_to_the_hub_and_comes_back(made: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub") as hub:
        address = push_bundle(load_bundle(made), made, REPOSITORY, token="hf_secret", endpoint=hub.endpoint)
        assert address == f"{hub.endpoint}/{REPOSITORY}"
        assert all(token == "Bearer hf_secret" for _, token in hub.posted)
        sent = {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}
        assert {"bundle.json", "README.md", "report.html", "adapter_model.safetensors"} <= sent.keys()
        for secret in (b"203.0.113.9", b"hf_secret", b"/home/ann", str(made.parent).encode()):
            assert not [name for name, content in sent.items() if secret in content], secret
        for page in ("README.md", "report.html"):
            assert b"corolla chat someone/tiny" in sent[page]
            assert b"--data talks.jsonl" in sent[page]
        assert b'prompts=corolla.load_bundle("someone/tiny").folder' in sent["README.md"]
        assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "tiny"
        assert "loss.png" not in sent, "there is a folder of this machine in its title"
        folder = fetch_bundle(REPOSITORY, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
        assert folder is not None
    bundle = load_bundle(folder)
    assert bundle.metrics == load_bundle(made).metrics
    prompts = [load_prompt(one, model_name="tiny", identity=ABOUT.identity) for one in (made, folder)]
    vectors = [one.state_dict()["input"] for one in prompts]
    assert torch.equal(*vectors)


def test_a_chat_finds_a_bundle_on_the_hub_with_the_token_that_it_was_given(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_folder = tmp_path / "hub"
    shutil.copytree(made, hub_folder)
    with serving(hub_folder) as hub:
        hub.private = "hf_secret"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.chdir(tmp_path)
        assert find_partner(REPOSITORY, cache_dir=tmp_path / "none").prompts is None
        partner = find_partner(REPOSITORY, token="hf_secret", cache_dir=tmp_path / "cache")
    assert partner.prompts is not None
    assert partner.prompts.is_relative_to(tmp_path / "cache")


def test_what_is_no_bundle_there_is_none_and_half_a_one_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub") as hub:
        place: dict[str, Any] = {"cache_dir": tmp_path / "cache", "endpoint": hub.endpoint}
        assert fetch_bundle(REPOSITORY, **place) is None
        assert fetch_bundle("a folder/of/mine", **place) is None
        (tmp_path / "hub" / "bundle.json").write_bytes((made / "bundle.json").read_bytes())
        with pytest.raises(BundleError, match=r"someone/tiny lacks prompt\.json"):
            fetch_bundle(REPOSITORY, **place)


def test_a_hub_that_does_not_take_it_costs_nothing_but_the_sharing(made: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as hub:
        hub.refuses = 1 << 30
        with pytest.raises(BundleError, match=r"could not be sent to someone/tiny .*push_to_hub") as caught:
            push_bundle(load_bundle(made), made, REPOSITORY, token="hf_secret", endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_names_and_tokens_are_looked_at_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is no name on the hub"):
        check_push("my bot", "token")
    monkeypatch.setattr("corolla.tuning.sharing.get_token", lambda: None)
    with pytest.raises(UsageError, match="hf auth login"):
        check_push("me/my-bot", None)
