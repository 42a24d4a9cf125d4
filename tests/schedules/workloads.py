"""What clients do in a schedule, and the same done by the whole model on this machine.

A workload is a list of steps; each gives tensors. The reference knows nothing of swarms: it is the family's own
model in fp64, which computes everything anew at every step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corolla.models.prompts import KeyValuePrefix, Prompt, SoftPrompt
from tests.reference import Prefixed, Prompted, blocks_of, local_model
from tests.tiny_models import VOCABULARY

PROMPT = 3
# Families that compute their states, or some of their norms, in float32, whatever the model's dtype is.
ROUNDED = {
    "qwen3_5_text": 1e-4,
    "gemma3n_text": 1e-6,
    "zamba": 1e-4,
    "zamba2": 1e-4,
    "zaya": 1e-4,
    "deepseek_v4": 1e-4,
}
WORKLOADS = ("greedy", "sampled", "beams", "rollback", "fork", "training")
MODES = (None, "ptune", "deep_ptune", "prefix")
VARIANTS = 6  # of each workload: references are computed once a process


@dataclass(frozen=True)
class Workload:
    """One client's work, wholly determined by these."""

    family: str
    mode: str | None
    kind: str
    variant: int


def ids_of(draw: random.Random, rows: int, length: int) -> Tensor:
    """Token ids [rows, length] without the special ones."""
    return torch.tensor([[draw.randrange(3, 250) for _ in range(length)] for _ in range(rows)])


def prompt_of(work: Workload, config: Any) -> Prompt | None:
    """The prompt that a workload starts from."""
    if work.mode is None:
        return None
    generator = torch.Generator().manual_seed(work.variant)
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    if work.mode == "prefix":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        heads = 1 if getattr(config, "multi_query", False) else heads
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        return KeyValuePrefix(torch.randn(blocks, PROMPT, 2 * heads * head, generator=generator) * 0.5)
    prompt = SoftPrompt(
        torch.randn(PROMPT, hidden, generator=generator) * 0.3,
        blocks if work.mode == "deep_ptune" else 0,
        hidden,
    )
    if prompt.deep is not None:
        prompt.deep.data.normal_(0, 0.3, generator=generator)
    return prompt


def settings_of(how: str) -> dict[str, Any]:
    """Arguments of `generate`."""
    if how == "sampled":
        return {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    return {"do_sample": False, "num_beams": 3 if how == "beams" else 1}


def generated(model: Any, *inputs: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    """What `generate` gives, and the logits [steps, rows, vocabulary] that it chose by, float32."""
    result = model.generate(*inputs, return_dict_in_generate=True, output_logits=True, **settings)
    return result.sequences, torch.stack(result.logits)


class SwarmChat:
    """A chat through a session."""

    def __init__(self, model: Any, session: Any = None) -> None:
        self.model = model
        self.session = session or model.inference_session(max_length=400)
        self.logits = torch.empty(0)  # of the latest call

    def say(self, ids: Tensor | None, count: int, how: str, seed: int) -> Tensor:
        torch.manual_seed(seed)
        settings = {"session": self.session, "max_new_tokens": count, **settings_of(how)}
        _, self.logits = generated(self.model, ids, **settings)
        return self.session.output_ids.clone()

    def roll_back(self, position: int) -> None:
        self.session.position = position

    def fork(self) -> SwarmChat:
        return SwarmChat(self.model, self.session.fork())

    def close(self) -> None:
        self.session.close()


class LocalChat:
    """The same, computed anew each time by the whole model."""

    def __init__(self, model: Any, prompt: Prompt | None, ids: Tensor | None = None) -> None:
        self.model, self.prompt, self.ids = model, prompt, ids
        self.logits = torch.empty(0)

    def say(self, ids: Tensor | None, count: int, how: str, seed: int) -> Tensor:
        torch.manual_seed(seed)
        parts = [part for part in (self.ids, ids) if part is not None]
        begun = torch.cat(parts, 1)
        settings = {"max_new_tokens": count, **settings_of(how)}
        if self.prompt is None:
            mask = torch.ones_like(begun)
            self.ids, self.logits = generated(self.model, begun, attention_mask=mask, **settings)
        else:
            self.ids = torch.cat([begun, self._prompted(begun, settings)], 1)
        return self.ids

    def _prompted(self, ids: Tensor, settings: dict[str, Any]) -> Tensor:
        assert self.prompt is not None
        if isinstance(self.prompt, KeyValuePrefix):
            values = self.prompt.values.to(torch.float64)
            settings |= {"return_dict_in_generate": True, "output_logits": True}
            answer = Prefixed(self.model, values).generate(ids, **settings)
            self.logits = torch.stack(answer.logits)
            return answer.sequences[:, ids.shape[1] :]
        embedded = self.model.get_input_embeddings()(ids)
        front = self.prompt.input.detach().to(embedded.dtype).expand(ids.shape[0], -1, -1)
        whole = torch.cat([front, embedded], 1)
        handles = [] if self.prompt.deep is None else self._hook(self.prompt.deep.detach())
        try:
            mask = torch.ones(whole.shape[:2], dtype=torch.long)
            new, self.logits = generated(self.model, inputs_embeds=whole, attention_mask=mask, **settings)
            return new
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, deep: Tensor) -> list[Any]:
        def adder(vector: Tensor) -> Any:
            def add(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if hidden.shape[1] > PROMPT:  # the whole beginning; later tokens come one by one
                    padding = (0, 0, 0, hidden.shape[1] - PROMPT)
                    hidden = hidden + F.pad(vector.to(hidden.dtype), padding)
                return (hidden, *args[1:]), kwargs

            return add

        return [
            block.register_forward_pre_hook(adder(vector), with_kwargs=True)
            for block, vector in zip(blocks_of(self.model), deep, strict=True)
        ]

    def roll_back(self, position: int) -> None:
        assert self.ids is not None
        self.ids = self.ids[:, :position] if position else None

    def fork(self) -> LocalChat:
        return LocalChat(self.model, self.prompt, self.ids)

    def close(self) -> None:
        pass


Chat = SwarmChat | LocalChat


def chatting(chat: Chat, work: Workload) -> Iterator[Tensor]:
    """The steps of a chat; each gives all tokens so far, and the logits that the new ones were chosen by."""
    draw = random.Random(f"{work.kind}-{work.variant}")
    how = work.kind if work.kind in ("sampled", "beams") else draw.choice(["greedy", "sampled"])
    rows = draw.choice([1, 1, 2]) if work.kind != "beams" else 1
    tokens = chat.say(ids_of(draw, rows, draw.randint(3, 9)), draw.randint(3, 6), how, 1)
    yield from (tokens, chat.logits)
    if work.kind == "fork":
        yield from _forked(chat, draw, rows, how)
    for turn in range(draw.randint(1, 3)):
        if work.kind == "rollback":
            chat.roll_back(draw.randint(1, tokens.shape[1] - 1))
            if draw.random() < 0.3:
                tokens = chat.say(None, 2, how, 10 + turn)
                yield from (tokens, chat.logits)
        more = None if draw.random() < 0.2 else ids_of(draw, rows, draw.randint(1, 4))
        tokens = chat.say(more, draw.randint(2, 5), how, 20 + turn)
        yield from (tokens, chat.logits)
    if work.kind == "beams":
        yield from (chat.say(ids_of(draw, rows, 2), 3, "greedy", 30), chat.logits)


def _forked(chat: Chat, draw: random.Random, rows: int, how: str) -> Iterator[Tensor]:
    """Two chats from one beginning; each goes on by itself, in turns."""
    twin = chat.fork()
    for turn in range(2):
        yield from (twin.say(ids_of(draw, rows, 2), 3, how, 40 + turn), twin.logits)
        yield from (chat.say(ids_of(draw, rows, 3), 2, how, 50 + turn), chat.logits)
    twin.close()


def training(model: Any, prompt: Any, loss_of: Any, work: Workload) -> Iterator[Tensor]:
    """Steps of an optimizer; each gives its loss, the last thing is the final prompt (or input gradients)."""
    draw = random.Random(f"{work.kind}-{work.variant}")
    # Deep prompts' gradients travel in float32, so those of several micro-batches are not summed to 1e-9.
    several = (5, 60) if work.mode in ("deep_ptune", "prefix") else (6, 100)
    rows, length = [(2, 12), (3, 20), several][work.variant % 3]
    steps = draw.randint(2, 4) if length < 100 else 2
    if prompt is None:
        for _ in range(steps):
            ids = ids_of(draw, rows, length)
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            loss = F.cross_entropy(
                model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].double().flatten(0, 1),
                ids[:, 1:].flatten(),
            )
            loss.backward()
            yield loss.detach()
            assert embedded.grad is not None
            yield embedded.grad
        return
    parameters = [one for one in prompt if one is not None]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        ids, mask = ids_of(draw, rows, length), torch.ones(rows, length, dtype=torch.long)
        for row in range(1, rows):
            mask[row, length - draw.randrange(0, length // 2) :] = 0
        optimizer.zero_grad()
        loss = loss_of(ids, ids.masked_fill(mask == 0, -100), mask)
        loss.backward()
        optimizer.step()
        yield loss.detach()
    for one in parameters:
        yield one.detach().clone()


def in_the_swarm(model: Any, work: Workload) -> Iterator[Tensor]:
    """The workload done by a distributed model."""
    if work.kind != "training":
        chat = SwarmChat(model)
        yield from chatting(chat, work)
        chat.close()
        return
    prompts = model.prompts

    def loss_of(ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        loss: Tensor = model(ids, attention_mask=mask, labels=labels).loss
        return loss

    own = None if prompts is None else list(prompts.parameters())
    yield from training(model, own, loss_of, work)


@cache
def whole_model(family: str, folder: Path) -> Any:
    """The family's own model on this machine, which never stops early."""
    model = local_model(folder, torch.float64)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return with_experts_in_64_bits(model)


def with_experts_in_64_bits(model: Any) -> Any:
    """The model, whose experts are multiplied in a way that there is in 64 bits."""
    for one in model.modules():
        if getattr(getattr(one, "config", None), "_experts_implementation", None) == "grouped_mm":
            one.config._experts_implementation = "batched_mm"
    return model


@cache
def expected(work: Workload, folder: Path) -> list[Tensor]:
    """What the workload must give."""
    model = whole_model(work.family, folder)
    prompt = prompt_of(work, model.config)
    if work.kind != "training":
        return [tokens.clone() for tokens in chatting(LocalChat(model, prompt), work)]
    if prompt is None:
        return list(training(model, None, None, work))
    if isinstance(prompt, KeyValuePrefix):
        return list(training(model, [prompt.trained], partial(_prefixed_loss, model, prompt), work))
    local = Prompted(model, prompt.input, prompt.deep)

    def loss_of(ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logits = local.logits(ids, mask)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    return list(training(model, (local.vectors, local.deep), loss_of, work))


def _prefixed_loss(model: Any, prompt: KeyValuePrefix, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """With the prompt's first token as it is, and gradients for the others."""
    local = Prefixed(model, prompt.frozen)
    local.values = torch.cat([prompt.frozen, prompt.trained], 1).double()
    logits = local.logits(ids, mask)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def same(found: Tensor, due: Tensor, rounding: float = 0.0) -> bool:
    """Tokens equal, everything else to 1e-9 relative to its size (logits, which `generate` rounds, to 1e-6), or to
    `rounding`."""
    if found.shape != due.shape:
        return False
    if not due.is_floating_point():
        return torch.equal(found, due)
    allowed = 1e-6 if due.dtype == torch.float32 and due.shape[-1] == VOCABULARY else 1e-9
    allowed = max(allowed, rounding)
    return bool((found.double() - due.double()).norm() <= allowed * max(1.0, float(due.double().norm())))
