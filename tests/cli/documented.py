"""docs/commands.md: all commands and their options, from what the commands themselves say.

    python -m tests.cli.documented > docs/commands.md

Invariant: nothing is said here that `--help` does not say; a test compares the page with the commands.
"""

from __future__ import annotations

from typing import Any

from typer.main import get_command

from corolla.cli.main import app
from corolla.cli.terminal import say

HEAD = """\
# Commands

Written by `python -m tests.cli.documented`; `corolla COMMAND --help` says the same. `corolla --verbose COMMAND`
shows the log: a server's says who came, what for and how fast.

Whatever you would type every time can stand in the environment or in a file. `COROLLA_PEERS` holds addresses with
spaces between them, for all commands that join a swarm. The file is `~/.config/corolla/config.toml`
(`XDG_CONFIG_HOME` is honoured; `COROLLA_CONFIG` names another):

```toml
peers = ["/ip4/…/tcp/…/p2p/…"]   # for all commands that join a swarm; any option can stand here

[chat]                           # for one command
temperature = 0.3
```

The command line goes before the environment, and that before the file. A chat that goes on (`--continue`) uses the
peers, the trusted servers and the identity that it began with, unless others are typed; a bundle names the swarm
that it was trained in, which is asked last. `--peers local` starts a swarm on this machine whatever is set.

Converted models and compiled kernels lie in `~/.cache/corolla` (`COROLLA_CACHE`, `XDG_CACHE_HOME`), the identity
and chats in `~/.local/share/corolla` (`COROLLA_DATA`, `XDG_DATA_HOME`).

`COROLLA_ISA` makes this CPU look older to Corolla's own kernels: `plain`, `neon`, `avx2`, `avx-vnni` or `avx512`, the
newest instruction set that they may use. torch and its libraries have limits of their own, see `make test-avx2`.
"""


def commands_page() -> str:
    """The whole page."""
    commands: dict[str, Any] = getattr(get_command(app), "commands", {})
    return "\n".join([HEAD, *(_command(name, command) for name, command in commands.items())])


def _command(name: str, command: Any) -> str:
    lines = [f"## corolla {name}", "", " ".join(command.help.split()), "", "| | default | |", "|---|---|---|"]
    lines += [_row(one) for one in command.params if not getattr(one, "hidden", False) and one.name != "help"]
    return "\n".join([*lines, ""])


def _row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or str(parameter.name).upper()}`"
    default = "" if parameter.default in (None, False, ()) else f"`{parameter.default}`"
    if parameter.param_type_name == "option" and parameter.secondary_opts:
        default = f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    words = " ".join((parameter.help or "").split())
    if parameter.envvar:
        words += f" Or in `{parameter.envvar}`."
    return f"| {names} | {default} | {words} |".replace("\n", "\\n")


if __name__ == "__main__":
    say(commands_page().removesuffix("\n"))
