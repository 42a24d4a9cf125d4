"""The swarm drawn: blocks across, servers down, gaps marked.

Invariant: what is drawn is what the directory's records say, nothing is guessed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from corolla.client.audit_report import Reported
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
    title = Text.assemble(
        (_plain(first.model_name), "bold"), f"  {first.num_blocks} blocks, {count}, ", state
    )
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column("server", no_wrap=True)
    table.add_column(_ruler(first.num_blocks), no_wrap=True)
    table.add_column("blocks", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("room", justify="right", no_wrap=True)  # tokens of attention cache
    for record in sorted(records, key=lambda record: (record.start, record.end, record.peer_id)):
        style = "yellow" if record.state == "draining" else "cyan"
        bar = _marked([(record.start, record.end)], first.num_blocks, "█", "·")
        table.add_row(
            Text(f"…{_plain(record.peer_id[-8:])}"),
            Text(bar, style=style),
            f"{record.start}:{record.end}",
            Text(_plain(record.dtype)),
            f"{record.throughput:.0f}",
            f"{record.free_cache_tokens:,}",
        )
    if gaps:
        marks = _marked(gaps, first.num_blocks, "!", " ")
        table.add_row(Text("missing", style="bold red"), Text(marks, style="bold red"))
    return Group(title, table, Text(""))


def missing_blocks(records: Sequence[ServerRecord]) -> list[tuple[int, int]]:
    """Ranges [start, end) of one model's blocks that no serving record covers."""
    serving = [record for record in records if record.state == "serving"]
    return ranges(uncovered(serving, 0, records[0].num_blocks))


def _columns(blocks: int) -> list[range]:
    """The blocks that each character stands for."""
    width = min(blocks, WIDEST)
    return [range(at * blocks // width, (at + 1) * blocks // width) for at in range(width)]


def _marked(spans: Sequence[tuple[int, int]], blocks: int, inside: str, outside: str) -> str:
    """A character for each column: `inside` where at least one of its blocks is in one of the spans."""
    return "".join(
        inside if any(start < column.stop and column.start < end for start, end in spans) else outside
        for column in _columns(blocks)
    )


def _plain(text: str) -> str:
    """What a stranger wrote about himself, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _ruler(blocks: int) -> str:
    width = len(_columns(blocks))
    last = str(blocks - 1)
    return "0" + last.rjust(width - 1) if width > len(last) else last


def audit_table(audits: Sequence[Reported]) -> RenderableType:
    """What this user's audits have found, the newest last."""
    table = Table(title="Found by your audits", title_justify="left", box=None, header_style="dim")
    for name in ("peer", "what", "model", "blocks", "off by", "times", "last"):
        table.add_column(name, overflow="fold")
    for one in audits:
        verdict = f"wrong {', '.join(one.what)}" if one.lied else f"disagrees with {one.other}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.last))
        off = f"{one.worst:.3g} tolerances"
        cells = (one.peer_id, verdict, one.model, f"{one.start}:{one.end}", off, str(one.count), when)
        table.add_row(*(Text(_plain(cell)) for cell in cells), style="bold red" if one.lied else "yellow")
    return table
