"""Multi-head latent attention in pages: what is kept of a token is its latent and its rotary part, not what the heads
make of them (DeepSeek-V2, arXiv:2405.04434).

Families whose attention keeps these have a method `expand_kv(latent, rotary)` that makes keys and values of them. It
is linear in both, so few new tokens attend in the absorbed form: their queries are brought to the latents once,
instead of all latents to the heads. Many new tokens attend to what the family's own method makes of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from corolla.models.attention.prefixes import KeyValueForm
from corolla.models.kernels.linear import NarrowLinear
from corolla.models.kernels.narrow import as_it_is, narrow_form

Keep = Callable[[int, Tensor, Tensor], None]
# Numbers that are made of a sequence's latents at once; beyond, only the absorbed form is used.
MOST_EXPANDED = 2**28


def expanding(blocks: nn.Module) -> list[Any]:
    """The modules of attention of this kind within these blocks."""
    return [one for one in blocks.modules() if callable(getattr(one, "expand_kv", None))]


def latent_blocks(blocks: nn.Module) -> frozenset[int]:
    """The indices of the blocks that have such attention."""
    return frozenset(int(one.layer_idx) for one in expanding(blocks))


def expanded_width(blocks: nn.Module, form: KeyValueForm, like: Tensor) -> int:
    """Numbers that one block makes of a token's latents at once, of a `form` and as `like`; 0 where it keeps none."""
    for one in expanding(blocks)[:1]:
        made = one.expand_kv(like.new_zeros(1, 1, 1, form.key_dim), like.new_zeros(1, 1, 1, form.value_dim))
        # The keys twice: without and with their rotary part.
        return 2 * int(made[0].numel()) + int(made[1].numel())
    return 0


class LatentPages(Cache):  # type: ignore[misc]
    """What the family's code takes for its cache in a packed pass: gives `keep` the new latents, and is empty else."""

    is_compileable = False
    is_sliding = (False,)
    is_linear = (False,)

    def __init__(self, blocks: frozenset[int], keep: Keep) -> None:
        super().__init__(layers=[])
        self._blocks = blocks
        self._keep = keep

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New latents [1, 1, N, L] and rotary parts [1, 1, N, E]; or keys and values, of which nothing is kept."""
        if layer_idx in self._blocks:
            self._keep(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


@dataclass(frozen=True)
class Absorbed:
    """What `expand_kv` does, as matrices."""

    # [heads, L + E, D]; or [heads, L, D - E], where the rotary part is the end of each head's key.
    keys: Tensor
    values: Tensor  # [heads, L, D']
    rotary: int = 0  # E in the latter case

    def pays(self, count: int, total: int) -> bool:
        """Whether `count` queries over `total` latents are fewer products so than over keys and values, or these would
        be too many."""
        heads, turned, plain = self.keys.shape
        _, latent, value = self.values.shape
        both, key = turned + self.rotary, plain + self.rotary
        if heads * (2 * key + value) * total > MOST_EXPANDED:
            return True
        absorbed = count * (turned * plain + latent * value) + count * total * (both + latent)
        return absorbed <= total * latent * (plain + value) + count * total * (key + value)

    def queries(self, query: Tensor) -> Tensor:
        """[1, heads, T, D] as they meet latents and rotary parts side by side, [1, heads, T, L + E]."""
        plain, turned = torch.split(query, [self.keys.shape[2], self.rotary], dim=-1)
        return torch.cat([torch.matmul(plain, self.keys.transpose(1, 2)), turned], -1)

    @cached_property
    def layers(self) -> tuple[list[NarrowLinear], list[NarrowLinear]]:
        """A frozen layer of each head: for its queries, and for its mixtures."""
        made = [
            [NarrowLinear(narrow_form(one) or as_it_is(one)) for one in matrices.contiguous()]
            for matrices in (self.keys, self.values.transpose(1, 2))
        ]
        return made[0], made[1]

    def outputs(self, mixed: Tensor) -> Tensor:
        """[1, heads, T, D'] of mixtures of latents [1, heads, T, L]."""
        return torch.matmul(mixed, self.values)


_known: WeakKeyDictionary[nn.Module, Absorbed] = WeakKeyDictionary()


def absorbed(attention: Any, latents: Tensor, rotary: Tensor) -> Absorbed:
    """Of a module whose weights do not change, for latents [1, 1, S, L] and rotary parts [1, 1, S, E] like these."""
    known = _known.get(attention)
    if known is None or known.keys.device != latents.device:
        with torch.inference_mode(False), torch.no_grad():  # training may use them too
            width, turned = latents.shape[-1], rotary.shape[-1]
            keys, values = attention.expand_kv(_each(latents), latents.new_zeros(1, 1, width, turned))
            more, _ = attention.expand_kv(latents.new_zeros(1, 1, turned, width), _each(rotary))
            known = _known[attention] = _of_parts(keys[0], more[0], values[0].contiguous())
    return known


def _of_parts(keys: Tensor, more: Tensor, values: Tensor) -> Absorbed:
    """`keys` [heads, L, D] are made of latents, `more` [heads, E, D] of rotary parts."""
    plain, turned = keys.shape[2] - more.shape[1], more.shape[1]
    ends = torch.eye(turned, dtype=more.dtype, device=more.device)
    if (
        not keys[..., plain:].any()
        and not more[..., :plain].any()
        and bool((more[..., plain:] == ends).all())
    ):
        return Absorbed(keys[..., :plain].contiguous(), values, turned)
    return Absorbed(torch.cat([keys, more], 1), values)


def _each(like: Tensor) -> Tensor:
    """Every direction of what is as wide, [1, 1, D, D]."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None, None]
