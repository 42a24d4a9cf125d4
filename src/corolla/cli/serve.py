"""`corolla serve`: hold some blocks of a model and run them for the swarm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corolla.cli.common import (
    CacheDirOption,
    DieWithParentOption,
    PeersOption,
    RevisionOption,
    ended_by_signals,
    run_until_stopped,
    set_up_libraries,
)
from corolla.cli.fields import Fields, with_fields
from corolla.cli.members import InviteOption, NodeOptions, redeem_invitation
from corolla.cli.terminal import say
from corolla.config import ServerConfig, parse_blocks
from corolla.errors import UsageError
from corolla.files import exit_at_once

if TYPE_CHECKING:
    from corolla.server.block_server import BlockServer


@with_fields
def serve(
    *,
    model: Annotated[
        str, typer.Argument(help="Hub name, folder, .gguf file (here or on the hub), or smollm2.")
    ],
    blocks: Annotated[
        str | None, typer.Option(help="First block and the one after the last, as 0:15.")
    ] = None,
    peers: PeersOption = None,
    options: Annotated[dict[str, Any], Fields(NodeOptions)],
    invite: InviteOption = None,
    server: Annotated[dict[str, Any], Fields(ServerConfig)],
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a bundle whose prompt is computed once for everybody who chats with it; repeatable."
        ),
    ] = None,
    metrics: Annotated[
        int | None,
        typer.Option(
            help="Port of this machine at which Prometheus reads the server's figures; 0: any free one."
        ),
    ] = None,
    revision: RevisionOption = None,
    token: Annotated[str | None, typer.Option(help="Hub token, for gated models.", envvar="HF_TOKEN")] = None,
    cache_dir: CacheDirOption = None,
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Serve blocks of a model. Without --peers, this server begins a swarm that others can join."""
    watch = contextlib.nullcontext if metrics is None else partial(_watched, port=metrics)
    node = NodeOptions(**options).config(peers)
    if invite is not None:
        if node.identity is None:
            raise UsageError("--invite needs --identity FILE: the certificate is for that peer id.")
        redeem_invitation(invite, node.identity)
    config = ServerConfig(
        **server,
        model=model,
        node=node,
        blocks=None if blocks is None else parse_blocks(blocks),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        bundles=tuple(bundle or ()),
    )
    if metrics is not None and find_spec("prometheus_client") is None:
        raise UsageError("--metrics needs one more package: pip install 'corolla[web]'.")
    with ended_by_signals(die_with_parent=die_with_parent):
        from corolla.server.serve import serve as run
        from corolla.server.serve import still_loading

        set_up_libraries()
    run_until_stopped(lambda stop: run(config, stop, say, watch), die_with_parent=die_with_parent)
    if still_loading():
        exit_at_once(0)


@contextlib.contextmanager
def _watched(server: BlockServer, port: int) -> Iterator[None]:
    from corolla.cli.server_metrics import shown

    with shown(server, port) as found:
        say(f"Figures for Prometheus: http://127.0.0.1:{found}/metrics")
        yield
