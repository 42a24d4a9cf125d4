"""Sources as a whole: files of every kind, chitchat, hub names, and what each says when it cannot be used."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from corolla.data.conversation import Conversation
from corolla.data.sources import load_conversations
from corolla.errors import DataError

BUSIEST = "31267496-e50f-4f91-a197-c5b1bfde803b"  # wrote 25,272 of chitchat's utterances

Row = dict[str, Any]


def messages(*texts: str) -> Row:
    return {
        "messages": [
            {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)
        ]
    }


def pair(prompt: str, response: str) -> Row:
    return {"prompt": prompt, "response": response}


def write(path: Path, rows: Sequence[Row]) -> str:
    """The rows as a file of the kind that the path's ending says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {
                        name: value if isinstance(value, str) else json.dumps(value)
                        for name, value in row.items()
                    }
                )
    return str(path)


def texts(conversations: list[Conversation]) -> list[list[str]]:
    return [[turn.text for turn in conversation.turns] for conversation in conversations]


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("schema", "rows"),
    [
        ("messages", [messages("Hi", "Ho"), messages("a", "b", "c", "d")]),
        ("prompt and response", [pair("Hi", "Ho"), pair('a, "b"\nc', "10"), pair("é\u2028x", "NA")]),
        (
            "PersonaChat",
            [{"personality": ["p"], "history": ["Hi", "Ho", "He"], "candidates": ["no", "gold"]}],
        ),
    ],
)
def test_every_kind_of_file_holds_every_shape(
    tmp_path: Path, suffix: str, schema: str, rows: list[Row]
) -> None:
    conversations, report = load_conversations(Path(write(tmp_path / f"data{suffix}", rows)))
    assert (report.schema, report.read, report.used, report.skipped) == (schema, len(rows), len(rows), [])
    wanted = {
        "messages": [["Hi", "Ho"], ["a", "b", "c", "d"]],
        "prompt and response": [["Hi", "Ho"], ['a, "b"\nc', "10"], ["é\u2028x", "NA"]],
        "PersonaChat": [["Hi", "Ho", "He", "gold"]],
    }
    assert texts(conversations) == wanted[schema]


def test_rows_that_do_not_fit_are_counted_and_the_rest_is_used(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [
        *(json.dumps(messages(f"q{index}", "a")) for index in range(3)),
        '{"messages": [{"role": "us',
        "[1, 2]",
        json.dumps({"text": "Hi"}),
        json.dumps(messages("alone")),
        json.dumps(messages("last", "one")),
    ]
    path.write_text("\ufeff" + "\n".join(lines) + "\n\n")
    conversations, report = load_conversations(str(path))
    assert texts(conversations) == [["q0", "a"], ["q1", "a"], ["q2", "a"], ["last", "one"]]
    assert (report.read, report.used) == (8, 4)
    assert [number for number, _ in report.skipped] == [4, 5, 6, 7]
    assert [reason for _, reason in report.skipped] == [
        "not valid JSON",
        "of none of the accepted shapes",
        "of none of the accepted shapes",
        "no reply to learn, with something said before it",
    ]
    first, second = report.lines()
    assert first == "4 of 8 conversations used (messages)"
    assert second == (
        "4 left out: not valid JSON (line 4); of none of the accepted shapes (lines 5, 6); "
        "no reply to learn, with something said before it (line 7)"
    )


def test_of_many_bad_rows_the_first_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    rows = [pair("", "x")] * 1000 + [pair("Hi", "Ho")]
    _, report = load_conversations(write(tmp_path / "data.json", rows))
    assert (report.read, report.used) == (1001, 1)
    assert [number for number, _ in report.skipped] == list(range(1, 21))
    assert report.lines()[1] == "1,000 left out: prompt is empty (rows 1, 2, 3, …)"


def test_a_json_file_may_hold_named_lists(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"valid": [pair("v", "w")], "train": [pair("t", "u")], "version": 1}))
    assert texts(load_conversations(str(path))[0]) == [["t", "u"]]
    assert texts(load_conversations(str(path), split="valid")[0]) == [["v", "w"]]
    with pytest.raises(DataError, match="has no list called test; it has valid, train"):
        load_conversations(str(path), split="test")
    path.write_text(json.dumps({"data": [pair("d", "e")]}))
    assert texts(load_conversations(str(path))[0]) == [["d", "e"]]
    path.write_text(json.dumps(messages("one", "row")))
    assert texts(load_conversations(str(path))[0]) == [["one", "row"]]


def test_json_lines_are_read_under_the_other_ending(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(f"{json.dumps(pair('a', 'b'))}\n{json.dumps(pair('c', 'd'))}\n")
    assert texts(load_conversations(str(path))[0]) == [["a", "b"], ["c", "d"]]


# --- what cannot be used ----------------------------------------------------------------------------------


def without_rows() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"There is no file .*none\.jsonl\."),
        (
            "data.txt",
            b"Hi",
            r"data\.txt is none of the files that can be read: .*\.json, \.jsonl, \.ndjson, \.csv",
        ),
        ("data.jsonl", b"", r"data\.jsonl is empty: it holds no rows"),
        ("data.json", b"[]", "is empty"),
        ("data.json", b"", "is empty"),
        ("data.csv", b"", "is empty"),
        ("data.csv", b"prompt,response\n", "is empty"),
        ("data.parquet", b"", "is empty"),
        ("data.parquet", without_rows(), "is empty"),
        ("data.json", b'[{"prompt": "a", ', r"data\.json is not valid JSON: .*column"),
        ("data.jsonl", b"\xff\xfe\x00", r"data\.jsonl is neither UTF-8 text nor utf-16"),
        ("data.parquet", b"PAR1 or not", r"data\.parquet cannot be read as parquet: .*[Pp]arquet"),
        ("data.csv", b'prompt,response\n"a,b', r"data\.csv cannot be read as csv: "),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_conversations(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["", " ", None, 5, ["chats.jsonl"], b"chats.jsonl"])
def test_what_is_no_source_is_one_sentence(source: Any) -> None:
    with pytest.raises(DataError, match=r"is no source of conversations: give chitchat, a file or"):
        load_conversations(source)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "y" * 400}, "none has an accepted shape"),
        (messages("alone"), "no reply to learn"),
        (3, "none has an accepted shape"),
    ],
)
def test_a_file_without_a_good_row_shows_its_first_and_the_accepted_shapes(
    tmp_path: Path, row: Any, reason: str
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row, row]))
    with pytest.raises(DataError, match=reason) as error:
        load_conversations(str(path))
    _, first, _, *shapes = str(error.value).split("\n")
    assert first.strip().startswith(json.dumps(row)[:100])
    assert len(first) < 320
    for name in ("messages", "conversations", "candidates", "utterances", "prompt"):
        assert any(f'"{name}"' in shape for shape in shapes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speaker": "x"}, "--speaker goes with the chitchat data only"),
        ({"persona": True}, "--persona goes with PersonaChat's shape, but .* holds prompt and response"),
        ({"split": "test"}, "has no splits, so there is no test in it"),
    ],
)
def test_options_that_do_not_go_with_a_file_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for name in ("data.jsonl", "data.json"):
        with pytest.raises(DataError, match=message):
            load_conversations(write(tmp_path / name, [pair("a", "b")]), **options)


def test_a_hub_name_without_a_data_set_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"somebody/something is neither a file here nor a data set") as error:
        load_conversations("somebody/something")
    assert "\n" not in str(error.value)


# --- chitchat ---------------------------------------------------------------------------------------------


def test_chitchat_is_read() -> None:
    conversations, report = load_conversations("chitchat")
    assert (report.read, report.used) == (7168, len(conversations)) == (7168, 4017)
    assert report.lines()[0] == "4,017 of 7,168 conversations used (chitchat)"
    assert len({conversation.id for conversation in conversations}) == 4017
    for conversation in conversations:
        roles = [turn.role for turn in conversation.turns]
        assert roles == [("user", "assistant")[index % 2] for index in range(len(roles))]


def test_one_persons_chitchat() -> None:
    conversations, report = load_conversations("chitchat", speaker=BUSIEST)
    assert (report.read, report.used) == (777, 615)
    by_id = {conversation.id: conversation for conversation in load_conversations("chitchat")[0]}
    flipped = 0
    for conversation in conversations:
        for turn, other in zip(conversation.turns, by_id[conversation.id].turns, strict=True):
            assert turn.text == other.text
            flipped += turn.role != other.role
    assert flipped  # where this person spoke first
    with pytest.raises(DataError, match="Nobody with the id 'nobody' replies"):
        load_conversations("chitchat", speaker="nobody")
    with pytest.raises(DataError, match="neither personas nor splits"):
        load_conversations("chitchat", persona=True)


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys; import corolla.data.sources, corolla.data.render\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == "[]"
