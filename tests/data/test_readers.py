"""Files as people have them: compressed, in other encodings, and with rows that are broken."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from corolla.data.sources import load_conversations
from corolla.errors import DataError

PAIR = {"prompt": "Hi", "response": "é 🌸"}
GOOD = json.dumps(PAIR)
TABLE = "prompt,response\nHi,é 🌸\n"


def read(path: Path, content: bytes | str) -> tuple[list[list[str]], list[tuple[int, str]]]:
    """The texts that were read, and what was left out."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    conversations, report = load_conversations(str(path))
    assert report.read == report.used + len(report.skipped)
    return [[turn.text for turn in one.turns] for one in conversations], report.skipped


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


# --- whole files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.ndjson", "data.csv", "data.tsv"])
def test_compressed_files_are_read(tmp_path: Path, name: str, packed: str) -> None:
    text = GOOD if "js" in name else TABLE.replace(",", "\t" if name.endswith(".tsv") else ",")
    content = PACKERS[packed](text.encode())
    assert read(tmp_path / (name + packed), content) == ([["Hi", "é 🌸"]], [])
    # Some are unpacked on the way, or their name lacks the ending.
    assert read(tmp_path / (name + packed), text) == ([["Hi", "é 🌸"]], [])
    assert read(tmp_path / name, content) == ([["Hi", "é 🌸"]], [])
    with pytest.raises(DataError, match="is compressed, but broken or cut off") as error:
        read(tmp_path / (name + packed), content[:-9])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"), [("data.jsonl", GOOD), ("data.json", f"[{GOOD}]"), ("data.csv", TABLE)]
)
def test_other_encodings_are_read(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    assert read(tmp_path / name, text.encode(encoding)) == ([["Hi", "é 🌸"]], [])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_ends_a_line(tmp_path: Path, end: str) -> None:
    for name, text in (("data.jsonl", f"{GOOD}\n{GOOD}\n"), ("data.csv", TABLE + "Hi,é 🌸\n")):
        assert read(tmp_path / name, text.replace("\n", end)) == ([["Hi", "é 🌸"]] * 2, [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"", "is empty"),
        ("data.jsonl", b"\n \n", "is empty"),
        ("data.json", b"[" * 100_000, "nested too deeply"),
        ("data.jsonl", b'{"a":' * 100_000, "nested too deeply"),
        ("data.jsonl", b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "is a web page and not data"),
        ("data.csv", b"\n <html>\n", "is a web page and not data"),
        ("data.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x", "is a Git LFS pointer"),
        ("data.jsonl", b"PK\x03\x04...", "is a zip archive: unpack it first"),
        ("data.json", b"PAR1...", r"is a parquet file: its name should end in \.parquet"),
        ("data.jsonl", b"\x00\x01\x02\x03\xff", "is neither UTF-8 text nor utf"),
        ("data.parquet.gz", gzip.compress(b"PAR1", mtime=0), "is compressed as a whole"),
        ("data.tar.gz", b"x", "is none of the files that can be read"),
        ("data.csv", b"prompt,response,prompt\na,b,c\n", "has two columns called 'prompt'"),
        ("data.csv", b'"prompt,response\na,b\n', "cannot be read as csv: unexpected end of data"),
        ("data.jsonl", b"Not Found", r"is not valid JSON: Expecting value in line 1"),
    ],
)
def test_a_file_that_is_no_data_is_one_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name, content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_a_folder_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder: give a file"):
        load_conversations(str(tmp_path))
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"is a folder: give a file in it, such as .*train\.jsonl\.gz\."):
        load_conversations(str(tmp_path))
    with pytest.raises(DataError, match=r"There is no file .*none\.jsonl\."):
        load_conversations(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("source", ["a\0b.jsonl", "x" * 5000 + ".jsonl", "~nobody-here/x.jsonl"])
def test_a_name_that_no_file_can_have_is_no_file(source: str) -> None:
    with pytest.raises(DataError, match="There is no file"):
        load_conversations(source)


# --- JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "left_out"),
    [
        (["", GOOD, "", GOOD, ""], []),
        ([GOOD, GOOD[:20], GOOD], [(2, "not valid JSON")]),
        ([GOOD, GOOD, GOOD[:-1]], [(3, "not valid JSON")]),
        ([GOOD, GOOD, "{"], [(3, "not valid JSON")]),
        ([GOOD, "[" * 100_000, GOOD], [(2, "it is nested too deeply")]),
        ([GOOD, '{"messages": ' + "[" * 100_000, GOOD], [(2, "it is nested too deeply")]),
        ([GOOD + GOOD], []),
        ([GOOD + " " + GOOD], []),
        ([GOOD + ",", GOOD + ","], []),
        (["[", GOOD + ",", GOOD, "]"], []),
        (["[" + GOOD + ",", GOOD, "]"], []),
        ([GOOD, "null", GOOD], [(2, "of none of the accepted shapes")]),
        ([GOOD, GOOD, "}"], [(3, "not valid JSON")]),
        ([GOOD, '{"prompt": NaN, "response": "x"}', GOOD], [(2, "prompt is not text")]),
        ([GOOD, '{"prompt": "a\tb", "response": "x"}', GOOD], [(2, "not valid JSON")]),
        (
            [GOOD, r'{"prompt": "Hi \ud83d", "response": "x"}', GOOD],
            [(2, "it holds half a character (a lone surrogate)")],
        ),
        ([r'{"prompt": "Hi", "response": "\u00e9 \ud83c\udf38"}', GOOD], []),
        ([GOOD, r'{"prompt": "x", "response": "y", "note": "\ud83d"}'], None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_broken_row_costs_itself(tmp_path: Path, lines: list[str], left_out: list[Any] | None) -> None:
    found, skipped = read(tmp_path / "data.jsonl", "\n".join(lines))
    assert skipped == (left_out or [])
    assert found[0] == ["Hi", "é 🌸"]
    assert len(found) == 2
    assert read(tmp_path / "data.json", "\n".join(lines)) == (found, skipped)


def test_pretty_printed_rows_are_read(tmp_path: Path) -> None:
    for text in (
        json.dumps([PAIR, PAIR], indent=2),
        f"{json.dumps(PAIR, indent=2)}\n{json.dumps(PAIR, indent=2)}",
    ):
        assert read(tmp_path / "data.jsonl", text) == ([["Hi", "é 🌸"]] * 2, [])


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
def test_a_bad_byte_costs_its_row(tmp_path: Path, name: str) -> None:
    rows = [("Hi", "one"), ("caf\udce9", "two"), ("Hi", "three")]
    if name == "data.csv":
        text = "prompt,response\n" + "".join(f"{prompt},{response}\n" for prompt, response in rows)
    else:
        lines = [f'{{"prompt": "{prompt}", "response": "{response}"}}' for prompt, response in rows]
        text = "\n".join(lines) if name == "data.jsonl" else f"[{','.join(lines)}]"
    found, skipped = read(tmp_path / name, text.encode(errors="surrogateescape"))
    assert found == [["Hi", "one"], ["Hi", "three"]]
    assert skipped == [(3 if name == "data.csv" else 2, "it holds a byte that is not UTF-8")]


def test_what_cannot_be_encoded_is_shown_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No row of .* can be used") as error:
        read(tmp_path / "data.jsonl", r'{"prompt": "\ud83d", "response": "x"}')
    assert r"\ud83d" in str(error.value)
    str(error.value).encode()


def test_a_conversations_own_name_is_text_too(tmp_path: Path) -> None:
    said = '"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]'
    lines = [f'{{"id": "{name}", {said}}}' for name in ("a", r"\ud83d")]
    assert read(tmp_path / "data.jsonl", "\n".join(lines))[1] == [
        (2, "it holds half a character (a lone surrogate)")
    ]


def test_each_row_has_its_own_shape(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": None, **PAIR},
        {"messages": messages, "prompt": None, "response": None},
        {"messages": None, "prompt": None, "response": None},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    conversations, report = load_conversations(str(path))
    assert [[turn.text for turn in one.turns] for one in conversations] == [["Hi", "é 🌸"], ["a", "b"]]
    assert report.skipped == [(3, "messages is not a list")]
    assert report.lines()[0] == "2 of 3 conversations used (messages, prompt and response)"


def test_a_text_column_is_told_why_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a text column does not tell who says what in it"):
        read(tmp_path / "data.jsonl", '{"text": "Hi"}')


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "found", "left_out"),
    [
        (['"[1, 2, 3]",x'], [["[1, 2, 3]", "x"]], []),
        (['"[""a""]","[{}]"'], [['["a"]', "[{}]"]], []),
        (["a,b", '"he said "hi" there",c', "d,e"], [["a", "b"], ["d", "e"]], [(3, "a quote in it is wrong")]),
        (["a,b", '"never closed,c', "d,e"], [["a", "b"], ["d", "e"]], [(3, "a quote in it is wrong")]),
        (["a,b", '"never closed,c', '"d",e'], [["a", "b"], ["d", "e"]], [(3, "a quote in it is wrong")]),
        (["a,b", 'six 6" pipes,c'], [["a", "b"], ['six 6" pipes', "c"]], []),
        (["a,b", '"two\nlines",c', "d", "e,f"], [["a", "b"], ["two\nlines", "c"], ["e", "f"]],
         [(5, "response is not text, it is missing")]),
        (["a,b", "Hi, there,c", "d,e,"], [["a", "b"], ["d", "e"]], [(3, "it has more cells than there are columns")]),
        (["a,b", "", "d,e"], [["a", "b"], ["d", "e"]], []),
        (["a,b", ",c", "NA,10"], [["a", "b"], ["NA", "10"]], [(3, "prompt is empty")]),
        (["a,b\0c"], [["a", "b\0c"]], []),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_broken_line_costs_itself(
    tmp_path: Path, rows: list[str], found: list[list[str]], left_out: list[Any]
) -> None:
    assert read(tmp_path / "data.csv", "prompt,response\n" + "\n".join(rows) + "\n") == (found, left_out)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    found, skipped = read(tmp_path / "data.csv", f"prompt,response\nHi,{'ab ' * 60_000}\nshort,one\n")
    assert [len(reply) for _, reply in found] == [179_999, 3]
    assert skipped == []
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_marks_between_cells(tmp_path: Path, delimiter: str) -> None:
    text = delimiter.join(["prompt ", " response"]) + "\n" + delimiter.join(["a, b", "c"]) + "\n"
    assert read(tmp_path / "data.csv", text) == ([["a, b", "c"]], [])


def test_lists_in_cells_are_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["messages", "tools", "system"])
        writer.writerow([json.dumps(messages), "[]", "[S]"])
    assert read(path, path.read_bytes()) == ([["[S]", "Hi", "Ho"]], [])
