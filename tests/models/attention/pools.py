"""A pool in which a token that nobody has written is seen in every result."""

from __future__ import annotations

import torch
from torch import Tensor

from corolla.models.attention.pages import PagePool

UNWRITTEN = 1e6  # no NaN: `max(0.0, nan)` is 0.0


class FilledPool(PagePool):
    """Fresh memory often is what an earlier pool of the same test has left there, with the right numbers in it."""

    def _new_store(self, like: Tensor) -> Tensor:
        store = super()._new_store(like)
        with torch.inference_mode(False):
            return store.fill_(UNWRITTEN)
