"""Options declared once: the fields of a dataclass are options of a command.

    learning_rate: Annotated[float, "--lr", "Learning rate; falls linearly to 0."] = 1e-2

in a dataclass, and `settings: Annotated[dict[str, Any], Fields(TuneSettings)]` in a command under `with_fields`
make the option `--lr`; the command is given arguments for the dataclass. Without a help text, a field is no option;
instead of one, it may have an option of typer's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from corolla.errors import UsageError
from corolla.text import well_formed


@dataclass(frozen=True)
class Fields:
    """The options in a dataclass; with `only_given`, those that are not given are left out."""

    of: Any
    only_given: bool = False

    def parameters(self) -> Iterator[Parameter]:
        """One for each option, as typer takes it."""
        hints = get_type_hints(self.of, include_extras=True)
        for field in fields(self.of):
            about = getattr(hints[field.name], "__metadata__", ())
            if about:
                yield self._parameter(field, hints[field.name].__origin__, about)

    def _parameter(self, field: Field[Any], kind: Any, about: tuple[Any, ...]) -> Parameter:
        default = Parameter.empty if field.default is MISSING else field.default
        if isinstance(about[0], OptionInfo):  # typer's own
            return Parameter(
                field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, *about]
            )
        if self.only_given:
            about = (*about[:-1], about[-1].removesuffix(".") + _told(default))
            kind, default = kind | None, None
        clean = clean_text if kind in (str, str | None) else None
        about = (typer.Option(*about[:-1], help=about[-1], callback=clean),)
        return Parameter(
            field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, *about]
        )

    def taken(self, given: dict[str, Any]) -> dict[str, Any]:
        """The dataclass's arguments, taken out of all that a command was given."""
        found = {parameter.name: given.pop(parameter.name) for parameter in self.parameters()}
        return {name: value for name, value in found.items() if not (self.only_given and value is None)}

    def words(self, given: Mapping[str, Any]) -> list[str]:
        """What to type for these values; nothing for those that are the default."""
        found: list[str] = []
        for parameter in self.parameters():
            value = given.get(parameter.name, parameter.default)
            if value is not None and value != parameter.default:
                flag = _flag(parameter)
                each = value if isinstance(value, list | tuple) else [value]
                found += [flag] if value is True else [word for one in each for word in (flag, str(one))]
        return found


def _flag(parameter: Parameter) -> str:
    """How an option is typed."""
    option = parameter.annotation.__metadata__[0]
    declared = (getattr(option, "default", None), *(getattr(option, "param_decls", None) or ()))
    return next(
        (word for word in declared if str(word).startswith("--")), "--" + parameter.name.replace("_", "-")
    )


def _with_flag(sentence: str, parameters: Sequence[Parameter]) -> str:
    """`wire is 'zip'; …`, as a dataclass says it to everybody, begins with what was typed: `--wire`."""
    name, is_, rest = sentence.partition(" is ")
    for parameter in parameters:
        if parameter.name == name and is_:
            return f"{_flag(parameter)}{is_}{rest}"
    return sentence


def _told(default: Any) -> str:
    """A default as the end of a help text."""
    if default is None:
        return "."
    words = ("no", "yes")[default] if isinstance(default, bool) else f"{default:g}"
    return f" (default: {words})."


def clean_text(value: str | None) -> str | None:
    """For options that are text, maybe for a model: bytes that are no text would be refused by its tokenizer."""
    return None if value is None else well_formed(value)


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of all `Fields` that it names."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, Fields] = {}
    for parameter in signature(command).parameters.values():
        hint = hints[parameter.name]
        group = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Fields)), None)
        if group is None:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hint))
        else:
            groups[parameter.name] = group
            parameters += group.parameters()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        arguments = {name: group.taken(given) for name, group in groups.items()}
        try:
            command(**arguments, **given)
        except UsageError as error:
            error.args = (_with_flag(str(error), parameters),)
            raise

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run
