"""A swarm of real servers that can be hurt: signals and restarts."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tests.client.conftest import random_ids
from tests.e2e.links import Link
from tests.e2e.processes import Process, Processes
from tests.reference import Prompted, local_model, relative
from torch import Tensor

import corolla as public

Fault = Callable[[], object]
Used = Callable[[int], str]  # which peer runs a block


class RealSwarm:
    """A bootstrap peer and servers with identity files, so that they can come back as who they were."""

    def __init__(self, started: Processes, model: Path | str) -> None:
        self._started = started
        self._model = str(model)
        self._identities: dict[str, Path] = {}
        self.links: dict[str, Link] = {}  # by peer id; of the servers that have one
        self.servers: dict[str, Process] = {}  # by peer id; the newest process of each
        self.bootstrap = started.start("bootstrap", "bootstrap").wait_ready()

    def serve(
        self,
        *spans: str,
        link: Callable[[], Link] | None = None,
        extra: Sequence[str] = (),
        launcher: Sequence[str] | None = None,
    ) -> list[str]:
        """Start servers together and wait for them; their peer ids. With `link` each is reached over one."""
        begun = []
        for span in spans:
            identity = self._started.folder / f"identity-{len(self._started.started)}"
            line = None if link is None else link()
            through = () if line is None else ("--announce", f"127.0.0.1:{line.port}")
            begun.append((self._start(span, identity, *through, *extra, launcher=launcher), identity, line))
        peers = []
        for process, identity, line in begun:
            peer = str(process.wait_ready().about["peer_id"])
            self.servers[peer], self._identities[peer] = process, identity
            if line is not None:
                line.leads_to(self.daemon(peer))
                self.links[peer] = line
            peers.append(peer)
        return peers

    def come_back(self, peer: str, span: str) -> None:
        """Start a dead server again under its id, without waiting until it is ready."""
        self.servers[peer] = self._start(span, self._identities[peer])

    def _start(
        self, span: str, identity: Path, *extra: str, launcher: Sequence[str] | None = None
    ) -> Process:
        arguments = ["serve", self._model, "--peers", self.bootstrap.address, "--blocks", span]
        arguments += ["--identity", str(identity), "--threads", "1", "--dtype", "float32", *extra]
        name = f"server-{len(self._started.started)}"
        return self._started.start(name, *arguments, launcher=launcher)

    def about(self, peer: str) -> dict[str, Any]:
        """What a server said of itself when it was ready."""
        return self.servers[peer].about

    def send(self, peer: str, number: signal.Signals) -> None:
        """A signal to a server's own process, not to its network daemon."""
        self.servers[peer].popen.send_signal(number)

    def kill(self, peer: str) -> None:
        """SIGKILL, and wait until the process is gone, so that another may take its identity."""
        daemon = self.daemon(peer)
        self.send(peer, signal.SIGKILL)
        self.servers[peer].popen.wait(10)
        psutil.wait_procs([daemon], timeout=10)

    def daemon(self, peer: str) -> psutil.Process:
        """A server's network daemon: stopped, it is a link that stalls, killed, one that is cut."""
        children = psutil.Process(self.servers[peer].popen.pid).children(recursive=True)
        (daemon,) = [child for child in children if child.name() == "p2pd"]
        return daemon

    def load(self, **arguments: Any) -> Any:
        """A client's model."""
        loaded = public.AutoDistributedModelForCausalLM.from_pretrained(
            self._model, initial_peers=[self.bootstrap.address], dtype=torch.float32, **arguments
        )
        loaded.generation_config.eos_token_id = None
        loaded.generation_config.pad_token_id = 0
        return loaded


class Client:
    """A model of the swarm and the local one that it must equal, whatever happens on the way."""

    def __init__(self, model: Any, source: Path | str, *, seed: int = 1) -> None:
        self.model = model
        local = local_model(source)
        if model.prompts is None:
            self.local = Prompted(local, torch.zeros(0, local.config.hidden_size))
            return
        if model.prompts.deep is not None:
            model.prompts.deep.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        self.local = Prompted(local, model.prompts.input, model.prompts.deep)

    def used(self, block: int) -> str:
        """The peer that now runs a block for this client."""
        connection = self.model.blocks.connection
        route = connection.run(connection.view.route(0, self.model.config.num_hidden_layers))
        return next(str(hop.peer_id) for hop in route if hop.start <= block < hop.end)

    def chat(self, fault: Callable[[Used], object], *, sample: bool, seed: int = 0, length: int = 9) -> float:
        """Talk, and call `fault` in the middle with a function that says who runs a block in this session.

        Tokens before, around and after it are those of the undisturbed local model. Gives the seconds that
        the token after the fault took.
        """
        ids, at, count = random_ids(1, length, seed=seed), 5, 12
        back = length + 3
        moments: list[float] = []

        def processor(_ids: Tensor, scores: Tensor) -> Tensor:
            moments.append(time.monotonic())
            if len(moments) == at:
                fault(used)
                moments[-1] = time.monotonic()
            return scores

        def used(block: int) -> str:
            return next(hop.peer_id for hop in session.hops if hop.start <= block < hop.end)

        how: dict[str, Any] = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        torch.manual_seed(seed)
        with self.model.inference_session(max_length=length + 50) as session:
            found = self.model.generate(
                ids, max_new_tokens=count, session=session, logits_processor=[processor], **how
            )
            more = self.model.generate(None, max_new_tokens=3, session=session, **how)
            session.position = back  # a rollback right after it
            again = self.model.generate(None, max_new_tokens=3, session=session, do_sample=False)
        whole = torch.cat([found, more], 1)
        if sample:
            assert whole.tolist() == self._sampled(ids, count + 3, seed).tolist()
        else:
            self.local.assert_greedy(whole, length)
        self.local.assert_greedy(torch.cat([whole[:, :back], again], 1), back)
        assert len(set(whole[0, length:].tolist())) > 4
        return moments[at] - moments[at - 1]

    @torch.no_grad()
    def _sampled(self, ids: Tensor, count: int, seed: int) -> Tensor:
        """What `generate` draws under this seed, all computed anew for every token."""
        torch.manual_seed(seed)
        for _ in range(count):
            probabilities = self.local.logits(ids)[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1)], 1)
        return ids

    def train(
        self,
        fault: Fault,
        *,
        before: str,
        steps: int = 3,
        seed: int = 0,
        batch: tuple[int, int] = (4, 30),
    ) -> float:
        """Some steps of AdamW with `batch`es of rows × tokens; `fault` comes `before` the "forward" or the "backward"
        of the second. Gives the seconds from there to the end of that step.

        Every loss and the final prompts are those of undisturbed local training.
        """
        prompts = self.model.prompts
        ours = [prompts.input] if prompts.deep is None else [prompts.input, prompts.deep]
        theirs = [self.local.vectors] if self.local.deep is None else [self.local.vectors, self.local.deep]
        for mine, other in zip(ours, theirs, strict=True):
            other.data.copy_(mine.data)
        # A step of Adam's first is of one size, however small the gradient: with a large eps it is not.
        optimizers = [torch.optim.AdamW(each, lr=0.01, eps=1e-3) for each in (ours, theirs)]
        took = 0.0
        for step in range(steps):
            ids = random_ids(*batch, seed=seed + step)
            if step == 1 and before == "forward":
                fault()
            began = time.monotonic()
            loss = self.model(ids, labels=ids).loss
            if step == 1 and before == "backward":
                fault()
                began = time.monotonic()
            loss.backward()
            if step == 1:
                took = time.monotonic() - began
            expected = self.local.loss(ids, ids)
            expected.backward()
            assert abs(loss.item() - expected.item()) < 1e-4
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for mine, other in zip(ours, theirs, strict=True):
            assert relative(mine.data, other.data) < 1e-4
        return took


class Noticed(logging.Handler):
    """What the client said about failures; `waiting` is called when it tells its user that it waits."""

    def __init__(self, waiting: Fault) -> None:
        super().__init__(logging.INFO)
        self.words: list[str] = []
        self._waiting = waiting

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())
        if record.levelno >= logging.WARNING and self.words[-1].startswith("Waiting up to"):
            self._waiting()


@contextlib.contextmanager
def something_failed(waiting: Fault = lambda: None) -> Iterator[Noticed]:
    """The block's client must have noticed a failure: a fault that hits nothing tests nothing."""
    noticed, log = Noticed(waiting), logging.getLogger("corolla.client.retry")
    level = log.level
    log.addHandler(noticed)
    log.setLevel(logging.INFO)  # single retries are told to whoever wants to know
    try:
        yield noticed
        assert noticed.words
    finally:
        log.setLevel(level)
        log.removeHandler(noticed)
