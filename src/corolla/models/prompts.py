"""The only prompt arithmetic: where soft prompts stand, and what they are added to.

Invariant: a prompt of P tokens stands at positions 0…P-1 of every row, before the row's own tokens and
before its padding; training, prefill and cached decoding all go through the functions below, so the same
prompt means the same thing in each. Prompts are fp32; they are cast to the activations' dtype on use.

A prefix has no tokens: it is what the caches would hold of P tokens at positions 0…P-1, for each block. Those that
come after it stand at P, P+1, …, and are counted from 0 wherever they travel; whoever runs blocks puts it in front.

An adapter has no tokens and no place: it changes linear layers of the blocks (`models/lora.py`).

Soft prompts: Lester et al. 2021 (arXiv:2104.08691), `ptune`. Deep prompts, one for each block: Li and Liang
2021 (arXiv:2101.00190) and Liu et al. 2021 (arXiv:2110.07602), in the additive form of Petals, `deep_ptune`.
Prefixes: keys and values themselves, as Li and Liang's without its projection; with a frozen first token and started
from a text's caches as in Eyuboglu et al. 2025 (arXiv:2506.06266), `prefix`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from corolla.errors import UsageError

# Sees, and may replace, what a block is called with.
BlockHook = Callable[[nn.Module, tuple[Any, ...]], Any]


GIVEN = ("prompts", "prefix", "lora")  # what blocks may be given, by the names of its tensors


class BlockVectors:
    """What each block is given besides hidden states: fp32 `values` [blocks, P, D], and as which tensor they travel.

    `prompts` are added to the hidden states of positions 0…P-1 (D is the blocks' width); a `prefix` is the keys and
    values of P tokens before those that are sent: first the keys of all heads, then the values. Of `lora` P is the
    rank, and D what `models/lora.py` says of the layers called `targets`.
    """

    def __init__(
        self,
        *parts: Tensor,
        name: Literal["prompts", "prefix", "lora"] = "prompts",
        targets: tuple[str, ...] = (),
        scale: Tensor | None = None,
    ) -> None:
        """`parts` lie one behind the other along P, and are multiplied by a `scale`; they are joined when somebody
        needs them, which few steps do."""
        self._parts, self.name, self._targets, self._scale = parts, name, targets, scale

    @cached_property
    def values(self) -> Tensor:
        """[blocks, P, D], differentiable in the parts."""
        joined = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)
        return joined if self._scale is None else joined * self._scale

    @property
    def requires_grad(self) -> bool:
        """Whether somebody trains them."""
        return any(part.requires_grad for part in self._parts)

    @property
    def kept_by_servers(self) -> bool:
        """Whether servers keep them by their digest, so that they travel once."""
        return self.name != "prompts"

    @property
    def prefix_length(self) -> int:
        """How many positions come before the first token that is sent."""
        return sum(int(part.shape[1]) for part in self._parts) if self.name == "prefix" else 0

    @cached_property
    def digest(self) -> str:
        """By what name a client and a server know the same vectors, 64 hexadecimal digits."""
        return _digest([self.values], " ".join((self.name, *self._targets)))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """What `of` gives, by name."""
        return (self.name, "targets") if self._targets else (self.name,)

    def of(self, start: int, end: int) -> dict[str, Tensor]:
        """What blocks [start, end) are given, by the names of the tensors that travel."""
        beside = {"targets": as_tensor(self._targets)} if self._targets else {}
        return {self.name: self.values[start:end]} | beside

    def detached(self) -> BlockVectors:
        """The same on the CPU, which nobody trains."""
        return BlockVectors(self.values.detach().float().cpu(), name=self.name, targets=self._targets)

    def kept(self) -> BlockVectors:
        """A copy of that."""
        return BlockVectors(self.detached().values.clone(), name=self.name, targets=self._targets)

    def same(self, other: BlockVectors | None) -> bool:
        """Whether the other is the same in every number."""
        return self is other or (
            other is not None
            and (self.name, self._targets) == (other.name, other._targets)
            and torch.equal(self.values, other.values)
        )


def as_tensor(names: Sequence[str]) -> Tensor:
    """Names of layers as they travel: UTF-8, uint8 [C], a line each."""
    return torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)


class _Trained(nn.Module):
    """What is trained of a model; moves with it, but is never narrower than fp32: small steps would be lost."""

    _snapshot: BlockVectors | None = None

    @property
    def blocks(self) -> BlockVectors | None:
        """What each block is given."""
        raise NotImplementedError

    def snapshot(self) -> BlockVectors | None:
        """The same as it is now, for sessions, which keep what they began with.

        One object for as long as no number changes, which its digest is worth.
        """
        now = None if self.blocks is None else self.blocks.detached()
        if now is not None and not now.same(self._snapshot):
            self._snapshot = now.kept()
        return None if now is None else self._snapshot

    def _apply(self, fn: Any, recurse: bool = True) -> Self:

        def kept(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            narrow = moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call,no-any-return]


class SoftPrompt(_Trained):
    """The trainable parameters: `input` [P, H] and, for deep prompts, `deep` [blocks, P, H]; fp32."""

    input: nn.Parameter
    deep: nn.Parameter | None

    def __init__(self, input_vectors: Tensor, deep_blocks: int = 0, deep_size: int | None = None) -> None:
        """Start from `input_vectors` [P, H]; deep prompts start at zero, which changes nothing.

        `deep_size` is the blocks' width where a family's embeddings are narrower (opt-350m).
        """
        super().__init__()
        self.input = nn.Parameter(input_vectors.detach().float().clone())
        if deep_blocks:
            length, hidden = input_vectors.shape
            self.deep = nn.Parameter(
                torch.zeros(deep_blocks, length, deep_size or hidden, dtype=torch.float32)
            )
        else:
            self.register_parameter("deep", None)

    @property
    def length(self) -> int:
        """P, the number of prompt positions."""
        return int(self.input.shape[0])

    @property
    def mode(self) -> str:
        """`ptune` or `deep_ptune`."""
        return "ptune" if self.deep is None else "deep_ptune"

    @property
    def blocks(self) -> BlockVectors | None:
        """What each block is given of it."""
        return None if self.deep is None else BlockVectors(self.deep)


class KeyValuePrefix(_Trained):
    """The trainable parameters of `prefix`: `trained` [blocks, P-F, D], behind the first F tokens, which are `frozen`.

    Of each block and position the keys of all heads and then the values, fp32, as the attention cache holds them
    (keys after rotary positions).
    """

    trained: nn.Parameter
    frozen: Tensor
    mode = "prefix"
    input = None  # nothing is put before the embeddings

    def __init__(self, values: Tensor, frozen: int = 1) -> None:
        """Start from `values` [blocks, P, D]. Raises `UsageError` when nothing is left to train."""
        super().__init__()
        if not 0 <= frozen < values.shape[1]:
            raise UsageError(
                f"A prefix of {values.shape[1]} tokens whose first {frozen} stay as they are has nothing to train: "
                f"give pre_seq_len={frozen + 1} or more."
            )
        values = values.detach().float()
        self.register_buffer("frozen", values[:, :frozen].clone())
        self.trained = nn.Parameter(values[:, frozen:].clone())

    @property
    def length(self) -> int:
        """P, the number of positions."""
        return int(self.frozen.shape[1] + self.trained.shape[1])

    @property
    def values(self) -> Tensor:
        """[blocks, P, D], differentiable in what is trained."""
        return self.blocks.values

    @property
    def blocks(self) -> BlockVectors:
        """What each block is given."""
        return BlockVectors(self.frozen, self.trained, name="prefix")


class LoraAdapter(_Trained):
    """The trainable parameters of `lora`: `trained` [blocks, R, F], the columns of A and Bᵗ of the layers `targets`.

    fp32, laid out as `models/lora.py` says. `scale`, which is broadcast to them, is what they are multiplied by where
    blocks are given them: 1 for A, peft's scaling for B, and 0 where a layer's rank is lower or a block lacks it.
    """

    trained: nn.Parameter
    scale: Tensor
    mode = "lora"
    input = None  # nothing is put before the embeddings
    length = 0

    def __init__(self, values: Tensor, scale: Tensor, targets: tuple[str, ...]) -> None:
        super().__init__()
        self.trained = nn.Parameter(values.detach().float().clone())
        self.register_buffer("scale", scale.detach().float().clone())
        self.targets = targets

    @property
    def rank(self) -> int:
        """R, of the layer that has most."""
        return int(self.trained.shape[1])

    @property
    def blocks(self) -> BlockVectors:
        """What each block is given."""
        return BlockVectors(self.trained, name="lora", targets=self.targets, scale=self.scale)


Prompt = SoftPrompt | KeyValuePrefix | LoraAdapter


def sent_length(prompt: Prompt | None) -> int:
    """How many tokens of it are run through the blocks, before the user's."""
    return prompt.length if isinstance(prompt, SoftPrompt) else 0


def prefix_length(prompt: Prompt | None) -> int:
    """How many positions of it come before all tokens that are run through the blocks."""
    return prompt.length if isinstance(prompt, KeyValuePrefix) else 0


def digest(vectors: Tensor, deep: Tensor | None, dtype: torch.dtype) -> str:
    """By what name a client and a server know the same prompt, 64 hexadecimal digits.

    Equal only for the same numbers (`vectors` [P, H], `deep` [blocks, P, H], fp32) that enter the blocks in the
    same `dtype`.
    """
    return _digest([vectors] if deep is None else [vectors, deep], str(dtype))


def _digest(parts: Sequence[Tensor], kind: str) -> str:
    found = hashlib.sha256(f"{kind} {[list(part.shape) for part in parts]}".encode())
    for part in parts:
        found.update(part.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def prepend(embeddings: Tensor, prompt: Tensor) -> Tensor:
    """[R, T, H] and [P, H] to [R, P+T, H], in the embeddings' dtype."""
    rows = prompt.to(embeddings.dtype).unsqueeze(0).expand(embeddings.shape[0], -1, -1)
    return torch.cat([rows, embeddings], dim=1)


def prepend_mask(mask: Tensor, length: int) -> Tensor:
    """A mask [R, S] for the user's tokens to one [R, P+S] that shows the prompt to every row."""
    return torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)


def prepend_positions(positions: Tensor, length: int) -> Tensor:
    """Position ids [R, T] of the user's tokens to [R, P+T]: the prompt comes first, the rest moves up."""
    own = torch.arange(length, device=positions.device, dtype=positions.dtype)
    return torch.cat([own.expand(positions.shape[0], -1), positions + length], dim=1)


def place_prompt(base: nn.Module, named: dict[str, Any], prompt: Prompt, *, in_front: bool) -> None:
    """Rewrite the base model's arguments for a prompt that comes before the user's first token.

    `in_front`, its vectors are part of this call; otherwise they are cached, or are a prefix, which is as if cached,
    or an adapter of no length.
    """
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if mask is not None:
        named["attention_mask"] = prepend_mask(mask, prompt.length)
    if not in_front or not isinstance(prompt, SoftPrompt):
        if positions is not None:
            named["position_ids"] = positions + prompt.length
        return
    embeddings = named.get("inputs_embeds")
    if embeddings is None:
        embeddings = base.get_input_embeddings()(named["input_ids"])  # type: ignore[operator]
    named["inputs_embeds"] = prepend(embeddings, prompt.input)
    named["input_ids"] = None
    if positions is not None:
        rows = positions.expand(embeddings.shape[0], -1)
        named["position_ids"] = prepend_positions(rows, prompt.length)


_in_front: ContextVar[Tensor | None] = ContextVar("corolla_prompt_in_front", default=None)


def place_prompt_by_ids(named: dict[str, Any], prompt: SoftPrompt, padding: int) -> None:
    """As `place_prompt` in front, for a family that needs token ids: its prompt's are those of padding.

    That is what such families do for images. The vectors take the place of the padding's embeddings where
    `stands_in_front` watches. Raises `UsageError` without ids.
    """
    ids, positions = named.get("input_ids"), named.get("position_ids")
    if ids is None:
        raise UsageError("This model's blocks take inputs made of token ids: with a prompt, give input_ids.")
    if named.get("attention_mask") is not None:
        named["attention_mask"] = prepend_mask(named["attention_mask"], prompt.length)
    named["input_ids"] = torch.cat([ids.new_full((ids.shape[0], prompt.length), padding), ids], dim=1)
    if positions is not None:
        named["position_ids"] = prepend_positions(positions.expand(ids.shape[0], -1), prompt.length)
    _in_front.set(prompt.input)


def stands_in_front(embedding: nn.Module) -> None:
    """Have an embedding give the prompt's vectors for the first tokens of a call that was prepared so."""

    def put(_embedding: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        vectors = _in_front.get()
        return None if vectors is None else prepend(output[:, len(vectors) :], vectors)

    embedding.register_forward_hook(put)


def nothing_in_front() -> None:
    """The call is over."""
    _in_front.set(None)


def add_deep(hidden: Tensor, prompt: Tensor, start: int) -> Tensor:
    """Add one block's prompt [P, H] to those of `hidden` [R, T, H] that stand at positions 0…P-1.

    `start` is the position of `hidden`'s first token (0 in training and prefill, more in cached decoding).
    Differentiable in both; returns `hidden` itself when it lies wholly behind the prompt.
    """
    stop = min(prompt.shape[0], start + hidden.shape[1])
    if start >= stop:
        return hidden
    count = stop - start
    touched = hidden[:, :count] + prompt[start:stop].to(hidden.dtype)
    return torch.cat([touched, hidden[:, count:]], dim=1)


def add_deep_packed(hidden: Tensor, vectors: Tensor, tokens: Tensor) -> Tensor:
    """Add prompt vectors [M, H] of one block to the tokens int64 [M] of packed `hidden` [1, N, H].

    The same sum as `add_deep`'s, where rows do not lie one below the other. Differentiable in both.
    """
    added = vectors.to(hidden.dtype).expand(hidden.shape[0], -1, -1)
    return hidden.index_add(1, tokens, added)


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


def packed_hooks(deep: DeepRows) -> list[list[BlockHook]]:
    """For `BlocksPass`: what a packed pass with deep prompts does before each block."""

    def adder(vectors: Tensor) -> BlockHook:
        return lambda _block, args: (add_deep_packed(args[0], vectors, deep.tokens), *args[1:])

    return [[adder(vectors)] for vectors in deep.vectors]


def initial_ids(length: int, token_ids: Tensor | None, *, vocab_size: int, seed: int) -> Tensor:
    """`length` tokens to start a prompt from, int64: a text's, repeated or cut, or sampled without replacement."""
    if token_ids is None:
        generator = torch.Generator().manual_seed(seed)
        token_ids = torch.randperm(vocab_size, generator=generator)[:length]
    repeats = -(-length // token_ids.numel())
    return token_ids.flatten().repeat(repeats)[:length]


def initial_vectors(
    embedding: nn.Module, length: int, *, token_ids: Tensor | None = None, vocab_size: int = 0, seed: int = 0
) -> Tensor:
    """Rows of the model's own embedding to start a prompt from, [length, H], fp32.

    With `token_ids` (a text's), those, repeated or cut to `length`; otherwise tokens sampled from the
    vocabulary without replacement under `seed`.
    """
    chosen = initial_ids(length, token_ids, vocab_size=vocab_size, seed=seed)
    device = next(embedding.parameters()).device
    with torch.no_grad():
        vectors: Tensor = embedding(chosen.to(device))
    return vectors.float()


def random_vectors(length: int, hidden_size: int, *, std: float, seed: int = 0) -> Tensor:
    """Gaussian vectors [length, H] of the embeddings' own scale; N(0, 1) is ~20 times too large."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, hidden_size, generator=generator, dtype=torch.float32) * std
