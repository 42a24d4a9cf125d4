"""Conversations that are kept, and the swarm as JSON."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.api.test_access import asked
from tests.api.world import BASE, World, Worlds

from corolla.api.conversations import Conversation, Conversations, Exported
from corolla.api.failures import ApiFailure
from corolla.data.sources import load_conversations
from corolla.errors import UsageError
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.directory_memory import MemoryDirectory


def talk(text: str, rating: int = 0) -> Conversation:
    return Conversation.model_validate(
        {
            "title": text,
            "system": "Be brief.",
            "columns": [
                {
                    "model": BASE,
                    "messages": [
                        {"role": "user", "content": text},
                        {"role": "assistant", "content": "So.", "rating": rating},
                    ],
                }
            ],
        }
    )


def test_they_are_there_tomorrow_and_nobody_else_s(tmp_path: Path) -> None:
    path = tmp_path / "data" / "conversations.sqlite3"
    kept = Conversations(path)
    kept.write("ann", "1", talk("One"))
    kept.write("ann", "2", talk("Two", 1))
    kept.write("ann", "1", talk("One again", -1))
    kept.close()
    assert path.stat().st_mode & 0o077 == 0
    again = Conversations(path)
    assert [one["title"] for one in again.titles("ann")] == ["One again", "Two"]
    assert again.read("ann", "2") == talk("Two", 1)
    assert again.titles("bob") == []
    with pytest.raises(Exception, match="no such"):
        again.read("bob", "1")
    again.delete("ann", "1")
    assert [one["id"] for one in again.titles("ann")] == ["2"]
    again.close()
    with pytest.raises(UsageError, match="--conversations"):
        Conversations(Path("/proc/nowhere/x"))


def test_two_processes_may_keep_them_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "conversations.sqlite3"
    both = [Conversations(path), Conversations(path)]

    def write(one: int) -> None:
        for number in range(20):
            both[one].write("ann", f"{one}-{number}", talk("Hi"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert [len(kept.titles("ann")) for kept in both] == [40, 40]
    both[1].close()
    for ask in (lambda: both[1].titles("ann"), lambda: both[1].write("ann", "x", talk("Hi"))):
        with pytest.raises(ApiFailure, match="cannot be read or written now") as failure:
            ask()
        assert failure.value.status == 503
    both[0].close()


def test_training_reads_what_is_exported(tmp_path: Path) -> None:
    kept = Conversations(None)
    kept.write("", "1", talk("What of the moon?", 1))
    kept.write("", "2", talk("And the sun?", -1))
    whole, rated = tmp_path / "all.json", tmp_path / "rated.jsonl"
    whole.write_text(json.dumps(kept.export("")))
    rated.write_text(kept.rated("", 1))
    conversations, _ = load_conversations(str(whole))
    assert [[turn.text for turn in one.turns] for one in conversations] == [
        ["Be brief.", "What of the moon?", "So."],
        ["Be brief.", "And the sun?", "So."],
    ]
    conversations, _ = load_conversations(str(rated))
    assert [[turn.text for turn in one.turns] for one in conversations] == [["What of the moon?", "So."]]
    assert kept.take_in("bob", [Exported.model_validate(one) for one in kept.export("")], BASE) == 2
    assert sorted(one["title"] for one in kept.titles("bob")) == ["And the sun?", "What of the moon?"]
    assert kept.export("bob") == kept.export("")
    kept.close()


def test_the_swarm_as_json(world: World) -> None:
    status, found, _ = asked(world, "/api/swarm")
    assert status == 200
    assert (found["model"], found["blocks"], found["missing"], found["count"]) == (BASE, 4, [], 2)
    assert {(one["start"], one["end"]) for one in found["servers"]} == {(0, 2), (2, 4)}


def test_a_swarm_that_is_gone_is_said(worlds: Worlds) -> None:
    world = worlds.make("gone", patience=0.5)
    for record in world.swarm.loop.run(everything(world)):
        world.swarm.loop.run(MemoryDirectory(world.swarm.board).withdraw(record))
        world.swarm.kill(record.peer_id)
    ask = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    status, about, headers = asked(world, "/v1/chat/completions", method="POST", body=ask)
    assert (status, about["error"]["type"]) == (503, "server_error")
    assert headers["retry-after"]
    assert asked(world, "/readyz")[0] == 503
    assert asked(world, "/healthz")[0] == 200


async def everything(world: World) -> list[ServerRecord]:
    return await MemoryDirectory(world.swarm.board).servers(world.swarm.checkpoint.identity)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/conversations/none", None, 404),
        ("PUT", "/api/conversations/bad%20name", {"columns": []}, 400),
        ("PUT", "/api/conversations/x", {"columns": []}, 400),
        ("PUT", "/api/conversations/x", {"columns": [{"model": "m", "messages": [{"role": "x"}]}]}, 400),
        ("POST", "/api/import", [{"messages": []}], 400),
        ("GET", "/page/../app.py", None, 404),
        ("GET", "/page/%2e%2e%2fapp.py", None, 404),
        ("GET", "/api/rated?rating=x", None, 400),
    ],
)
def test_what_is_wrong_is_refused(world: World, method: str, path: str, body: object, status: int) -> None:
    assert asked(world, path, method=method, body=body)[0] == status
