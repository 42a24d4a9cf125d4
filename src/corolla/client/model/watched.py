"""Parameters that know whether their numbers may have changed.

Invariant: whatever is done to a watched parameter from Python shows in its `state_of`: an edit in place (torch
counts those), other memory, dtype or shape, and a look at `.data`, through which it can be edited uncounted ever
after. Nothing else about the parameter differs, and a copy of it is a plain one.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

State = tuple[Any, ...]


class WatchedParameter(nn.Parameter):
    """See the module. Made by `watch`."""

    _aliases: int  # how often somebody got hold of the numbers behind torch's back

    @property
    def data(self) -> Tensor:
        """As `Tensor.data`."""
        self._aliases += 1
        found: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return found

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.data_ptr() != self.data_ptr() or value.dtype != self.dtype:
            self._aliases += 1
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def watch(parameter: nn.Parameter) -> bool:
    """Have `parameter` watched from now on; it stays the same object to all who hold it.

    False where that cannot be: it was made in inference mode, or is of another class of its own.
    """
    if type(parameter) is nn.Parameter:
        parameter.__class__ = WatchedParameter
        parameter._aliases = 0  # type: ignore[attr-defined]
    return isinstance(parameter, WatchedParameter) and not parameter.is_inference()


def state_of(parameter: Tensor | None) -> State | None:
    """What is equal later only if the numbers of a watched parameter are still the same."""
    if parameter is None:
        return None
    version = None if parameter.is_inference() else parameter._version
    aliases = getattr(parameter, "_aliases", 0)
    return version, aliases, parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()


def same_parameters(
    now: Sequence[Tensor | None], parameters: Sequence[Tensor | None], states: Sequence[State | None]
) -> bool:
    """Whether these are the `parameters` that had these `states`, and have them still."""
    return all(map(is_, now, parameters)) and list(map(state_of, now)) == list(states)


class Noted:
    """Which parameters of a model are still as they were when they were noted."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], State]] = {}

    def note(self, model: nn.Module, but: Collection[str] = ()) -> None:
        """Take all parameters as they are now for unchanged, `but` for those of these names."""
        self._known = {}
        for name, one in model.named_parameters():
            if name not in but and watch(one):
                self._known[id(one)] = (weakref.ref(one), _edits(one))

    def changed(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The others, by name; a table that is tied under one of its names."""
        return {name: one for name, one in model.named_parameters() if not self._is_as_noted(one)}

    def _is_as_noted(self, one: nn.Parameter) -> bool:
        known, edits = self._known.get(id(one), (None, None))
        return (known is not None and known() is one and edits == _edits(one)) or one.is_inference()


def _edits(parameter: nn.Parameter) -> State:
    return None if parameter.is_inference() else parameter._version, getattr(parameter, "_aliases", 0)
