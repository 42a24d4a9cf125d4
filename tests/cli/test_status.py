"""The map: what is drawn of a directory's records, and what is said about gaps."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from corolla.cli.swarm_map import WIDEST, swarm_map
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.summary import as_plain, missing_blocks


def record(start: int, end: int, **changes: Any) -> ServerRecord:
    values: dict[str, Any] = {
        "peer_id": f"peer-{start}-{end}",
        "model": "identity",
        "model_name": "a-model",
        "num_blocks": 10,
        "start": start,
        "end": end,
        "dtype": "float32",
        "throughput": 123.4,
        "free_cache_tokens": 5000,
    }
    return ServerRecord(**(values | changes))


def drawn(*records: ServerRecord) -> str:
    console = Console(width=160, force_terminal=False)
    with console.capture() as capture:
        console.print(swarm_map(records))
    return capture.get()


def row(text: str, contains: str) -> str:
    return next(line for line in text.splitlines() if contains in line)


def test_a_complete_model() -> None:
    text = drawn(record(5, 10), record(0, 5))
    assert "a-model  10 blocks, 2 servers, complete" in text
    assert "█████·····" in row(text, "0:5")
    assert "·····█████" in row(text, "5:10")
    assert text.index("0:5") < text.index("5:10")
    assert "5,000" in text
    assert "missing" not in text


def test_gaps_are_named_and_marked() -> None:
    text = drawn(record(0, 3), record(4, 8))
    assert "2 servers, nobody serves blocks 3:4, 8:10" in text
    bar, marks = row(text, "0:3"), row(text, "missing")
    at = bar.index("█")
    assert marks[at : at + 10].ljust(10) == "   !    !!"


def test_a_server_that_leaves_fills_no_gap() -> None:
    records = [record(0, 10, peer_id="leaving", state="draining"), record(0, 4)]
    assert missing_blocks(records) == [(4, 10)]
    assert "nobody serves blocks 4:10" in drawn(*records)


def test_overlapping_servers_and_one_alone() -> None:
    assert missing_blocks([record(0, 6), record(3, 10), record(2, 4)]) == []
    assert "1 server, complete" in drawn(record(0, 10))


def test_two_models_that_share_a_name_are_apart() -> None:
    text = drawn(record(0, 10), record(0, 5, model="another", peer_id="other"))
    assert "1 server, complete" in text
    assert "1 server, nobody serves blocks 5:10" in text


@pytest.mark.parametrize("blocks", [1, 9, WIDEST, WIDEST + 1, 1000])
def test_every_size_of_model_fits(blocks: int) -> None:
    half = blocks // 2
    records = [record(0, blocks, num_blocks=blocks)]
    if half:
        records.append(record(half, blocks, num_blocks=blocks))
    bars = [line for line in drawn(*records).splitlines() if "█" in line]
    width = min(blocks, WIDEST)
    assert [bar.count("█") + bar.count("·") for bar in bars] == [width] * len(records)
    assert bars[0].count("█") == width
    if half:
        assert bars[1].count("█") in (width - width // 2, width // 2)


def test_a_gap_of_one_block_of_many_is_seen() -> None:
    """In a map of fewer columns than blocks, too, the text names it, and the mark is there."""
    blocks = 3 * WIDEST
    text = drawn(record(0, 40, num_blocks=blocks), record(41, blocks, num_blocks=blocks))
    assert "nobody serves blocks 40:41" in text
    assert "!" in row(text, "missing")


def test_nobody() -> None:
    assert "No server" in drawn()
    assert as_plain([]) == {"servers": [], "models": []}


def test_as_json() -> None:
    plain = as_plain([record(0, 3), record(4, 10)])
    assert plain["models"] == [{"model": "identity", "name": "a-model", "blocks": 10, "missing": [(3, 4)]}]
    assert plain["servers"][0]["peer_id"] == "peer-0-3"
    assert plain["servers"][0]["state"] == "serving"


def test_a_name_with_markup_is_text() -> None:
    assert "[red]evil[/red]" in drawn(record(0, 10, model_name="[red]evil[/red]"))
    assert "\x1b" not in drawn(record(0, 10, model_name="a\x1b[31mb", dtype="\x1b[2J"))


@pytest.mark.parametrize("width", [72, 80, 120])
def test_seventy_blocks_on_a_narrow_terminal(width: int) -> None:
    """No line is longer than the terminal, none is folded, and nothing of a server is left out."""
    odd = {"num_blocks": 70, "dtype": "bfloat16", "quantization": "int8", "throughput": 1234.5}
    records = [record(at, at + 5, peer_id=f"peer{at:08d}", **odd) for at in range(0, 65, 5)]
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(swarm_map([one for one in records if one.start != 30]))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 1 + 1 + 12 + 1 + 1, "title, headings, servers, gaps, nothing"
    assert "nobody serves blocks 30:35, 65:70" in lines[0]
    assert len({line.index("█") for line in lines if "█" in line}) > 5
    for line in lines[2:14]:
        assert line.count("█") >= 1
        assert "bfloat16+int8" in line
        assert "1,234" in line
        assert "5,000" in line


def test_a_long_name_is_shortened() -> None:
    assert "x" * 59 + "…" in "".join(drawn(record(0, 10, model_name="x" * 256)).split())
