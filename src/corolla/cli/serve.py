"""`corolla serve`: hold some blocks of a model and run them for the swarm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli.common import (
    AnnounceOption,
    DieWithParentOption,
    IdentityOption,
    ListenOption,
    PeersOption,
    ReadyFileOption,
    ended_by_signals,
    quiet_libraries,
    run_until_stopped,
)
from corolla.cli.members import (
    AllowOption,
    GuardedOption,
    InviteOption,
    TrustIssuerOption,
    guard_config,
    redeem_invitation,
)
from corolla.cli.terminal import say
from corolla.errors import UsageError


def serve(
    model: Annotated[str, typer.Argument(help="Hub name, folder, .gguf file, or smollm2.")],
    blocks: Annotated[
        str | None, typer.Option(help="First block and the one after the last, as 0:15.")
    ] = None,
    peers: PeersOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    identity: IdentityOption = None,
    guarded: GuardedOption = False,
    allow: AllowOption = None,
    trust_issuer: TrustIssuerOption = None,
    invite: InviteOption = None,
    ready_file: ReadyFileOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads to use at most (default: all cores).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")] = "auto",
    quantization: Annotated[
        str, typer.Option(help="How weights are kept: none, int8, or nf4 (CUDA only).")
    ] = "none",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token, for gated models.", envvar="HF_TOKEN")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for downloaded and converted files.")] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of attention cache (default: what half of the free memory holds)."),
    ] = None,
    lease_bytes: Annotated[
        int | None,
        typer.Option(
            help="Memory for graphs that training clients will come back for (default: an eighth of what is free)."
        ),
    ] = None,
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a bundle whose prompt is computed once for everybody who chats with it; repeatable."
        ),
    ] = None,
    peer_share: Annotated[
        float, typer.Option(help="What one peer can take of everything here when others want it too.")
    ] = 0.5,
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Serve blocks of a model. Without --peers, this server begins a swarm that others can join."""
    from corolla.config import NodeConfig, ServerConfig, parse_blocks

    node = NodeConfig(
        initial_peers=tuple(peers or ()),
        listen=tuple(listen or ()),
        announce=tuple(announce or ()),
        identity=identity,
        ready_file=ready_file,
        guard=guard_config(guarded, allow, trust_issuer),
    )
    if invite is not None:
        if identity is None:
            raise UsageError("--invite needs --identity FILE: the certificate is for that peer id.")
        redeem_invitation(invite, identity)
    config = ServerConfig(
        model=model,
        node=node,
        blocks=None if blocks is None else parse_blocks(blocks),
        device=device,
        threads=threads,
        dtype=dtype,
        quantization=quantization,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        cache_tokens=cache_tokens,
        lease_bytes=lease_bytes,
        bundles=tuple(bundle or ()),
        peer_share=peer_share,
    )
    with ended_by_signals(die_with_parent=die_with_parent):
        from corolla.server.serve import serve as run
        from corolla.server.serve import still_loading

        quiet_libraries()
    run_until_stopped(lambda stop: run(config, stop, say), die_with_parent=die_with_parent)
    if still_loading():
        os._exit(0)
