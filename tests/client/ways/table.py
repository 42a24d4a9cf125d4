"""What a row of the table is, and what its functions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tests.reference import Prefixed, Prompted, random_ids
from torch import Tensor

from corolla.errors import UsageError

Column = Literal["none", "ptune", "deep_ptune", "prefix", "peft prompt"]
COLUMNS: tuple[Column, ...] = ("none", "ptune", "deep_ptune", "prefix", "peft prompt")
P = 3  # prompt tokens
GREEDY: dict[str, Any] = {"do_sample": False}


@dataclass
class Case:
    """One column of the table: a distributed model, and what it must equal."""

    column: Column
    model: Any  # the distributed model, wrapped by peft in its column
    bare: Any  # the distributed model itself
    local: Any  # the whole model on this machine, wrapped by peft in its column
    whole: Any  # the same, never wrapped
    prompted: Prompted | Prefixed  # the whole model with the column's prompt
    other: Callable[[], Any]  # another distributed model
    assistant: Callable[[], Any]  # a small local model

    @property
    def wrapped(self) -> bool:
        """Whether peft stands around the models."""
        return self.column == "peft prompt"

    @property
    def unprompted(self) -> Prompted:
        """The whole model without any prompt."""
        width = self.whole.get_input_embeddings().weight.shape[1]
        return Prompted(self.whole, torch.zeros(0, width))

    @property
    def own(self) -> Prompted | Prefixed:
        """What the distributed model itself equals, without what stands around it."""
        return self.unprompted if self.wrapped else self.prompted

    def logits(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits at the user's tokens."""
        return self.users(self.model(input_ids=ids, **options).logits)

    def users(self, logits: Tensor) -> Tensor:
        """Without the prompt's positions, which peft keeps."""
        return logits[:, P:] if self.wrapped else logits

    def generate(self, ids: Tensor, **options: Any) -> Any:
        """By the distributed model."""
        return self.model.generate(input_ids=ids, **options)

    def expected(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        """What `generate` must give."""
        if self.column in ("none", "peft prompt"):
            more = {} if mask is None else {"attention_mask": mask}
            return self.local.generate(input_ids=ids, **more, **options)
        return self.prompted.generate(ids, mask, **options)


Outcome = tuple[Any, Any]


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    section: str
    name: str
    run: Callable[[Case], Outcome]
    refused: Mapping[str, str]  # column to the sentence's beginning; "" stands for all columns
    note: str  # for the document
    error: type[Exception]  # of the refusal; where it is no error of ours, another library says the sentence
    every_family: bool  # families differ here, so that every run of the tests tries several
    needs: str | None  # a library that the row is tried with where it is installed

    def sentence(self, column: str) -> str | None:
        """What is said in this column, None where the result is equal."""
        return self.refused.get(column, self.refused.get(""))


WAYS: list[Way] = []


def way(
    section: str,
    name: str,
    *,
    refused: str | Mapping[str, str] | None = None,
    note: str = "",
    error: type[Exception] = UsageError,
    every_family: bool = False,
    needs: str | None = None,
) -> Callable[[Callable[[Case], Outcome]], Callable[[Case], Outcome]]:
    """Adds a row."""
    sentences = {"": refused} if isinstance(refused, str) else dict(refused or {})

    def add(run: Callable[[Case], Outcome]) -> Callable[[Case], Outcome]:
        WAYS.append(Way(section, name, run, sentences, note, error, every_family, needs))
        return run

    return add


def padded(side: str) -> tuple[Tensor, Tensor]:
    """A batch of three rows, and a mask that hides four tokens of one."""
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    return ids, mask


def real(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of the tokens that are no padding."""
    return logits[mask.bool()]


def rows_alone(case: Case, ids: Sequence[Tensor], count: int) -> list[Tensor]:
    """What each row's own conversation, int64 [1, n], is answered by itself."""
    return [case.prompted.greedy(one, count)[:, one.shape[1] :] for one in ids]


PEFT_SESSION = "Another library has put a prompt in front of this session's tokens"
PEFT_CUTS = {"peft prompt": "Generation goes on with"}
OWN_CACHE = "A distributed model keeps its attention cache"
