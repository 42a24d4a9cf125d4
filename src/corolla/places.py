"""Where Corolla's files lie on this machine; nowhere else is a place made up.

    cache     COROLLA_CACHE, else XDG_CACHE_HOME/corolla, else ~/.cache/corolla: can be deleted at any time
    data      COROLLA_DATA, else XDG_DATA_HOME/corolla, else ~/.local/share/corolla: identity, chats
    config    COROLLA_CONFIG, else XDG_CONFIG_HOME/corolla/config.toml, else ~/.config/corolla/config.toml

Invariant: asked anew each time, so what the environment says now counts; nothing is made by asking.
"""

from __future__ import annotations

import os
from pathlib import Path

from corolla.errors import UsageError


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder for converted models, compiled kernels and the like; `cache_dir` replaces it."""
    return (
        _named("COROLLA_CACHE") or _xdg("XDG_CACHE_HOME", ".cache") if cache_dir is None else Path(cache_dir)
    )


def data_root() -> Path:
    """The folder for what only this user's work has made: the identity and chats."""
    return _named("COROLLA_DATA") or _xdg("XDG_DATA_HOME", ".local/share")


def config_file() -> Path:
    """The file with the user's own defaults; it need not be there."""
    return _named("COROLLA_CONFIG") or _xdg("XDG_CONFIG_HOME", ".config") / "config.toml"


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None


def _xdg(variable: str, usual: str) -> Path:
    value = os.environ.get(variable)
    if value and os.path.isabs(value):  # others have to be ignored, its specification says
        return Path(value) / "corolla"
    try:
        return Path.home() / usual / "corolla"
    except RuntimeError as error:
        raise UsageError(f"This machine names no home folder for you: set HOME or {variable}.") from error
