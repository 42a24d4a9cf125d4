"""What is done at a span's blocks in the course of one pass: hidden states in and out, deep prompts, pauses.

Invariant: hooks stand on blocks that other spans' views share, and in a pause other passes go through the same
blocks; so each hook acts in its own pass and in no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corolla.models.prompts import add_deep, add_deep_packed

BlockHook = Callable[[nn.Module, tuple[Any, ...]], Any]

_passage: ContextVar[Passage | None] = ContextVar("corolla_passage", default=None)


def first_of(output: Any) -> Tensor:
    """The hidden states [R, T, H] among what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


class Passage:
    """One pass of hidden states through a list of blocks: what enters the first, and what leaves the last.

    Families' code does something to its inputs before the first block (positions are added, they are scaled)
    which has been done at the client, and something after the last, which is done there too.
    """

    def __init__(self, blocks: nn.ModuleList, hidden: Tensor, hooks: Sequence[Sequence[BlockHook]]) -> None:
        """`hooks` are each block's own, or none at all; they see, and may replace, its inputs."""
        self._blocks = blocks
        self._hidden = hidden
        self._hooks = hooks
        self.left: Tensor | None = None

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """The family's code runs its blocks inside."""
        handles = [
            self._blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            self._blocks[-1].register_forward_hook(self._leave),
        ]
        for block, own in zip(self._blocks, self._hooks, strict=bool(self._hooks)):
            handles += [block.register_forward_pre_hook(self._only_here(hook)) for hook in own]
        token = _passage.set(self)
        try:
            yield
        finally:
            _passage.reset(token)
            for handle in handles:
                handle.remove()

    def _enter(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _passage.get() is not self:
            return None
        kwargs.pop("hidden_states", None)
        return (self._hidden, *args[1:]), kwargs

    def _leave(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if _passage.get() is self:
            self.left = first_of(output)

    def _only_here(self, hook: BlockHook) -> BlockHook:
        return lambda block, args: hook(block, args) if _passage.get() is self else None


class PromptAdder:
    """Adds one block's deep prompt to the hidden states that enter it."""

    def __init__(self, prompt: Tensor, past: int) -> None:
        self.prompt = prompt
        self.past = past

    def __call__(self, _block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (add_deep(arguments[0], self.prompt, self.past), *arguments[1:])


@dataclass(frozen=True)
class DeepRows:
    """Deep prompts in a packed pass: `vectors` [blocks, M, H] are added to the packed tokens int64 [M]."""

    tokens: Tensor
    vectors: Tensor

    @staticmethod
    def of(places: Sequence[tuple[int, int, int]], prompts: Sequence[Tensor]) -> DeepRows | None:
        """For stretches (first packed token, its position in its sequence, count), each with its prompts.

        `prompts` are [blocks, P, H]; a stretch takes those of positions below P. None when no token does.
        """
        tokens, vectors = [], []
        for (begin, start, count), prompt in zip(places, prompts, strict=True):
            stop = min(prompt.shape[1], start + count)
            if start < stop:
                tokens.append(torch.arange(begin, begin + stop - start, device=prompt.device))
                vectors.append(prompt[:, start:stop])
        return DeepRows(torch.cat(tokens), torch.cat(vectors, dim=1)) if tokens else None


class _PackedHook:
    """Before a block of a packed pass: a pause, and that block's deep prompts."""

    def __init__(
        self, between: Callable[[], None] | None, tokens: Tensor | None, vectors: Tensor | None
    ) -> None:
        self.between = between
        self.tokens = tokens
        self.vectors = vectors

    def __call__(self, _block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden: Tensor = arguments[0]
        if self.between is not None:
            self._pause(self.between, hidden)
        if self.tokens is None or self.vectors is None:
            return None
        return (add_deep_packed(hidden, self.vectors, self.tokens), *arguments[1:])

    def _pause(self, between: Callable[[], None], hidden: Tensor) -> None:
        between()
        if hidden.requires_grad and not hidden.is_leaf:
            hidden.register_hook(lambda _grad: between())  # type: ignore[no-untyped-call]


def packed_hooks(
    blocks: nn.ModuleList, deep: DeepRows | None, between: Callable[[], None] | None
) -> list[list[BlockHook]]:
    """For `Passage`: what a packed pass does before each block."""
    if deep is None:
        return [] if between is None else [[_PackedHook(between, None, None)] for _ in blocks]
    return [[_PackedHook(between, deep.tokens, vectors)] for vectors in deep.vectors]
