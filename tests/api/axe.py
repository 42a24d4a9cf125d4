"""axe-core in the browser: what of a page would keep somebody out. Its script comes with a package nobody imports."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from typing import Any

from tests.api.browser import Page

SERIOUS = ("serious", "critical")


@cache
def script() -> str | None:
    """axe-core; None where it is not installed."""
    try:
        found = [one for one in files("axe-playwright-python") or () if one.name == "axe.min.js"]
    except PackageNotFoundError:
        return None
    return found[0].read_text(encoding="utf-8") if found else None


def serious(page: Page) -> list[str]:
    """The rules that the page breaks seriously, and where first."""
    code = script()
    assert code is not None
    page.run(f"{code};0")
    found: list[dict[str, Any]] = json.loads(
        page.run("axe.run(document).then(one => JSON.stringify(one.violations))")
    )
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] in SERIOUS]
