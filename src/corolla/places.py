"""Where Corolla's files lie on this machine; nowhere else is a place made up.

    cache     COROLLA_CACHE, else XDG_CACHE_HOME/corolla, else ~/.cache/corolla: can be deleted at any time
    data      COROLLA_DATA, else XDG_DATA_HOME/corolla, else ~/.local/share/corolla: identity, chats
    config    COROLLA_CONFIG, else XDG_CONFIG_HOME/corolla/config.toml, else ~/.config/corolla/config.toml

Invariant: asked anew each time, so what the environment says now counts; nothing is made by asking.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from platformdirs.unix import Unix  # the same places on every system

from corolla.errors import UsageError

_USUAL = Unix("corolla", appauthor=False)


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder for converted models, compiled kernels and the like; `cache_dir` replaces it."""
    return (_named("COROLLA_CACHE") or _usual("cache")) if cache_dir is None else Path(cache_dir)


def data_root() -> Path:
    """The folder for what only this user's work has made: the identity and chats."""
    return _named("COROLLA_DATA") or _usual("data")


def config_file() -> Path:
    """The file with the user's own defaults; it need not be there."""
    return _named("COROLLA_CONFIG") or _usual("config") / "config.toml"


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    try:
        return Path(value).expanduser() if value else None
    except RuntimeError as error:
        raise UsageError(
            f"{variable} is {value}, but this machine names no home folder for that: give the whole path."
        ) from error


def _usual(kind: Literal["cache", "data", "config"]) -> Path:
    try:
        return Path(getattr(_USUAL, f"user_{kind}_dir"))
    except RuntimeError as error:
        variable = f"XDG_{kind.upper()}_HOME"
        raise UsageError(f"This machine names no home folder for you: set HOME or {variable}.") from error
