"""The page in a real browser: chat, stop, edit, compare, tomorrow, a phone's width, the keyboard alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.api.axe import script, serious
from tests.api.browser import CHROMIUM, Page, browser
from tests.api.test_access import asked
from tests.api.world import BASE, World, Worlds, write_bundle

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
IDLE = "document.getElementById('stop').hidden && document.querySelectorAll('.turn.assistant').length"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def served(worlds: Worlds) -> World:
    world = worlds.make("page")
    write_bundle(world.bundles / "poet", world.folder, world.swarm.checkpoint.identity)
    return world


def ready(page: Page, world: World, path: str = "/") -> None:
    page.open("about:blank")
    page.open(world.url + path)
    page.wait("document.getElementById('model')?.value")
    page.run("temperature.value = 0; max_tokens.value = 12; document.getElementById('say').focus()")


def say(page: Page, text: str, replies: int) -> list[str]:
    page.run("document.getElementById('say').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(f"{IDLE} >= {replies}")
    return texts(page)


def texts(page: Page) -> list[str]:
    found: list[str] = page.run("[...document.querySelectorAll('.turn .said')].map(one => one.textContent)")
    return found


def overflows(page: Page) -> bool:
    return bool(page.run("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def test_a_chat_is_there_tomorrow_and_branches_where_it_is_edited(page: Page, served: World) -> None:
    page.size(1200, 800)
    ready(page, served)
    assert len(say(page, "What of the moon?", 1)) == 2
    assert len(say(page, "And then?", 2)) == 4
    page.wait("location.hash.length > 8")
    (kept,) = asked(served, "/api/conversations")[1]
    saved = asked(served, f"/api/conversations/{kept['id']}")[1]["columns"][0]["messages"]
    assert [one["content"] for one in saved if one["role"] == "user"] == ["What of the moon?", "And then?"]
    ids = served.prompt([{"role": "user", "content": "What of the moon?"}])
    assert saved[1]["content"] == served.text(served.greedy(ids, 12))
    before = texts(page)
    page.open("about:blank")
    page.open(f"{served.url}/#{kept['id']}")
    page.wait("document.querySelectorAll('.turn').length === 4")
    assert texts(page) == before
    page.run("document.querySelector('[aria-label=\"Good reply\"]').click()")
    page.wait("document.querySelector('[aria-pressed=\"true\"]')")
    page.wait("fetch('/api/rated').then(one => one.text()).then(one => one.includes('What of the moon?'))")
    page.run("document.querySelectorAll('[aria-label^=Edit]')[1].click()")
    page.wait("document.getElementById('say').value === 'And then?'")
    page.run("temperature.value = 0; max_tokens.value = 12; document.getElementById('say').value = 'Why?'")
    page.run("document.getElementById('say').focus()")
    page.press("Enter")
    page.wait("document.querySelectorAll('.turn').length === 4 && document.getElementById('stop').hidden")
    page.wait("document.querySelectorAll('#list li').length === 2")
    assert texts(page)[2] == "Why?"
    assert page.said == []


def test_two_side_by_side_and_a_reply_that_is_stopped(page: Page, served: World) -> None:
    page.size(1200, 800)
    ready(page, served)
    page.run("other.value = 'poet'; other.dispatchEvent(new Event('change'))")
    page.wait("document.querySelectorAll('.column').length === 2")
    say(page, "What of the rain?", 2)
    columns = page.run(
        "[...document.querySelectorAll('.column')].map(one => one.querySelector('.assistant .said').textContent)"
    )
    assert columns[0] != columns[1]
    page.run("other.value = ''; other.dispatchEvent(new Event('change')); max_tokens.value = 900")
    page.type("At length, please.")
    page.press("Enter")
    page.wait("document.querySelector('.turn.assistant .said')?.textContent.length > 3")
    page.press("Escape")
    page.wait("document.getElementById('stop').hidden")
    for run in served.api.generator.runs:
        assert run.done.wait(30)
    assert page.said == []


def test_what_a_model_says_is_never_html(page: Page, served: World) -> None:
    ready(page, served)
    hostile = (
        "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script> **bold** `code` "
        "[link](javascript:document.title='hacked') [fine](https://example.org/)\n```\n<b>x</b>\n```\n- item"
    )
    page.run(
        f"import('/page/markdown.js').then(one => document.getElementById('columns').replaceChildren("
        f"...one.rendered({hostile!r}.replaceAll('\\\\n', '\\n'))))"
    )
    assert page.run("document.querySelectorAll('#columns img, #columns script, #columns b').length") == 0
    assert page.run("[...document.querySelectorAll('#columns a')].map(one => one.href)") == [
        "https://example.org/"
    ]
    assert page.run("document.querySelector('#columns strong').textContent") == "bold"
    assert page.run("document.title") == "Corolla"
    headers = asked(served, "/")[2]
    assert "script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_and_the_keyboard_alone(page: Page, served: World, dark: bool, tmp_path: Path) -> None:
    page.size(390, 780, dark=dark)
    ready(page, served)
    say(page, "A word that is very long: " + "x" * 200, 1)
    assert not overflows(page)
    assert page.run("getComputedStyle(document.getElementById('side')).display") == "none"
    # All that can be pressed can be reached, and is large enough for a finger.
    page.run("document.activeElement.blur(); window.reached = new Set()")
    for _ in range(25):
        page.press("Tab")
        page.run(
            "window.reached.add(document.activeElement.id || document.activeElement.getAttribute('aria-label'))"
        )
    reached = set(page.run("[...window.reached]"))
    assert {"menu", "say", "send", "Good reply", "Regenerate this reply"} <= reached
    page.run("document.getElementById('menu').focus()")
    page.press("Enter")
    page.wait("getComputedStyle(document.getElementById('side')).display !== 'none'")
    page.press("Escape")
    page.wait("getComputedStyle(document.getElementById('side')).display === 'none'")
    small = page.run(
        "[...document.querySelectorAll('button')].filter(one => one.offsetHeight && one.offsetHeight < 24).length"
    )
    assert small == 0
    back, text = page.run(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (brightness(back) < brightness(text)) == dark
    page.open(f"{served.url}/swarm")
    page.wait("document.querySelectorAll('#servers tr').length === 2")
    assert not overflows(page)
    assert "complete" in page.run("state.textContent")


def brightness(color: str) -> int:
    return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])


@pytest.mark.nightly  # the directory is read every ten seconds
def test_the_swarm_page_follows_what_happens(page: Page, worlds: Worlds) -> None:
    world = worlds.make("watched", spans=((0, 2), (2, 4)))
    page.size(1000, 700)
    page.open(f"{world.url}/swarm")
    page.wait("document.querySelectorAll('#servers tr').length === 2")
    peer = world.swarm.add(0, 4)
    page.wait("document.querySelectorAll('#servers tr').length === 3")
    page.wait(f"changes.textContent.includes('{peer[-8:]} came')")
    assert BASE in page.run("state.textContent")


@pytest.mark.skipif(script() is None, reason="axe-core is not installed")
def test_nobody_is_kept_out(page: Page, served: World) -> None:
    """By axe-core, in both colours; a mistake that it should see is seen."""
    for dark, width in ((False, 1200), (True, 390)):
        page.size(width, 800, dark=dark)
        ready(page, served)
        say(page, "What of the moon?", 1)
        page.run("settings.open = true")
        assert serious(page) == []
        page.open(f"{served.url}/swarm")
        page.wait("document.querySelectorAll('#servers tr').length")
        assert serious(page) == []
        page.open(f"{served.url}/runs")
        page.wait("document.querySelectorAll('.run').length")
        page.run("document.getElementById('new').open = true")
        assert serious(page) == []
    page.run("document.getElementById('new').querySelector('label').style.color = 'var(--line)'")
    page.run("document.documentElement.lang = ''")
    assert serious(page) != []
