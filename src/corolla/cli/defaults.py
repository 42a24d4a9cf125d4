"""The user's own defaults, from the file that `places.config_file` names.

    peers = ["/ip4/…/tcp/…/p2p/…"]     at the top: for every command that has such an option
    [chat]
    temperature = 0.3                  in a table: for that command; named as on the command line

Invariant: what is given on the command line or in a variable of the environment goes before the file; a key that
no command knows is refused, not ignored.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corolla.errors import UsageError
from corolla.files import read_bounded_text
from corolla.places import config_file
from corolla.text import one_line


def read_defaults(commands: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each of click's commands its defaults by parameter, for `default_map`. Raises `UsageError`."""
    path = config_file()
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    tables = {}
    for key, value in _content(path).items():
        if isinstance(value, dict):
            if key not in commands:
                raise UsageError(f"{path} has a table [{one_line(key)}], but there is no such command.")
            tables[key] = value
        elif not _set(found, commands, key, value, path):
            raise UsageError(f"{path} sets {one_line(key)}, which is no option of any command.")
    for name, table in tables.items():  # afterwards, since they go before what is for all
        for key, value in table.items():
            if not _set(found, {name: commands[name]}, key, value, path, by_name=True):
                raise UsageError(f"{path} sets {one_line(key)} for {name}, which has no such option.")
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bounded_text(path))
    except FileNotFoundError as error:
        if os.environ.get("COROLLA_CONFIG"):
            raise UsageError(f"There is no file {path}, which COROLLA_CONFIG names.") from error
        return {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {one_line(error)}.") from error


def _set(
    found: dict[str, dict[str, Any]],
    commands: Mapping[str, Any],
    key: str,
    value: Any,
    path: Path,
    *,
    by_name: bool = False,
) -> bool:
    """Note a value for the commands that know its key; whether there is one."""
    known = False
    for name, command in commands.items():
        for option in _options(command, key):
            known = True
            # A peer that begins a swarm, or whose address is asked for, does not join one unless it is told to.
            if by_name or key != "peers" or option.envvar is not None:
                found[name][str(option.name)] = _fitting(option, value, key, path)
    return known


def _options(command: Any, key: str) -> Iterator[Any]:
    flag = "--" + key.replace("_", "-")
    for option in command.params:
        if option.param_type_name == "option" and flag in option.opts and not option.hidden:
            yield option


def _fitting(option: Any, value: Any, key: str, path: Path) -> Any:
    """The value as the option takes it. Raises `UsageError`."""
    if option.multiple and isinstance(value, str):
        value = [value]
    kinds = (list,) if option.multiple else (bool,) if option.is_flag else (str, int, float)
    plain = isinstance(value, kinds) and (option.is_flag or not isinstance(value, bool))
    if not plain or (isinstance(value, list) and not all(isinstance(part, str) for part in value)):
        wanted = "texts in brackets" if option.multiple else "true or false" if option.is_flag else "a value"
        raise UsageError(f"{path} sets {key} to {one_line(repr(value), characters=40)}; it must be {wanted}.")
    return value
