"""What Hugging Face users do to a model as an object: it works as on a local one, or a sentence says what to do."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import Pair, random_ids
from tests.covering import covering, every_time
from tests.tiny_models import FAMILIES, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corolla.client.model.arguments import own_arguments
from corolla.client.model.causal_lm import (
    AutoDistributedModelForCausalLM,
    distributed_class,
)
from corolla.errors import MissingBlocks, UsageError
from corolla.models.shell import ATTENTION_NAME, with_attention

PairOf = Callable[..., Pair]
DTYPES = [torch.float16, torch.bfloat16, torch.float64]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


# --- copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "mode"),
    covering(
        ["llama", "gpt2", "opt", "bloom", "gemma2"],
        {"none": None, "ptune": "ptune", "deep_ptune": "deep_ptune"},
        together=1,
    ),
)
def test_a_deepcopy_is_another_model_on_the_same_swarm(
    pair_of: PairOf, family: str, mode: str | None
) -> None:
    model, ids = pair_of(family).model(tuning_mode=mode, pre_seq_len=3), random_ids(2, 6)
    before = logits(model, ids)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert twin.blocks.connection is model.blocks.connection
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not {id(one) for one in twin.parameters()} & {id(one) for one in model.parameters()}
    assert torch.equal(logits(twin, ids), before)
    for one in twin.parameters():  # what is done to the copy does not reach the model
        one.data.mul_(1.5)
    changed = logits(twin, ids)
    assert (changed - before).abs().max() > 1e-2
    assert torch.equal(logits(model, ids), before)
    settings = {"max_new_tokens": 5, "do_sample": False}
    with model.inference_session(max_length=20) as session:
        first = model.generate(ids, session=session, **settings)
        assert not torch.equal(
            twin.generate(ids, **settings), first
        )  # its own prompt, and not in the session
        assert session.position == 11
    assert torch.equal(logits(model, ids), before)


def test_a_copy_keeps_what_was_done_to_the_model(pair_of: PairOf) -> None:
    model = pair_of("llama").model(tuning_mode="ptune", pre_seq_len=2)
    model.resize_token_embeddings(260, mean_resizing=False)
    model.generation_config.max_new_tokens = 3
    model.config.note = "mine"
    model.train()
    ids = torch.tensor([[3, 259, 4]])
    twin = copy.deepcopy(model)
    assert twin.training
    assert twin.config.note == "mine"
    assert twin.config is not model.config
    assert twin.model.config._attn_implementation == ATTENTION_NAME
    twin.config.note = "another"
    assert twin.model.config.note == "another"
    assert twin.generation_config.max_new_tokens == 3
    assert torch.equal(logits(twin, ids), logits(model, ids))
    twin.zero_grad()
    twin(ids, labels=ids).loss.backward()
    assert twin.prompts.input.grad is not None
    assert model.prompts.input.grad is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_connection_is_closed_with_the_last_copy(
    pair_of: PairOf, order: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = pair_of("llama").model(), random_ids(1, 4)
    closed: list[bool] = []
    monkeypatch.setattr(model.blocks.connection, "close", lambda: closed.append(True))
    models = [model, copy.deepcopy(model)]
    models[order[0]].close()
    assert not closed
    logits(models[order[1]], ids)
    models[order[1]].close()
    assert closed == [True]


def test_a_dropped_model_leaves_its_copy_connected(pair_of: PairOf) -> None:
    model, ids = pair_of("llama").model(), random_ids(1, 4)
    shared = model._shared_connection
    twin = copy.deepcopy(model)
    expected = logits(model, ids)
    del model
    gc.collect()
    assert len(shared._models) == 1
    assert torch.equal(logits(twin, ids), expected)


@pytest.mark.filterwarnings("ignore")
def test_trls_reference_model(pair_of: PairOf) -> None:
    from trl.models.utils import create_reference_model

    model, ids = pair_of("llama").model(tuning_mode="ptune", pre_seq_len=2), random_ids(1, 5)
    before = logits(model, ids)
    reference = create_reference_model(model)
    assert not any(one.requires_grad for one in reference.parameters())
    with torch.no_grad():
        model.prompts.input.add_(1.0)
    assert torch.equal(logits(reference, ids), before)
    assert not torch.equal(logits(model, ids), before)


def test_a_shallow_copy_and_a_pickle_are_refused_in_a_sentence(pair_of: PairOf) -> None:
    model = pair_of("llama").model()
    with pytest.raises(UsageError, match=r"copy\.deepcopy"):
        copy.copy(model)
    for pickled in (pickle.dumps, lambda one: torch.save(one, io.BytesIO())):
        with pytest.raises(UsageError, match=r"cannot be pickled.*save_pretrained"):
            pickled(model)
    assert len(pickle.dumps(model.state_dict())) > 0


# --- compilers -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_compilers_leave_it_as_it_is(pair_of: PairOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, ids = pair_of("llama"), random_ids(2, 6)
    expected = logits(pair.local, ids)
    compiled: list[Any] = []
    for way in ("torch.compile", "model.compile", "forward"):
        model: Any = pair.model()
        if way == "torch.compile":
            model = torch.compile(model, backend=_refusing(compiled))
        elif way == "model.compile":
            model.compile(backend=_refusing(compiled))
        elif way == "forward":
            model.forward = torch.compile(model.forward, backend=_refusing(compiled))
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)
        settings = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(ids, **settings), pair.local.generate(ids, **settings))
    assert not compiled


def _refusing(seen: list[Any]) -> Callable[..., Any]:
    """A compiler's backend that notes what it is given, and runs it as it is."""

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    return backend


def test_its_signature_is_the_familys(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    assert inspect.signature(pair.model().forward) == inspect.signature(pair.local.forward)


# --- conversions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "deep_ptune"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_converted_model_is_one_loaded_so(pair_of: PairOf, dtype: torch.dtype, mode: str | None) -> None:
    pair, ids = pair_of("llama"), random_ids(2, 6)
    loaded = pair.model(dtype=dtype, tuning_mode=mode, pre_seq_len=2)
    for convert in ("to", "method"):
        model = pair.model(tuning_mode=mode, pre_seq_len=2)
        names = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}
        model = model.to(dtype) if convert == "to" else getattr(model, names[dtype])()
        if mode is not None:
            model.prompts.load_state_dict(loaded.prompts.state_dict())
        found, expected = logits(model, ids), logits(loaded, ids)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)
        settings = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(ids, **settings), loaded.generate(ids, **settings))
        if mode is not None:
            assert model.prompts.input.dtype in (torch.float32, torch.float64)
            model(ids, labels=ids).loss.backward()
            assert model.prompts.deep.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_with_small_tables_can_be_converted(pair_of: PairOf, kind: str, dtype: torch.dtype) -> None:
    pair, ids = pair_of("llama"), random_ids(2, 6)
    model = pair.model(quantization=kind).to(dtype)
    found, expected = logits(model, ids), logits(pair.local, ids)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.3, rtol=0)
    copy.deepcopy(model).generate(ids, max_new_tokens=2, do_sample=False)


# --- the config --------------------------------------------------------------------------------------------------


# One rule for all; in these a config keeps what it is about in different places.
SOME = ("llama", "gpt2", "opt", "bloom", "gemma2", "gpt_oss")


@pytest.mark.parametrize("family", every_time(SOME, FAMILIES))
def test_the_name_of_our_attention_stays_inside(pair_of: PairOf, family: str, tmp_path: Path) -> None:
    pair = pair_of(family)
    model = pair.model()
    assert model.config._attn_implementation == pair.local.config._attn_implementation
    assert ATTENTION_NAME not in repr(model.config) + model.config.to_json_string(use_diff=False)
    inner = [one.config for one in model.modules() if hasattr(one, "config")]
    assert any(one._attn_implementation == ATTENTION_NAME for one in inner)
    for config in [model.config, copy.copy(model.config), *inner]:
        made = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        assert made(random_ids(1, 3)).logits.shape == (1, 3, 256)
    model.config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != ATTENTION_NAME


def test_a_private_config_is_the_public_one_but_for_its_attention() -> None:
    config = tiny_config("llama")
    private = with_attention(config, ATTENTION_NAME)
    assert isinstance(private, type(config))
    assert private._attn_implementation == ATTENTION_NAME
    config.use_cache = False
    assert private.use_cache is False
    private.sliding_window = 7
    assert config.sliding_window == 7
    private._attn_implementation = "eager"
    assert (config._attn_implementation, private._attn_implementation) == ("eager", ATTENTION_NAME)
    assert pickle.loads(pickle.dumps(private))._attn_implementation == "eager"
    assert private.to_dict() == config.to_dict()
    for made in (copy.copy(private), copy.deepcopy(private)):
        assert type(made) is type(config)
        assert made.sliding_window == 7
    assert ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS


def test_a_model_without_a_swarm_is_refused_in_a_sentence(pair_of: PairOf) -> None:
    kind: Any = distributed_class("LlamaForCausalLM")
    for make in (kind, kind._from_config):
        with pytest.raises(UsageError, match="from_pretrained"):
            make(pair_of("llama").local.config)


# --- everything else that is asked of a model --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_what_is_asked_of_any_model(pair_of: PairOf) -> None:
    pair, ids = pair_of("llama"), random_ids(2, 6)
    model, expected = pair.model(), logits(pair.local, random_ids(2, 6))
    own = sum(one.numel() for one in model.parameters())
    assert model.num_parameters() == own
    assert model.get_memory_footprint() >= 4 * own
    assert "embed_tokens" in repr(model)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.tie_weights()
    model.set_attn_implementation("eager")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train().eval()
    model.share_memory()
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)
    names = {name for name, _ in model.named_parameters()}
    assert names < {name for name, _ in pair.local.named_parameters()}


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_blocks_are_not_taken_and_forgotten(pair_of: PairOf, strict: bool) -> None:
    pair, ids = pair_of("llama"), random_ids(1, 4)
    model = pair.model()
    before = logits(model, ids)
    with pytest.raises(UsageError, match=r"blocks.*on the servers"):
        model.load_state_dict(pair.local.state_dict(), strict=strict)
    assert torch.equal(logits(model, ids), before)
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    local = copy.deepcopy(pair.local)
    local.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(model, ids), logits(local, ids), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("resized", [260, 200])
def test_new_tables_are_used(pair_of: PairOf, resized: int) -> None:
    pair, ids = pair_of("llama"), torch.tensor([[3, 4, 199]])
    model, local = pair.model(), copy.deepcopy(pair.local)
    for one in (model, local):
        torch.manual_seed(0)
        one.resize_token_embeddings(resized, mean_resizing=False)
    torch.testing.assert_close(logits(model, ids), logits(local, ids), atol=1e-4, rtol=0)
    rows, head = torch.nn.Embedding(256, 32), torch.nn.Linear(32, 256, bias=False)
    model, local = pair.model(), copy.deepcopy(pair.local)
    for one in (model, local):
        one.set_input_embeddings(rows)
        one.set_output_embeddings(head)
    torch.testing.assert_close(logits(model, ids), logits(local, ids), atol=1e-4, rtol=0)


# --- what people write into from_pretrained ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"torch_dtype": torch.float64, "dtype": "auto"},
        {"torch_dtype": "float64", "dtype": None},
        {"torch_dtype": "torch.float64", "dtype": "auto"},
        {"dtype": "float64"},
        {"dtype": "torch.float64"},
        {"dtype": torch.float64, "device_map": "auto"},
        {"dtype": torch.float64, "device_map": "cpu"},
        {"dtype": torch.float64, "device_map": {"": "cpu"}},
        {"dtype": torch.float64, "device_map": torch.device("cpu")},
        {
            "dtype": torch.float64,
            "low_cpu_mem_usage": True,
            "use_safetensors": True,
            "trust_remote_code": False,
        },
        {
            "dtype": torch.float64,
            "attn_implementation": None,
            "load_in_8bit": False,
            "local_files_only": True,
        },
        {"dtype": torch.float64, "max_retries": None, "use_server_to_server": True, "request_timeout": 180},
    ],
    ids=str,
)
def test_other_names_for_what_can_be_had(pair_of: PairOf, arguments: dict[str, Any]) -> None:
    model = pair_of("llama").model(**arguments)
    assert (model.dtype, model.device.type) == (torch.float64, "cpu")


def test_a_model_says_what_others_can_load(pair_of: PairOf, tmp_path: Path) -> None:
    """peft notes it beside an adapter, and tokenizers are found by it."""
    pair = pair_of("llama")
    model = pair.model(tuning_mode="ptune", pre_seq_len=2)
    assert model.name_or_path == model.config.name_or_path == pair.swarm.checkpoint.source.location
    model.save_pretrained(tmp_path)
    noted = json.loads((tmp_path / "adapter_config.json").read_text())
    assert noted["base_model_name_or_path"] == model.name_or_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "garbage"}, "dtype is 'garbage'; it must be auto, float64, float32"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8; it must be"),
        ({"dtype": 7}, "dtype is 7; it must be"),
        ({"device_map": "tpu9"}, "one device of this machine"),
        ({"device_map": {"model": "cpu", "lm_head": "meta"}}, "one device of this machine"),
        ({"device_map": "meta"}, "meta, where nothing can be computed"),
        ({"attn_implementation": "eager"}, "attn_implementation.*servers"),
        ({"load_in_8bit": True}, "load_in_8bit.*quantization="),
        ({"quantization_config": object()}, "quantization_config.*quantization="),
        ({"trust_remote_code": True}, "trust_remote_code.*never runs"),
        ({"use_safetensors": False}, "use_safetensors.*pickled"),
        ({"force_download": True}, "force_download.*cache"),
        ({"subfolder": "deep"}, "subfolder.*path of that folder"),
        ({"config": object()}, r"config.*model\.config"),
        ({"tp_plan": "auto"}, "tp_plan.*on this machine"),
        ({"initial_peer": ["a"]}, "no argument initial_peer: did you mean initial_peers"),
        ({"tuning_mod": "ptune"}, "no argument tuning_mod: did you mean tuning_mode"),
        ({"max_retries": 3}, "max_retries=3: patience says"),
        ({"active_adapter": "someone/lora"}, r"active_adapter.*PeftModel\.from_pretrained"),
        ({"zzz": 1}, "no argument zzz: it takes .*initial_peers"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_cannot_be_had_is_one_sentence(
    pair_of: PairOf, arguments: dict[str, Any], sentence: str
) -> None:
    folder = pair_of("llama").swarm.checkpoint.name
    for load in (
        AutoDistributedModelForCausalLM.from_pretrained,
        distributed_class("LlamaForCausalLM").from_pretrained,
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            load(folder, **{"initial_peers": ["nowhere"], **arguments})
        assert str(caught.value).endswith((".", "?"))
        assert isinstance(caught.value, TypeError) == ("no argument" in sentence)


def test_from_pretrained_can_be_completed() -> None:
    """Its names, its defaults and what they mean; nothing that only Corolla itself gives."""
    auto, family = AutoDistributedModelForCausalLM, distributed_class("LlamaForCausalLM")
    signature = inspect.signature(auto.from_pretrained)
    assert inspect.signature(family.from_pretrained) == signature
    assert signature.return_annotation is PreTrainedModel
    assert {"initial_peers", "tuning_mode", "allowed_servers", "blocked_servers"} < set(signature.parameters)
    assert not {"connection", "only", "trust"} & set(signature.parameters)
    for load in (auto.from_pretrained, family.from_pretrained):
        assert load.__name__ == "from_pretrained"
        documented = inspect.getdoc(load) or ""
        for name in set(signature.parameters) - {"torch_dtype"}:
            assert name in documented
        with pytest.raises(TypeError, match=r"from_pretrained\(\) takes 1 positional"):
            load("smollm2", ["address"])


def test_older_names_are_taken_with_a_warning(pair_of: PairOf) -> None:
    swarm = pair_of("llama").swarm
    peers = list(swarm.servers)
    with pytest.warns(FutureWarning, match="trust is called allowed_servers now"):
        model = swarm.model(trust=peers)
    assert model.blocks.connection.config.trust == tuple(peers)


def test_servers_can_be_blocked(pair_of: PairOf) -> None:
    swarm = pair_of("llama").swarm
    blocked = next(iter(swarm.servers))
    with pytest.raises(MissingBlocks, match=r"that you trust do not serve blocks .* 1 other"):
        swarm.model(blocked_servers=[blocked])


def test_every_argument_of_transformers_own_is_known(pair_of: PairOf) -> None:
    """Those that its source pops, in whatever release this is."""
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    names = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', source))
    names |= {
        one.name for one in inspect.signature(PreTrainedModel.from_pretrained).parameters.values()
        if one.kind is one.KEYWORD_ONLY
    }  # fmt: skip
    names -= set(own_arguments())
    known = 0
    for name in sorted(name for name in names if not name.startswith("_")):
        with pytest.raises(UsageError) as caught:
            AutoDistributedModelForCausalLM.from_pretrained("no/such", **{name: object()})
        assert "no argument" not in str(caught.value), name
        known += 1
    assert known > 25
