"""What a failure means: every code has its line, and nobody else goes by a code's name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

import corolla
from corolla.errors import PeerSilent, RequestRefused
from corolla.wire.failures import MEANINGS, Remedy, keeps_session, meaning, remedy_of
from corolla.wire.messages import Failure, FailureCode

SOURCE = Path(corolla.__file__).parent
CODES = get_args(FailureCode)
DEFINED = [SOURCE / "wire" / name for name in ("messages.py", "failures.py")]
# The same words, for the state of a record and for the field of a message.
NO_CODES = {
    ("api/metrics.py", "draining"),
    ("cli/server_metrics.py", "draining"),
    ("cli/server_metrics.py", "version"),
    ("cli/swarm_map.py", "draining"),
    ("swarm/directory/directory.py", "draining"),
    ("server/requests.py", "version"),
}


def test_every_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_meaning_agrees_with_itself(code: FailureCode) -> None:
    means = MEANINGS[code]
    assert means.session_lost or not means.stream_lost
    assert means.final or not means.garbage
    if means.remedy is Remedy.REPLAY:
        assert means.session_lost
    assert meaning(Failure(code=code, message="")) is meaning(RequestRefused("", code=code)) is means
    assert keeps_session(RequestRefused("", code=code)) is not means.session_lost


def test_other_errors_have_no_remedy_and_cost_the_session() -> None:
    assert remedy_of(PeerSilent("")) is remedy_of(None) is None
    assert not keeps_session(PeerSilent(""))


def compared(tree: ast.AST) -> list[tuple[int, str]]:
    """Codes that are compared with something, looked for in something, matched, or collected to be so."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            found.append(node.value)
        elif isinstance(node, ast.Set | ast.Tuple | ast.List):
            found += node.elts
        elif isinstance(node, ast.Dict):
            found += [key for key in node.keys if key is not None]
    return [(one.lineno, one.value) for one in found if isinstance(one, ast.Constant) and one.value in CODES]


def test_nobody_else_goes_by_a_code() -> None:
    strays = [
        (path.relative_to(SOURCE).as_posix(), code, line)
        for path in sorted(SOURCE.rglob("*.py"))
        if path not in DEFINED
        for line, code in compared(ast.parse(path.read_text()))
    ]
    assert not [stray for stray in strays if stray[:2] not in NO_CODES], strays


def test_the_walk_finds_comparisons() -> None:
    source = """
if code == "too_large": pass
if code in ("no_lease", x): pass
FATAL = frozenset({"malformed"})
match code:
    case "evicted": pass
"""
    assert {code for _, code in compared(ast.parse(source))} == {
        "too_large",
        "no_lease",
        "malformed",
        "evicted",
    }
