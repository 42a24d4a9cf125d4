"""One head for many threads: rows that come together are multiplied together, and nobody is hurt by another.

Threads are led by a product that waits until the test lets it go, so every order of events is one that was
asked for.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.conftest import Pair, random_ids
from tests.interrupts import interrupt_often
from tests.tiny_models import tiny_config, tiny_model
from torch import Tensor, nn

from corolla.client.model.heads import FEW_ROWS, ChangeTracker, SharedHead, share_head, use_head_kernel
from corolla.client.model.losses import summed_cross_entropy
from corolla.client.model.row_queue import MOST_ROWS, RowQueue, _Call
from corolla.errors import UsageError
from corolla.models.kernels.apply import exact_linear
from corolla.models.kernels.autotune import Autotuner
from corolla.models.kernels.int8 import has_int8

PairOf = Callable[..., Pair]
WAIT = 30.0  # seconds after which a test that hangs is given up
WIDTH, WORDS = 16, 40
WIDE = 32  # of the tiny models


class Product:
    """A head's product, each of which waits to be let go."""

    def __init__(self, count_of_holds: int = 1) -> None:
        self.weight = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(1))
        self.sizes: list[int] = []
        self.errors: dict[int, BaseException] = {}  # by the number of the product
        self.begun = [threading.Event() for _ in range(count_of_holds)]
        self.let_go = [threading.Event() for _ in range(count_of_holds)]

    def __call__(self, rows: Tensor) -> Tensor:
        number = len(self.sizes)
        self.sizes.append(len(rows))
        if number < len(self.begun):
            self.begun[number].set()
            assert self.let_go[number].wait(WAIT)
        if number in self.errors:
            raise self.errors[number]
        return rows @ self.weight.T


def rows_of(seed: int, count: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 + seed))


class Crowd:
    """Threads that use one queue."""

    def __init__(self, product: Any) -> None:
        self.queue = RowQueue()
        self.product = product
        self.threads: list[threading.Thread] = []

    def call(self, rows: Tensor) -> Future[Tensor]:
        """`rows` from a new thread, which has joined the queue (or got its result) on return."""
        future: Future[Tensor] = Future()
        expected = self.queue.waiting + 1

        def work() -> None:
            try:
                future.set_result(self.queue.run(rows, self.product))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.threads.append(thread)
        deadline = threading.Event()
        while self.queue.waiting < expected and not future.done():
            deadline.wait(0.001)
        return future

    def end(self) -> None:
        """All threads are done, and the queue is as at the beginning."""
        for thread in self.threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        assert self.queue.waiting == 0
        assert self.queue._leader is None


def test_one_alone_computes_at_once_and_in_its_own_thread() -> None:
    seen: list[threading.Thread] = []

    def product(rows: Tensor) -> Tensor:
        seen.append(threading.current_thread())
        return rows * 2

    queue, rows = RowQueue(), rows_of(0)
    assert torch.equal(queue.run(rows, product), rows * 2)
    assert seen == [threading.current_thread()]
    assert queue.waiting == 0


def test_who_comes_meanwhile_goes_together() -> None:
    product = Product()
    crowd = Crowd(product)
    parts = [rows_of(index, 1 + index % 3) for index in range(9)]
    futures = [crowd.call(parts[0])]
    assert product.begun[0].wait(WAIT)
    futures += [crowd.call(part) for part in parts[1:]]
    product.let_go[0].set()
    for part, future in zip(parts, futures, strict=True):
        torch.testing.assert_close(future.result(WAIT), part @ product.weight.T, atol=1e-5, rtol=0.0)
    assert product.sizes == [1, sum(len(part) for part in parts[1:])]
    crowd.end()


def test_who_was_away_for_as_long_is_waited_for() -> None:
    """The thread that comes first has the table read for the other as well."""
    sizes: list[int] = []

    def product(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        threading.Event().wait(0.4)  # so large is the table
        return rows * 2

    queue, begin = RowQueue(), [threading.Semaphore(0) for _ in range(2)]

    def work(own: threading.Semaphore) -> None:
        for _ in range(2):
            own.acquire()
            queue.run(rows_of(0), product)

    threads = [threading.Thread(target=work, args=(own,), daemon=True) for own in begin]
    for thread in threads:
        thread.start()
    for turn in range(2):
        for count, own in enumerate(begin, start=1):
            own.release()
            while max(sum(sizes), queue.waiting + 2 * turn) < 2 * turn + count:  # until it has come
                threading.Event().wait(0.001)
        while queue.waiting:
            threading.Event().wait(0.001)
    for thread in threads:
        thread.join(WAIT)
    assert sizes[-1] == 2


def test_a_product_does_not_grow_without_end() -> None:
    product = Product()
    crowd = Crowd(product)
    futures = [crowd.call(rows_of(0))]
    assert product.begun[0].wait(WAIT)
    futures += [crowd.call(rows_of(index, FEW_ROWS)) for index in range(1, 7)]
    product.let_go[0].set()
    for future in futures:
        future.result(WAIT)
    assert product.sizes == [1, MOST_ROWS, 6 * FEW_ROWS - MOST_ROWS]
    crowd.end()


def test_an_error_reaches_all_whose_rows_were_in_it_and_nobody_else() -> None:
    product = Product(2)
    product.errors[1] = MemoryError("no room")
    crowd = Crowd(product)
    first = crowd.call(rows_of(0))
    assert product.begun[0].wait(WAIT)
    unlucky = [crowd.call(rows_of(index)) for index in range(1, 4)]
    product.let_go[0].set()
    assert product.begun[1].wait(WAIT)
    later = crowd.call(rows_of(4))
    product.let_go[1].set()
    for future in unlucky:
        with pytest.raises(MemoryError, match="no room"):
            future.result(WAIT)
    for seed, future in ((0, first), (4, later)):
        torch.testing.assert_close(future.result(WAIT), rows_of(seed) @ product.weight.T, atol=1e-5, rtol=0.0)
    crowd.end()


@pytest.mark.parametrize("number", [0, 1], ids=["alone", "for others too"])
def test_ctrl_c_in_the_thread_that_computes_hurts_no_other(number: int) -> None:
    product = Product(2)
    product.errors[number] = KeyboardInterrupt()
    crowd = Crowd(product)
    first = crowd.call(rows_of(0))
    assert product.begun[0].wait(WAIT)
    others = [crowd.call(rows_of(index)) for index in range(1, 4)]
    for event in product.let_go:
        event.set()
    results = [future.exception(WAIT) for future in (first, *others)]
    assert [type(error) for error in results].count(KeyboardInterrupt) == 1
    for seed, future in enumerate((first, *others)):
        if future.exception(WAIT) is None:
            expected = rows_of(seed) @ product.weight.T
            torch.testing.assert_close(future.result(WAIT), expected, atol=1e-5, rtol=0.0)
    assert product.sizes == ([1, 3] if number == 0 else [1, 3, 2])
    crowd.end()


OFTEN = """
import sys, threading
import torch
from corolla.client.model.row_queue import RowQueue

torch.set_num_threads(1)
sys.setswitchinterval(1e-4)
queue, row = RowQueue(), torch.ones(1, 4)
done = [threading.Semaphore(0) for _ in range(3)]

def others(mine):
    while True:
        queue.run(row, torch.exp)
        mine.release()

for mine in done:
    threading.Thread(target=others, args=(mine,), daemon=True).start()

def work():
    for _ in range(50):
        queue.run(row, torch.exp)

def check():
    pass

def end():
    for mine in done:
        while mine.acquire(blocking=False):
            pass
        assert mine.acquire(timeout=20)
"""


def test_ctrl_c_at_any_instant_keeps_no_other_thread_waiting() -> None:
    interrupt_often(OFTEN, times=500, longest=2e-3)


def test_who_is_served_while_another_leaves_is_woken_too() -> None:
    class ServedMeanwhile(_Call):
        asked = 0

        @property
        def served(self) -> bool:
            self.asked += 1
            return self.asked > 1

    queue, late = RowQueue(), ServedMeanwhile(rows_of(0))
    queue._waiting = [late]
    for seed in (1, 2):  # one that leaves now, and one that does so afterwards
        queue._leave(_Call(rows_of(seed)))
    assert not late.woken.locked()


def test_gradients_and_inference_mode_stay_with_their_thread() -> None:
    """A leader in inference mode gives others tensors that they can go on with."""
    product = Product()
    queue, results = RowQueue(), {}

    def infer() -> None:
        with torch.inference_mode():
            results["leader"] = queue.run(rows_of(0), product)

    def follow() -> None:
        results["follower"] = queue.run(rows_of(1), product)

    threads = [threading.Thread(target=infer)]
    threads[0].start()
    assert product.begun[0].wait(WAIT)
    threads += [threading.Thread(target=infer), threading.Thread(target=follow)]
    for count, thread in enumerate(threads[1:], start=2):
        thread.start()
        while queue.waiting < count:
            pass
    product.let_go[0].set()
    for thread in threads:
        thread.join(WAIT)
    assert product.sizes == [1, 2]
    assert not results["follower"].is_inference()
    weight = torch.ones(WORDS, requires_grad=True)
    (results["follower"] * weight).sum().backward()
    torch.testing.assert_close(weight.grad, results["follower"][0])


# --- as a module ---------------------------------------------------------------------------------------------


def test_it_is_the_familys_head_to_all_who_look_at_it() -> None:
    plain = tiny_model(tiny_config("llama", layers=1, tie_word_embeddings=True)).requires_grad_(False)
    model = copy.deepcopy(plain)
    share_head(model)
    head = model.get_output_embeddings()
    assert isinstance(head, SharedHead)
    assert isinstance(head, nn.Linear)
    assert head.weight is model.get_input_embeddings().weight
    assert list(model.state_dict()) == list(plain.state_dict())
    head.use_kernel(nn.Linear(32, 256))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    head.use_kernel(None)
    model.tie_weights()
    assert model.get_output_embeddings() is head
    assert head.weight is model.get_input_embeddings().weight
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(torch.ones(1, 32)), head(torch.ones(1, 32)))
    model.double()
    assert model(torch.tensor([[3, 4]])).logits.dtype == torch.float64
    model.resize_token_embeddings(260)
    assert model(torch.tensor([[3, 259]])).logits.shape == (1, 2, 260)


def test_a_kernel_computes_while_the_head_is_frozen() -> None:
    head = SharedHead(4, 6).requires_grad_(False)
    rows = torch.ones(2, 3, 4)
    expected = head(rows)
    head.use_kernel(lambda hidden: nn.functional.linear(hidden, head.weight, head.bias) + 1)
    torch.testing.assert_close(head(rows), expected + 1)
    torch.testing.assert_close(head(torch.ones(2, 50, 4))[:, :3], expected + 1)
    torch.testing.assert_close(head(rows.requires_grad_()) + 0, expected + 1)
    head.requires_grad_(True)
    torch.testing.assert_close(head(rows), expected)


def test_a_kernel_on_weights_of_16_bit_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    head = SharedHead(4, 6, bias=False).bfloat16().requires_grad_(False)
    kernel = nn.Linear(4, 6, bias=False).requires_grad_(False)
    head.use_kernel(kernel)
    shared: list[int] = []
    plain = RowQueue.run

    def run(self: RowQueue, rows: Tensor, product: Any) -> Tensor:
        shared.append(len(rows))
        return plain(self, rows, product)

    monkeypatch.setattr(RowQueue, "run", run)
    assert torch.equal(head(torch.ones(2, 1, 4)), kernel(torch.ones(2, 1, 4)))
    assert shared == [2]


def test_an_exact_kernel_leaves_losses_to_the_weights() -> None:
    head = SharedHead(4, 6, bias=False).requires_grad_(False)
    rows, targets = torch.randn(5, 4, requires_grad=True), torch.arange(5)
    expected = nn.functional.cross_entropy(nn.functional.linear(rows, head.weight), targets, reduction="sum")

    def kernel(hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, head.weight) * 2  # so that its use shows

    head.use_kernel(kernel, exact=True)
    torch.testing.assert_close(summed_cross_entropy(head(rows), targets), expected)
    head.use_kernel(kernel)
    assert abs(summed_cross_entropy(head(rows), targets) - expected) > 1e-2


def test_a_copy_has_logits_of_its_own_weights() -> None:
    """Also where the faster product reads the head's own memory, and the first head is changed later."""
    torch.manual_seed(3)
    head = SharedHead.like(nn.Linear(96, 256, bias=False).requires_grad_(False))
    product = exact_linear(head.weight, None, autotuner=Autotuner())
    head.use_kernel(product, exact=True)
    twin, hidden = copy.deepcopy(head), torch.randn(2, 96)
    wanted = nn.functional.linear(hidden, twin.weight)
    with torch.no_grad():
        head.weight.zero_()
    assert twin.kernel is not None
    torch.testing.assert_close(twin(hidden), wanted, atol=1e-5, rtol=1e-5)
    assert not bool(head(hidden).any())


@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 3)])
def test_rows_that_do_not_fit_are_nobody_elses_error(shape: tuple[int, ...]) -> None:
    head = SharedHead(4, 6).requires_grad_(False)
    with pytest.raises(RuntimeError):
        head(torch.ones(shape))
    with pytest.raises(RuntimeError):
        head(torch.ones(1, 4, dtype=torch.float64))
    assert head.queue.waiting == 0


def test_sessions_in_threads_say_what_they_say_alone(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model = pair.model()
    prompts = [random_ids(1, 3 + index, seed=index) for index in range(6)]
    alone = [pair.local.generate(ids, max_new_tokens=12, do_sample=False) for ids in prompts]
    head = model.get_output_embeddings()
    sizes: list[int] = []
    together = threading.Barrier(len(prompts))

    def product(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return nn.functional.linear(rows, head.weight)

    head.use_kernel(product)
    found: dict[int, Tensor] = {}

    def talk(index: int) -> None:
        together.wait(WAIT)
        with model.inference_session(max_length=40) as session:
            found[index] = model.generate(prompts[index], max_new_tokens=12, do_sample=False, session=session)

    threads = [threading.Thread(target=talk, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    for index, expected in enumerate(alone):
        assert torch.equal(found[index], expected)
    assert sum(sizes) == 12 * len(prompts)


# --- weights that are changed --------------------------------------------------------------------------------


def loaded(kind: str = "none", family: str = "llama", *, tied: bool = False) -> tuple[Any, SharedHead]:
    """A frozen model as a client loads it, after a first call, and its head."""
    model = tiny_model(tiny_config(family, layers=1, tie_word_embeddings=tied)).requires_grad_(False)
    share_head(model)
    use_head_kernel(model, kind)
    head = model.get_output_embeddings()
    head(torch.ones(1, WIDE))
    assert isinstance(head, SharedHead)
    return model, head


def in_place(model: Any, head: Any) -> None:
    with torch.no_grad():
        head.weight.mul_(1.5)


def by_data(model: Any, head: Any) -> None:
    head.weight.data.mul_(1.5)


def one_number(model: Any, head: Any) -> None:
    head.weight.data[3, 5] += 10


def as_peft_merges(model: Any, head: Any) -> None:
    head.weight.data += torch.ones_like(head.weight)


def by_numpy(model: Any, head: Any) -> None:
    if head.weight.dtype == torch.bfloat16:  # which NumPy does not know
        return in_place(model, head)
    head.weight.numpy()[:] *= 1.5


def by_array(model: Any, head: Any) -> None:
    if head.weight.dtype == torch.bfloat16:
        return in_place(model, head)
    np.asarray(head.weight)[:] *= 1.5


def by_dlpack(model: Any, head: Any) -> None:
    torch.from_dlpack(head.weight).mul_(1.5)  # type: ignore[attr-defined]


def other_data(model: Any, head: Any) -> None:
    head.weight.data = head.weight.detach() * 1.5


def other_parameter(model: Any, head: Any) -> None:
    head.weight = nn.Parameter(head.weight.detach() * 1.5, requires_grad=False)


def other_state(model: Any, head: Any) -> None:
    head.load_state_dict({name: value * 1.5 for name, value in head.state_dict().items()})


def assigned_state(model: Any, head: Any) -> None:
    head.load_state_dict({name: value * 1.5 for name, value in head.state_dict().items()}, assign=True)


def swapped(model: Any, head: Any) -> None:
    torch.utils.swap_tensors(head.weight, nn.Parameter(head.weight.detach() * 1.5, requires_grad=False))


def trained(model: Any, head: Any) -> None:
    head.requires_grad_(True)
    head(torch.ones(1, WIDE)).sum().backward()
    torch.optim.AdamW(head.parameters(), lr=0.1).step()
    head.requires_grad_(False)


def through_its_state(model: Any, head: Any) -> None:
    head.state_dict()["weight"].mul_(1.5)


def through_the_embedding(model: Any, head: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)


CHANGES = [
    in_place,
    by_data,
    one_number,
    as_peft_merges,
    by_numpy,
    by_array,
    by_dlpack,
    other_data,
    other_parameter,
    other_state,
    assigned_state,
    swapped,
    trained,
    through_its_state,
]


def check_follows(head: Any, kind: str, before: Tensor) -> None:
    """Logits and losses are those of the weight that the head has now."""
    rows = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(3))
    expected = nn.functional.linear(rows, head.weight.float(), head.bias)
    tolerance = {"atol": 1e-4, "rtol": 1e-5}
    assert not torch.allclose(expected, before, **tolerance)
    torch.testing.assert_close(head(rows), expected, **tolerance)
    torch.testing.assert_close(head(rows.clone().requires_grad_()) + 0, expected, **tolerance)
    targets = torch.arange(3)
    found = summed_cross_entropy(head(rows.clone().requires_grad_()), targets)
    wanted = nn.functional.cross_entropy(expected, targets, reduction="sum")
    torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("kind", ["none", "bfloat16", "int8"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_logits_are_those_of_a_changed_weight(kind: str, change: Callable[[Any, Any], None]) -> None:
    if kind == "int8" and not has_int8():
        pytest.skip("no int8 kernel here")
    model, head = loaded(kind)
    assert (head.kernel is not None) == (kind != "bfloat16")
    rows = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(3))
    before = nn.functional.linear(rows, head.weight.float())
    change(model, head)
    check_follows(head, kind, before)


@pytest.mark.parametrize("kind", ["none", "bfloat16", "int8"])
def test_a_tied_embedding_that_is_edited_is_seen(kind: str) -> None:
    model, head = loaded(kind, tied=True)
    assert head.weight is model.get_input_embeddings().weight
    before = head.weight.float() @ torch.randn(WIDE, generator=torch.Generator().manual_seed(3))
    through_the_embedding(model, head)
    check_follows(head, kind, before[:3, None].expand(3, len(head.weight)))


def test_an_alias_that_was_taken_is_not_trusted_later() -> None:
    _, head = loaded()
    alias = head.weight.data
    head(torch.ones(1, WIDE))
    before = head.weight @ torch.ones(WIDE)
    alias.mul_(1.5)
    torch.testing.assert_close(head(torch.ones(1, WIDE))[0], before * 1.5)


def test_a_bias_that_is_changed_is_seen() -> None:
    head = SharedHead(4, 6).requires_grad_(False)
    model = nn.Module()
    model.get_output_embeddings = lambda: head  # type: ignore[assignment]
    use_head_kernel(model, "none")
    assert head.kernel is not None
    rows = torch.ones(1, 4)
    before = head(rows)
    with torch.no_grad():
        head.bias.add_(1)
    torch.testing.assert_close(head(rows), before + 1)
    head.bias = nn.Parameter(head.bias + 1, requires_grad=False)
    torch.testing.assert_close(head(rows), before + 2)


def test_a_bias_that_is_changed_by_numpy_is_seen() -> None:
    head = SharedHead(4, 6).requires_grad_(False)
    model = nn.Module()
    model.get_output_embeddings = lambda: head  # type: ignore[assignment]
    use_head_kernel(model, "none")
    rows = torch.ones(1, 4)
    before = head(rows)
    numbers = head.bias.numpy()
    assert head.kernel is None
    numbers += 1
    torch.testing.assert_close(head(rows), before + 1)


@pytest.mark.parametrize(
    "names", [["weight"], ["weight", "other"]], ids=["with a new one", "with each other"]
)
def test_parameters_that_are_swapped_have_changed(names: list[str]) -> None:
    module = nn.Module()
    for name in ("weight", "other"):
        module.register_parameter(name, nn.Parameter(torch.randn(3, 4)))
    changes = ChangeTracker()
    changes.note(module)
    assert not changes.changed(module)
    other = module.other if len(names) > 1 else nn.Parameter(torch.randn(3, 4))
    torch.utils.swap_tensors(module.weight, other)
    assert [*changes.changed(module)] == names


def test_a_parameter_in_the_place_of_one_that_is_gone_has_changed() -> None:
    module = nn.Linear(3, 4, bias=False)
    changes = ChangeTracker()
    changes.note(module)
    for _ in range(20):  # of which some get the old one's address
        del module.weight
        module.weight = nn.Parameter(torch.randn(4, 3))
        assert [*changes.changed(module)] == ["weight"]


@pytest.mark.parametrize("use", ["calls", "to", "state_dict", "frozen", "tied", "printed"])
def test_the_kernel_stays_while_nothing_changes(use: str) -> None:
    """What a model goes through in daily life costs it no speed."""
    model, head = loaded(tied=True)
    if use == "calls":
        model.train()(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]]))
        model.eval()(torch.tensor([[3, 4]]))
    elif use == "to":
        model.to("cpu").to(torch.float32).float()
    elif use == "state_dict":
        model.state_dict()
        pickle.dumps(model.state_dict())
        copy.deepcopy(head)
        pickle.dumps(head)
    elif use == "frozen":
        model.requires_grad_(True).requires_grad_(False)
        torch.optim.AdamW(model.parameters())
    elif use == "tied":
        model.tie_weights()
        model.get_memory_footprint()
    else:
        repr(head.weight)
    assert head.kernel is not None


@pytest.mark.parametrize("kind", ["none", "bfloat16", "int8"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_copies_compute_the_same_and_go_their_own_way(kind: str, tied: bool) -> None:
    model, head = loaded(kind, tied=tied)
    rows = torch.randn(2, WIDE)
    before = head(rows)
    for twin in (copy.deepcopy(head), copy.deepcopy(model).get_output_embeddings()):
        assert torch.equal(twin(rows), before)
        in_place(None, twin)
        torch.testing.assert_close(twin(rows), rows @ twin.weight.float().T)
        assert torch.equal(head(rows), before)
    read = pickle.loads(pickle.dumps(head))
    torch.testing.assert_close(read(rows), before, atol=0.1 if kind == "int8" else 1e-5, rtol=0)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(rows), read(rows))


def test_logits_that_nobody_has_read_are_not_those_of_a_later_weight() -> None:
    model, head = loaded()
    rows = torch.randn(2, WIDE, requires_grad=True)
    logits = head(rows)
    in_place(model, head)
    with pytest.raises(UsageError, match="read the logits, or compute the loss, before"):
        logits + 0
    with pytest.raises(UsageError, match="read the logits, or compute the loss, before"):
        summed_cross_entropy(head_logits_before_a_change(head), torch.arange(2))


def head_logits_before_a_change(head: Any) -> Tensor:
    logits: Tensor = head(torch.randn(2, WIDE, requires_grad=True))
    by_data(None, head)
    in_place(None, head)
    return logits


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_head_in_16_bit_can_be_trained(kind: str) -> None:
    _, head = loaded(kind)
    head.requires_grad_(True)
    rows = torch.randn(2, WIDE)
    logits = head(rows)
    logits.sum().backward()
    torch.testing.assert_close(logits, rows @ head.weight.float().T)
    assert head.weight.grad is not None


@pytest.mark.parametrize("kind", ["none", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_that_is_converted_computes_in_the_new_dtype(kind: str, dtype: torch.dtype) -> None:
    model, _ = loaded(kind)
    plain = tiny_model(tiny_config("llama", layers=1, tie_word_embeddings=False))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        found, expected = model.to(dtype)(ids).logits, plain.to(dtype)(ids).logits
    if kind == "none":
        assert torch.equal(found, expected)
    else:  # the tables were rounded to bfloat16 when they were loaded
        torch.testing.assert_close(found.double(), expected.double(), atol=0.2, rtol=0.05)


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_peft_on_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    ids = torch.tensor([[3, 4, 5, 6]])
    for settings in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}},
    ):
        logits = []
        for shared in (False, True):
            model: Any = tiny_model(tiny_config("llama", layers=1)).requires_grad_(False)
            if shared:
                share_head(model)
                use_head_kernel(model, "none")
            torch.manual_seed(0)
            adapted: Any = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
            optimizer = torch.optim.SGD([one for one in adapted.parameters() if one.requires_grad], lr=0.1)
            rows = []
            for _ in range(2):
                output = adapted(ids, labels=ids)
                rows.append(output.logits.detach() + 0)
                output.loss.backward()
                optimizer.step()
            with torch.no_grad():
                rows += [adapted(ids).logits, adapted.merge_and_unload()(ids).logits]
            logits.append(torch.stack(rows))
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
        assert (logits[0][1] - logits[0][0]).abs().max() > 1e-3
