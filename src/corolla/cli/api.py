"""`corolla api`: an OpenAI-compatible server in front of a swarm.

Invariant: what is wrong with the arguments is said before a server is started or asked; without a key nobody but this
machine is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corolla.cli.common import (
    DieWithParentOption,
    ended_by_signals,
    run_until_stopped,
    set_up_libraries,
)
from corolla.cli.fields import Fields, with_fields
from corolla.cli.members import ClientOptions
from corolla.cli.terminal import say
from corolla.config import SwarmConfig
from corolla.errors import BundleError, UsageError

if TYPE_CHECKING:
    from corolla.api.access import Keys
    from corolla.api.app import Api

LOOPBACK = ("127.0.0.1", "localhost", "::1")
USUAL_MODEL = "smollm2"


@dataclass(frozen=True)
class ApiOptions:
    """How an API serves. Raises `UsageError`."""

    host: Annotated[str, "Address to serve at; another than this machine's own needs a key."] = "127.0.0.1"
    port: Annotated[int, "Port to serve at; 0: any that is free."] = 8000
    bundles: Annotated[Path | None, "Folder whose bundles can be asked for by name."] = None
    max_length: Annotated[
        int | None, "Tokens of a request and its reply (default: what the model can read)."
    ] = None
    at_once: Annotated[int, "Replies that are computed at a time."] = 128
    waiting: Annotated[int, "Replies that may wait for that; more are refused."] = 512
    sessions: Annotated[int, "Conversations that are kept on the servers to be gone on with."] = 256
    session_bytes: Annotated[int, "Memory that they may take here."] = 2**30
    cors: Annotated[list[str] | None, "Web page that may ask from a browser, as https://…; repeatable."] = (
        None
    )
    conversations: Annotated[Path | None, "File of the page's conversations (default: among your data)."] = (
        None
    )
    ready_file: Annotated[Path | None, "JSON file that is there while the process is ready."] = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port is {self.port}; give 0 to 65535.")
        for name in ("at_once", "waiting", "sessions", "session_bytes"):
            if getattr(self, name) < (name == "at_once"):
                raise UsageError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; give a larger number."
                )
        if self.bundles is not None and not self.bundles.is_dir():
            raise UsageError(f"--bundles is {self.bundles}, which is not a folder.")


@with_fields
def api(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model as for corolla serve (default: the one that the swarm serves, else smollm2)."
        ),
    ] = None,
    options: Annotated[dict[str, Any], Fields(ApiOptions)],
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", envvar="COROLLA_API_KEY", help="Key that clients must give; may be repeated."
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option("--api-keys", help="TOML file of users with keys and budgets, see docs/api.md."),
    ] = None,
    member: Annotated[dict[str, Any], Fields(ClientOptions)],
    client: Annotated[dict[str, Any], Fields(SwarmConfig)],
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Serve OpenAI's API and a page over the swarm. Without --peers, two servers run on this machine meanwhile."""
    chosen, joining = ApiOptions(**options), ClientOptions(**member)
    swarm = joining.swarm(client)
    with ended_by_signals(die_with_parent=die_with_parent):
        _check_installed()
        set_up_libraries()
        from corolla.api.access import Keys
        from corolla.api.serving import listening
    keys = Keys.read(api_key or [], api_keys)
    if not keys and chosen.host not in LOOPBACK:
        raise UsageError(
            f"--host {chosen.host} lets other machines in: set --api-key or --api-keys, or serve at 127.0.0.1."
        )
    swarm = joining.identified(swarm)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(listening(chosen.host, chosen.port)))
        name = _model_name(model, chosen.bundles, swarm)
        served = stack.enter_context(_served(name, swarm, chosen, keys, joining))
        _serve(served, listener, chosen, die_with_parent=die_with_parent)


def _check_installed() -> None:
    """Raises `UsageError` where the extra is not there."""
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError("corolla api needs more packages: pip install 'corolla[web]'.") from error


def _model_name(given: str | None, bundles: Path | None, swarm: SwarmConfig) -> str:
    """The model to serve: the one given, else that of the bundles, else the one that the swarm serves."""
    from corolla.cli.saved_swarm import is_local
    from corolla.cli.status import fetch
    from corolla.swarm.directory.summary import by_model
    from corolla.text import one_line

    if given is not None:
        return given
    named = [] if bundles is None else _models_of(bundles)
    if not named and not is_local(swarm.peers):
        groups = by_model(asyncio.run(fetch(list(swarm.peers), swarm.identity)))
        named = sorted({mode(record.model_name for record in group) for group in groups.values()})
    if len(named) > 1:
        words = ", ".join(one_line(name, characters=60) for name in named[:8])
        raise UsageError(f"There are {words}: say which one to serve, corolla api MODEL.")
    return named[0] if named else USUAL_MODEL


def _models_of(folder: Path) -> list[str]:
    """The models that the bundles in a folder are for."""
    from corolla.tuning.bundle import BUNDLE_FILE, load_bundle

    found = set()
    for path in sorted(folder.iterdir()):
        if (path / BUNDLE_FILE).is_file():
            with contextlib.suppress(BundleError):
                found.add(load_bundle(path).model.name)
    return sorted(found)


@contextlib.contextmanager
def _served(
    name: str, swarm: SwarmConfig, options: ApiOptions, keys: Keys, joining: ClientOptions
) -> Iterator[Api]:
    """What is to be served, over the swarm at `swarm.peers` or one of this machine's own."""
    from corolla.api.app import Api
    from corolla.api.conversations import Conversations
    from corolla.api.generation import Generator
    from corolla.api.partners import Partners
    from corolla.api.sessions import SessionPool
    from corolla.api.starting import Starter
    from corolla.cli.local_swarm import joined
    from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM
    from corolla.client.model.loading import load_tokenizer
    from corolla.models.checkpoints.checkpoint import open_checkpoint
    from corolla.places import data_root

    source = joining.source()
    checkpoint = open_checkpoint(name, **source)
    swarm.check_local(checkpoint.num_blocks)
    tokenizer = load_tokenizer(name, **source)
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(joined(swarm.peers, name, joining.revision, joining.cache_dir))
        arguments = replace(swarm, peers=tuple(peers)).arguments()
        model = stack.enter_context(
            AutoDistributedModelForCausalLM.from_pretrained(name, dtype=joining.dtype, **source, **arguments)
        )
        pool = SessionPool(most=options.sessions, most_bytes=options.session_bytes)
        partners = Partners(
            Path(name).name if Path(name).exists() else name,
            model,
            tokenizer,
            identity=checkpoint.identity,
            folder=options.bundles,
            max_context=options.max_length,
            gone=pool.forget,
        )
        generator = Generator(pool, at_once=options.at_once, waiting=options.waiting)
        kept = Conversations(options.conversations or data_root() / "api" / "conversations.sqlite3")
        starter = Starter(
            options.bundles,
            _tune_command(name, swarm, joining),
            partners.base,
            environment=_environment(joining),
        )
        yield Api(
            partners, generator, keys, conversations=kept, starter=starter, origins=tuple(options.cors or ())
        )


def _tune_command(name: str, swarm: SwarmConfig, joining: ClientOptions) -> list[str]:
    """`corolla tune` over the same swarm; where that is one of this process's own, a run has its own too."""
    said = {"--revision": joining.revision, "--dtype": joining.dtype, "--trust": joining.trust}
    said |= {"--identity": swarm.identity, "--cache-dir": joining.cache_dir}
    peers = [word for peer in swarm.peers for word in ("--peers", peer)]
    options = [word for flag, value in said.items() if value is not None for word in (flag, str(value))]
    more = Fields(SwarmConfig).words(vars(swarm))
    return [sys.executable, "-m", "corolla", "tune", name, *peers, *options, *more]


def _environment(joining: ClientOptions) -> dict[str, str]:
    """Of a run: without the keys of this API, and with what opens the hub, which no list of processes shows there."""
    kept = {name: value for name, value in os.environ.items() if name != "COROLLA_API_KEY"}
    return kept | ({} if joining.token is None else {"HF_TOKEN": joining.token})


def _serve(served: Api, listener: Any, options: ApiOptions, *, die_with_parent: bool) -> None:
    from corolla.api.app import create_app
    from corolla.api.serving import serve, url_of
    from corolla.files import ready_file

    url, name = url_of(listener), served.partners.base.name
    about = {"pid": os.getpid(), "url": url, "model": name}

    async def work(stop: asyncio.Event) -> None:
        with contextlib.ExitStack() as stack:

            def ready() -> None:
                stack.enter_context(ready_file(options.ready_file, about))
                say(f"Serving {name} at {url}/v1, and a page at {url} (Ctrl-C ends it).")

            def stopping() -> None:
                served.drain()
                stack.close()

            await serve(create_app(served), listener, stop, ready=ready, stopping=stopping)

    run_until_stopped(work, die_with_parent=die_with_parent)
