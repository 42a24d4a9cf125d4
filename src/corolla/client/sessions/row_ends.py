"""Where the rows of a batch end in a `generate` call, which fills up those that end before the others.

Invariant: what is noted is what `generate` itself went by, whatever it was that ended a row: an end token, a
string, a criterion of the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList


class RowEnds:
    """What one call of `generate` says of its rows."""

    def __init__(self) -> None:
        self._ends: Tensor | None = None  # int64 [R], 0 for a row that goes on
        self._end_tokens: Tensor | None = None  # for beams, whose hypotheses end by these alone
        # What `generate` goes by of the tokens that it was given, [R, N] with a row for each beam; None: no padding.
        self.given_mask: Tensor | None = None

    def watch(self, criteria: StoppingCriteriaList, config: GenerationConfig) -> StoppingCriteriaList:
        """The same criteria, watched."""
        if config.num_beams == 1:
            return _Watched(criteria, self)
        self._end_tokens = getattr(config, "_eos_token_tensor", None)
        return criteria

    def note(self, done: Tensor, length: int) -> None:
        """Rows that are `done`, bool [R], have ended with that many tokens, unless they had ended before."""
        ends = torch.zeros_like(done, dtype=torch.long) if self._ends is None else self._ends
        self._ends = torch.where((ends == 0) & done, length, ends)

    def mask_of(self, sequences: Tensor, given: int, columns: int) -> Tensor | None:
        """The padding mask int64 [R, columns + n - given] of a call's result [R, n]; None where no token is padding.

        It was given `columns` tokens a row, and the first `given` ones of the result are among them.
        """
        said, before = self.real(sequences, given), self.given_mask
        if bool(said.all()) and (before is None or bool(before.all())):
            return None
        rows = said.shape[0]
        whole = torch.ones(rows, columns, dtype=torch.int64)
        if before is not None:  # of several beams, or samples, all have their row's
            whole[:] = before.cpu()[torch.arange(rows) * before.shape[0] // rows]
        return torch.cat([whole, said.to("cpu", torch.int64)], 1)

    def real(self, sequences: Tensor, given: int) -> Tensor:
        """Which of the tokens behind the first `given` ones of [R, n] are no padding, bool [R, n - given]."""
        said = sequences[:, given:]
        if self._ends is not None and len(self._ends) == len(said):
            places = torch.arange(given, sequences.shape[1], device=said.device)
            ends = self._ends.to(said.device)[:, None]
            return (ends == 0) | (places < ends)
        if self._end_tokens is None:
            return torch.ones_like(said, dtype=torch.bool)
        ended = torch.isin(said, self._end_tokens.to(said.device)).long()
        return (ended.cumsum(1) - ended) == 0


class _Watched(StoppingCriteriaList):  # type: ignore[misc]
    """Criteria that say what they find to a `RowEnds` as well."""

    def __init__(self, criteria: StoppingCriteriaList, ends: RowEnds) -> None:
        super().__init__(criteria)
        self._ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._ends.note(done, int(input_ids.shape[1]))
        return done
