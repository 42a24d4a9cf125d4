"""The swarm drawn: blocks across, servers down, gaps marked.

Invariant: what is drawn is what the directory's records say, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from corolla.swarm.directory import ServerRecord
from corolla.swarm.routing import ranges, uncovered

WIDEST = 64  # characters that the blocks of a model may take


def swarm_map(records: Sequence[ServerRecord]) -> RenderableType:
    """One table a model, complete or with its gaps named."""
    if not records:
        return Text("No server is announced here.", style="yellow")
    by_model = groupby(sorted(records, key=lambda record: record.model), key=lambda record: record.model)
    return Group(*(_model(list(group)) for _, group in by_model))


def _model(records: list[ServerRecord]) -> RenderableType:
    first = records[0]
    gaps = missing_blocks(records)
    count = f"{len(records)} server{'' if len(records) == 1 else 's'}"
    state = Text("complete", style="green")
    if gaps:
        named = ", ".join(f"{start}:{end}" for start, end in gaps)
        state = Text(f"nobody serves blocks {named}", style="bold red")
    title = Text.assemble((first.model_name, "bold"), f"  {first.num_blocks} blocks, {count}, ", state)
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column("server", no_wrap=True)
    table.add_column(_ruler(first.num_blocks), no_wrap=True)
    table.add_column("blocks", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("free tokens", justify="right", no_wrap=True)
    for record in sorted(records, key=lambda record: (record.start, record.end, record.peer_id)):
        style = "yellow" if record.state == "draining" else "cyan"
        table.add_row(
            f"…{record.peer_id[-8:]}",
            Text(_bar(record.start, record.end, record.num_blocks), style=style),
            f"{record.start}:{record.end}",
            record.dtype,
            f"{record.throughput:.0f}",
            f"{record.free_cache_tokens:,}",
        )
    if gaps:
        marks = "".join(
            "!" if any(start <= block < end for start, end in gaps) else " "
            for block in _shown(first.num_blocks)
        )
        table.add_row(Text("missing", style="bold red"), Text(marks, style="bold red"))
    return Group(title, table, Text(""))


def missing_blocks(records: Sequence[ServerRecord]) -> list[tuple[int, int]]:
    """Ranges [start, end) of one model's blocks that no serving record covers."""
    serving = [record for record in records if record.state == "serving"]
    return ranges(uncovered(serving, 0, records[0].num_blocks))


def _shown(blocks: int) -> Sequence[int]:
    """The block that each character stands for."""
    if blocks <= WIDEST:
        return range(blocks)
    return [column * blocks // WIDEST for column in range(WIDEST)]


def _bar(start: int, end: int, blocks: int) -> str:
    return "".join("█" if start <= block < end else "·" for block in _shown(blocks))


def _ruler(blocks: int) -> str:
    width = len(_shown(blocks))
    last = str(blocks - 1)
    return "0" + last.rjust(width - 1) if width > len(last) else last
