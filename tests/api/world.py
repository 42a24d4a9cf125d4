"""An API over an in-memory swarm of a tiny model, on a loopback socket, with the local model beside it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from openai import AsyncOpenAI, OpenAI
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.e2e.processes import environment
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from tests.tuning.tiny_setup import prompt_for
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from corolla.api.access import Keys
from corolla.api.app import Api, create_app
from corolla.api.generation import Generator
from corolla.api.partners import Partners
from corolla.api.serving import SEND_SECONDS, listening, serve, url_of
from corolla.api.sessions import SessionPool
from corolla.api.starting import Starter
from corolla.client.model.loading import load_tokenizer
from corolla.data.render import RenderSettings
from corolla.models.prompts import KeyValuePrefix, Prompt
from corolla.tuning.bundle import Bundle, ModelInfo, save_bundle

BASE = "tiny"
SPANS = ((0, 2), (2, 4))
# With tools, in the way of many models.
TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</s>\n{% endif %}"
    "{% for message in messages %}<|{{ 'user' if message.role == 'tool' else message.role }}|>"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}{% if not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{% else %}{{ message.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny checkpoint with a byte tokenizer and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    write_tiny(family, folder, vocab_size=VOCABULARY, max_position_embeddings=1024, **changes)
    tokenizer.save_pretrained(folder)
    return folder


def write_bundle(
    folder: Path, model: Path, identity: str, *, mode: str = "ptune", seed: int = 1, style: str = "template"
) -> Prompt:
    """A bundle whose prompt says something."""
    local = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    prompt: Prompt
    if mode == "prefix":
        config = local.config
        width = 2 * config.num_key_value_heads * config.head_dim
        prompt = KeyValuePrefix(torch.randn(config.num_hidden_layers, 5, width, generator=generator) / 2)
    else:
        prompt = soft = prompt_for(local, mode)
        soft.input.data.normal_(0, 0.3, generator=generator)
    bundle = Bundle(
        ModelInfo(BASE, identity),
        prompt.mode,
        prompt.length,
        RenderSettings(style=style),
        {},
        {},
        {},
        {"temperature": 0.0},
    )
    save_bundle(
        folder, bundle, prompt, config=AutoConfig.from_pretrained(model), history=[{"step": 1, "loss": 2.0}]
    )
    return prompt


@dataclass
class Served:
    """An API that runs somewhere, and the local model that it must equal."""

    url: str
    folder: Path  # the checkpoint
    local: Any
    tokenizer: Any
    clients: dict[str, OpenAI] = field(default_factory=dict, kw_only=True)

    def client(self, api_key: str = "none") -> OpenAI:
        """OpenAI's own; closed with the world."""
        if api_key not in self.clients:
            self.clients[api_key] = OpenAI(
                base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60
            )
        return self.clients[api_key]

    def close(self) -> None:
        """End the clients."""
        for client in self.clients.values():
            client.close()

    def async_client(self) -> AsyncOpenAI:
        """The same, asynchronous."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def address(self) -> tuple[str, int]:
        """Of the socket."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def prompt(self, messages: Sequence[Any], **options: Any) -> list[int]:
        """What the tokenizer's template makes of messages."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **options
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], most: int, model: Any = None) -> list[int]:
        """What the local model's own `generate` gives, its end included."""
        found = (model or self.local).generate(
            torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=most,
            do_sample=False,
        )
        said: list[int] = found[0, len(ids) :].tolist()
        return said

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @abstractmethod
    def counted(self) -> int:
        """Rows × tokens that the server has computed which has computed the most."""


@dataclass
class World(Served):
    """A running API in this process."""

    swarm: MemorySwarm
    bundles: Path
    api: Api
    running: Running

    def counted(self) -> int:
        """Rows × tokens that the first server has computed."""
        return max(self.swarm.counted().values())


def local_of(folder: Path) -> tuple[Any, Any]:
    """The local model, and the tokenizer."""
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return local, AutoTokenizer.from_pretrained(folder)


class Running:
    """A server of `api` on a thread, until `close()`."""

    def __init__(self, api: Api, send_buffer: int | None = None, send_seconds: float = SEND_SECONDS) -> None:
        """`send_buffer`: bytes that the system holds of an answer which is not read; `send_seconds`: see `serve`."""
        self._send_seconds = send_seconds
        self.listener: socket.socket = listening("127.0.0.1", 0)
        if send_buffer is not None:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.url = url_of(self.listener)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(api)), name="api-test")
        self._thread.start()
        assert self._ready.wait(30)

    async def _main(self, api: Api) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        serving = serve(
            create_app(api),
            self.listener,
            self._stop,
            ready=self._ready.set,
            stopping=api.drain,
            send_seconds=self._send_seconds,
        )
        self._serving = asyncio.ensure_future(serving)
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving

    def stop(self) -> None:
        """Tell it to end."""
        self._loop.call_soon_threadsafe(self._stop.set)

    def stop_at_once(self) -> None:
        """As a second Ctrl-C does."""
        self._loop.call_soon_threadsafe(self._serving.cancel)

    def wait(self) -> None:
        """Until it has ended."""
        self._thread.join(60)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """End it."""
        if self._thread.is_alive():
            self.stop()
        self.wait()
        self.listener.close()


class Worlds:
    """Makes worlds over one checkpoint, and ends them."""

    def __init__(self, root: Path, family: str = "llama") -> None:
        self.root = root
        self.folder = write_model(root / "model", family)
        self.local, self.tokenizer = local_of(self.folder)
        self._ends: list[Any] = []

    def make(
        self,
        name: str = "world",
        *,
        keys: Keys | None = None,
        spans: Sequence[tuple[int, int]] = SPANS,
        most: int = 64,
        most_bytes: int = 2**28,
        at_once: int = 32,
        waiting: int = 64,
        limits: dict[str, Any] | None = None,
        patience: float = 20.0,
        send_buffer: int | None = None,
        send_seconds: float = SEND_SECONDS,
        tune: Sequence[str] | None = None,
    ) -> World:
        """A swarm and an API over it; `tune` is the command by which its page starts runs."""
        bundles = self.root / name
        bundles.mkdir()
        swarm = MemorySwarm(self.folder, spans)
        self._ends.append(swarm)
        pool = SessionPool(most=most, most_bytes=most_bytes)
        partners = Partners(
            BASE,
            swarm.model(patience=patience),
            load_tokenizer(self.folder),
            identity=swarm.checkpoint.identity,
            folder=bundles,
            gone=pool.forget,
        )
        generator = Generator(pool, at_once=at_once, waiting=waiting)
        starter = None
        if tune is not None:
            starter = Starter(bundles, tune, partners.base, environment=environment())
        api = Api(partners, generator, keys or Keys({}), starter=starter, limits=limits or {})
        running = Running(api, send_buffer, send_seconds)
        self._ends.append(running)
        world = World(running.url, self.folder, self.local, self.tokenizer, swarm, bundles, api, running)
        self._ends.append(world)
        return world

    def close(self) -> None:
        """End all."""
        for one in reversed(self._ends):
            one.close()
