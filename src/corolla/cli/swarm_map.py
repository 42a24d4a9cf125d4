"""The swarm drawn: blocks across, servers down, gaps marked.

Invariant: what is drawn is what the directory's records say, nothing is guessed. Where they do not agree on a model's
size or name, most of them decide, and however many there are, a person can read the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from statistics import mode

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.summary import by_model, missing_blocks
from corolla.text import one_line

WIDEST, NARROWEST = 64, 8  # characters that the blocks of a model may take
HEADINGS = ("server", "blocks", "arithmetic", "tokens/s", "room")  # room: tokens of attention cache
NUMBERS = ("tokens/s", "room")
GAP = 2
MOST_MODELS, MOST_SERVERS = 20, 100  # that are drawn; servers of each model


def swarm_map(records: Sequence[ServerRecord]) -> RenderableType:
    """One table a model, complete or with its gaps named."""
    if not records:
        return Text("No server is announced here.", style="yellow")
    models = by_model(records)
    parts: list[RenderableType] = [_Model(group) for group in islice(models.values(), MOST_MODELS)]
    return Group(*parts, *_rest(len(models) - MOST_MODELS, "model"))


def _rest(count: int, what: str) -> list[Text]:
    """A line for what is not drawn, if anything."""
    return [Text(f"and {count:,} more {what}{'' if count == 1 else 's'}", style="dim")] if count > 0 else []


class _Model:
    """One model's servers, drawn as wide as there is room."""

    def __init__(self, records: list[ServerRecord]) -> None:
        self._records = sorted(records, key=lambda record: (record.start, record.end, record.peer_id))
        self._blocks = records[0].num_blocks
        self._gaps = missing_blocks(records)

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [_cells(record) for record in self._records[:MOST_SERVERS]]
        taken = sum(max(len(cell) for cell in column) + GAP for column in zip(HEADINGS, *rows, strict=True))
        width = max(NARROWEST, min(self._blocks, WIDEST, options.max_width - taken))
        yield self._title()
        yield self._table(rows, min(width, self._blocks))
        yield from _rest(len(self._records) - MOST_SERVERS, "server")
        yield Text("")

    def _title(self) -> Text:
        count = f"{len(self._records)} server{'' if len(self._records) == 1 else 's'}"
        state = Text("complete", style="green")
        if self._gaps:
            named = ", ".join(f"{start}:{end}" for start, end in self._gaps)
            state = Text(f"nobody serves blocks {named}", style="bold red")
        name = one_line(mode(record.model_name for record in self._records), characters=60)
        return Text.assemble((name, "bold"), f"  {self._blocks} blocks, {count}, ", state)

    def _table(self, rows: list[tuple[str, ...]], width: int) -> Table:
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
        first, *others = HEADINGS
        table.add_column(first, no_wrap=True)
        table.add_column(_ruler(self._blocks, width), no_wrap=True)
        for heading in others:
            table.add_column(heading, justify="right" if heading in NUMBERS else "left", no_wrap=True)
        for record, (peer, *cells) in zip(self._records, rows, strict=False):
            style = "yellow" if record.state == "draining" else "cyan"
            bar = _marked([(record.start, record.end)], self._blocks, width, "█", "·")
            table.add_row(Text(peer), Text(bar, style=style), *map(Text, cells))
        if self._gaps:
            marks = _marked(self._gaps, self._blocks, width, "!", " ")
            table.add_row(Text("missing", style="bold red"), Text(marks, style="bold red"))
        return table


def _cells(record: ServerRecord) -> tuple[str, ...]:
    """A server in words, as in `HEADINGS`; the arithmetic is its dtype and how its weights are kept."""
    return (
        f"…{one_line(record.peer_id[-8:])}",
        f"{record.start}:{record.end}",
        one_line(record.numerics, characters=24),
        f"{record.throughput:,.0f}",
        f"{record.free_cache_tokens:,}",
    )


def _columns(blocks: int, width: int) -> list[range]:
    """The blocks that each of `width` characters stands for."""
    return [range(at * blocks // width, (at + 1) * blocks // width) for at in range(width)]


def _marked(spans: Sequence[tuple[int, int]], blocks: int, width: int, inside: str, outside: str) -> str:
    """A character for each column: `inside` where at least one of its blocks is in one of the spans."""
    return "".join(
        inside if any(start < column.stop and column.start < end for start, end in spans) else outside
        for column in _columns(blocks, width)
    )


def _ruler(blocks: int, width: int) -> str:
    last = str(blocks - 1)
    return "0" + last.rjust(width - 1) if width > len(last) else last
