"""JSON of strangers: read, or refused in the caller's own sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from corolla.errors import BundleError
from corolla.json_files import MOST_DEPTH, JsonError, end_of_value, parse, parse_object, read_object

DEEP = "[" * 100_000 + "]" * 100_000  # the parser's own recursion ends long before


@pytest.mark.parametrize(
    ("raw", "wrong"),
    [
        (DEEP, "nested too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
        ('{"a": ', "not readable JSON"),
        (b'{"a": "\xff"}', "not readable JSON"),
        ("9" * 10_000, "not readable JSON"),
        ("[1]", "one JSON object"),
        ("", "not readable JSON"),
    ],
    ids=range(7),
)
def test_what_is_not_an_object(raw: str | bytes, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(JsonError, match=wrong):
        parse_object(raw)
    path = tmp_path / "a.json"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(BundleError, match=rf"a\.json .*{wrong}; copy it again\.$"):
        read_object(path, BundleError, "copy it again")


def test_what_is_one() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": [1, {}]}') == {"a": [1, {}]}
    assert parse("[" * MOST_DEPTH + "]" * MOST_DEPTH)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot be read \(No such file or directory\); copy it again\."):
        read_object(tmp_path / "a.json", BundleError, "copy it again")
    with pytest.raises(BundleError, match="Is a directory"):
        read_object(tmp_path, BundleError, "copy it again")


def test_a_value_that_a_text_begins_with() -> None:
    assert end_of_value('{"a": [1]} and more') == len('{"a": [1]}')
    for wrong in ("and more", DEEP, '{"a": '):
        with pytest.raises(JsonError):
            end_of_value(wrong)
