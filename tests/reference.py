"""Local Hugging Face models with prompts, written without any of Corolla's prompt arithmetic.

What the swarm gives is compared with these; so they stay as plain as possible.
"""

from __future__ import annotations

from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteriaList

from corolla.models.cache import cache_argument

TIE = 1e-4
BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")


def local_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model, frozen, on this machine."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def blocks_of(model: Any) -> Any:
    """The model's list of blocks."""
    for path in BLOCKS:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(f"no blocks in {type(model).__name__}")


def with_old_names(model: Any) -> Any:
    """The whole model, so that peft finds its cache: else it puts its prompt in front of every token anew."""
    prepare = model.prepare_inputs_for_generation

    @wraps(prepare)
    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        return {"past_key_values" if name == "cache" else name: prepared[name] for name in prepared}

    model.prepare_inputs_for_generation = prepare_inputs
    return model


class Prompted:
    """A local model with vectors before the embeddings and, per block, added to the first positions."""

    def __init__(self, model: Any, vectors: Tensor, deep: Tensor | None = None) -> None:
        self.model = model
        self.vectors = vectors.detach().clone().requires_grad_()
        self.deep = None if deep is None else deep.detach().clone().requires_grad_()

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [R, T, V] at the user's tokens."""
        rows, length = ids.shape[0], self.vectors.shape[0]
        embedded = self.model.get_input_embeddings()(ids)
        front = self.vectors.to(embedded.dtype).expand(rows, -1, -1)
        mask = torch.ones_like(ids) if mask is None else mask
        whole_mask = F.pad(mask, (length, 0), value=1)
        handles = [] if self.deep is None else self._hook(length)
        try:
            whole = torch.cat([front, embedded], 1)
            output = self.model(inputs_embeds=whole, attention_mask=whole_mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return output.logits[:, length:]

    def _hook(self, length: int) -> list[Any]:
        def adder(vector: Tensor) -> Any:
            def add(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if hidden.shape[1] < length:  # a later token, over what is cached
                    return (hidden, *args[1:]), kwargs
                pad = hidden.shape[1] - length
                added = hidden + F.pad(vector.to(hidden.dtype), (0, 0, 0, pad))
                return (added, *args[1:]), kwargs

            return add

        assert self.deep is not None
        return [
            block.register_forward_pre_hook(adder(vector), with_kwargs=True)
            for block, vector in zip(blocks_of(self.model), self.deep, strict=True)
        ]

    def generate(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        """As the model's own, with the prompt in front."""
        embedded = self.model.get_input_embeddings()(ids)
        front = self.vectors.detach().to(embedded.dtype).expand(ids.shape[0], -1, -1)
        mask = torch.ones_like(ids) if mask is None else mask
        handles = [] if self.deep is None else self._hook(self.vectors.shape[0])
        try:
            return self.model.generate(
                ids,
                inputs_embeds=torch.cat([front, embedded], 1),
                attention_mask=F.pad(mask, (self.vectors.shape[0], 0), value=1),
                **options,
            )
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross entropy of the next tokens."""
        logits = self.logits(ids, mask)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    @torch.no_grad()
    def assert_greedy(self, found: Tensor, start: int, mask: Tensor | None = None) -> None:
        """Every token of `found` [R, n] from `start` on is this model's best after those before it.

        In fp32 a row computed in another arrangement differs by up to 3e-5: where the two best logits are
        within 1e-4, either is right. Such cases are shown.
        """
        logits = self.logits(found, mask)[:, start - 1 : -1]
        chosen = logits.gather(2, found[:, start:, None])[..., 0]
        behind = logits.max(-1).values - chosen
        ties = int(((behind > 0) & (behind <= TIE)).sum())
        if ties:
            print(f"{ties} of {chosen.numel()} tokens are one of two best within {TIE}")
        assert float(behind.max()) <= TIE, f"a token is {float(behind.max())} behind the best"

    @torch.no_grad()
    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """`ids` [R, T] and `count` more tokens, all computed anew for every token."""
        for _ in range(count):
            ids = torch.cat([ids, self.logits(ids)[:, -1:].argmax(-1)], 1)
        return ids


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference over the norm of what was expected."""
    assert found is not None
    assert expected is not None
    assert float(expected.norm()) > 0
    return float((found - expected).norm() / expected.norm())


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [rows, length] without the special ones."""
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


class Prefixed:
    """A local model whose cache holds a prefix before its first token; plainly written."""

    def __init__(self, model: Any, values: Tensor) -> None:
        self.model = model
        self.values = values.detach().clone().requires_grad_()  # [blocks, P, keys and then values]

    def cache(self, rows: int) -> DynamicCache:
        shapes = self._shapes
        cache = DynamicCache(config=self.model.config)
        for index, own in enumerate(self.values):
            sides = own.split([heads * dim for heads, dim in shapes], dim=1)
            keys, values = (
                side.view(1, -1, *shape).transpose(1, 2).expand(rows, -1, -1, -1)
                for side, shape in zip(sides, shapes, strict=True)
            )
            cache.update(keys, values, index)
        return cache

    @cached_property
    def _shapes(self) -> list[tuple[int, int]]:
        """Heads and their width, of what is cached as keys and as values."""
        with torch.no_grad():
            layer = self.model(torch.tensor([[5]]), use_cache=True).past_key_values.layers[0]
        return [(one.shape[1], one.shape[3]) for one in (layer.keys, layer.values)]

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        whole = F.pad(mask, (self.values.shape[1], 0), value=1)
        name = cache_argument(self.model.forward)
        arguments = {name: self.cache(ids.shape[0]), "use_cache": True}
        return self.model(ids, attention_mask=whole, **arguments).logits

    def loss(self, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = self.logits(ids, mask)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    def generate(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        """As the model's own, which has the prefix cached; what is said carries no place for it."""
        length, copies = self.values.shape[1], options.get("num_beams", 1)
        if options.get("do_sample"):
            copies = max(copies, options.get("num_return_sequences", 1))
        options.pop("use_cache", None)  # without a cache there is no prefix
        criteria = options.pop("stopping_criteria", None)
        if criteria is not None:
            options["stopping_criteria"] = StoppingCriteriaList(
                [lambda ids, scores, **more: criteria(ids[:, length:], scores, **more)]
            )
        mask = torch.ones_like(ids) if mask is None else mask
        with torch.no_grad():
            found = self.model.generate(
                F.pad(ids, (length, 0)),
                attention_mask=F.pad(mask, (length, 0), value=1),
                **{cache_argument(self.model.forward): self.cache(len(ids) * copies)},
                **options,
            )
        if not isinstance(found, Tensor):
            found.sequences = found.sequences[:, length:]
            return found
        return found[:, length:]

    @torch.no_grad()
    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """The likeliest tokens, each after a pass over all before it."""
        for _ in range(count):
            best = self.logits(ids)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
        return ids
