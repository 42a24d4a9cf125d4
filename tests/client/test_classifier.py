"""Classifiers and bare models over a swarm give what the local model gives; heads and prompts are trained and kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from tests.client.test_prefix import random_prefix
from tests.reference import Prefixed, local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import FAMILIES, write_tiny
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

import corolla
from corolla.client.model import arguments
from corolla.errors import BundleError, UnsupportedFamily, UsageError
from corolla.models import families
from corolla.models.cache import cache_argument

# peft asks for something that transformers calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
LABELS, P = 3, 4
TESTED = ("llama", "bloom", "gpt2", "opt", "gemma3_text")
WITHOUT = ("cohere", "granite")
OTHERS = tuple(one for one in FAMILIES if one not in (*TESTED, *WITHOUT))
KINDS: dict[str, Tensor] = {
    "single_label_classification": torch.tensor([0, 2, 1]),
    "multi_label_classification": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1]]),
    "regression": torch.tensor([[0.5, -1, 2], [0, 1, 0], [3, 0.1, -0.2]]),
}


def classifier(swarm: MemorySwarm, **options: Any) -> Any:
    options.setdefault("num_labels", LABELS)
    return swarm.model(asked=arguments.classifier, chosen=families.classifier_class, **options)


def local_twin(swarm: MemorySwarm, model: Any) -> Any:
    """The whole classifier here, with the head of `model`."""
    found = AutoModelForSequenceClassification.from_pretrained(
        swarm.checkpoint.name, num_labels=model.config.num_labels, dtype=torch.float32
    )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name in own:
                parameter.copy_(own[name])
    return found.eval().requires_grad_(False)


def batch(side: str) -> dict[str, Tensor]:
    """Three rows of 7, 4 and 2 tokens; padding is 0."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((7, 4, 2)):
        padding = slice(length, None) if side == "right" else slice(0, 7 - length)
        ids[row, padding] = mask[row, padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def prompted(whole: Any, prompt: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The logits of the local classifier with a prompt in front, at each row's last token."""
    embedded = whole.get_input_embeddings()(given["input_ids"])
    rows = torch.cat([prompt.expand(len(embedded), -1, -1), embedded], 1)
    mask = torch.nn.functional.pad(given["attention_mask"], (len(prompt), 0), value=1)
    last = [int(row.nonzero().max()) for row in given["attention_mask"]]
    logits = []
    for row, end in enumerate(last):  # classifiers take the last position of embeddings
        one = slice(row, row + 1), slice(0, len(prompt) + end + 1)
        logits.append(whole(inputs_embeds=rows[one], attention_mask=mask[one]).logits)
    return torch.cat(logits)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    folder = write_tiny("llama", tmp_path_factory.mktemp("classifier") / "llama")
    with MemorySwarm(folder, [(0, 1), (1, 4)]) as made:
        yield made


@pytest.mark.parametrize(
    "family", [*TESTED, *(pytest.param(one, marks=pytest.mark.nightly) for one in OTHERS)]
)
def test_every_family_classifies_and_describes_as_the_local_model(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "model")
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        model = classifier(swarm, tuning_mode="ptune", pre_seq_len=P)
        whole = local_twin(swarm, model)
        windows = getattr(model.config, "sliding_window", None)
        for side in ("right", "left"):
            given = batch(side)
            if windows and side == "left":  # padding between prompt and text is refused there
                continue
            with torch.no_grad():
                expected = prompted(whole, model.prompts.input, given)
                torch.testing.assert_close(model(**given).logits, expected, atol=1e-4, rtol=0)
        assert len({tuple(row.argsort().tolist()) for row in expected}) > 1 or expected.std() > 0.01
        model.prompts = None
        with torch.no_grad():
            torch.testing.assert_close(model(**given).logits, whole(**given).logits, atol=1e-4, rtol=0)
        bare = swarm.model(chosen=families.base_class)
        base = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        real = given["attention_mask"].bool()
        with torch.no_grad():
            found, wanted = (one(**given).last_hidden_state[real] for one in (bare, base))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_and_gradients_are_those_of_the_local_classifier(
    swarm: MemorySwarm, kind: str, side: str
) -> None:
    model = classifier(swarm, tuning_mode="ptune", pre_seq_len=P, problem_type=kind)
    whole = local_twin(swarm, model)
    whole.score.requires_grad_(True)
    prompt = model.prompts.input.detach().clone().requires_grad_()
    given, labels = batch(side), KINDS[kind]
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"score.weight", "prompts.input"}
    loss = model(**given, labels=labels).loss
    loss.backward()
    expected = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[kind](prompted(whole, prompt, given), labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(model.prompts.input.grad, prompt.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.score.weight.grad, whole.score.weight.grad, atol=1e-5, rtol=1e-4)


def test_a_prefix_before_a_classifier_is_exact(swarm: MemorySwarm) -> None:
    model = classifier(swarm, tuning_mode="prefix", pre_seq_len=P)
    random_prefix(model)
    whole = local_twin(swarm, model)
    whole.score.requires_grad_(True)
    prefix = Prefixed(local_model(swarm.checkpoint.name), model.prompts.values)
    given, labels = batch("right"), KINDS["single_label_classification"]
    whole.config.pad_token_id = model.config.pad_token_id = 0
    found = model(**given, labels=labels)
    found.loss.backward()
    mask = torch.nn.functional.pad(given["attention_mask"], (P, 0), value=1)
    cache = {cache_argument(whole.forward): prefix.cache(3), "use_cache": True}
    expected = whole(given["input_ids"], attention_mask=mask, labels=labels, **cache)
    expected.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.prompts.trained.grad, prefix.values.grad[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.score.weight.grad, whole.score.weight.grad, atol=1e-5, rtol=1e-4)


def test_a_trained_classifier_is_saved_loaded_copied_and_read_by_peft(
    swarm: MemorySwarm, tmp_path: Path
) -> None:
    names = {0: "bad", 1: "so-so", 2: "good"}
    model = classifier(swarm, tuning_mode="ptune", pre_seq_len=P, num_labels=None, id2label=names)
    given = batch("left")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(**given, labels=KINDS["single_label_classification"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        expected = model(**given).logits
        model.save_pretrained(tmp_path / "saved")
        again = classifier(swarm, prompts=tmp_path / "saved", num_labels=None)
        assert again.config.id2label == names
        assert again.config.label2id == {name: index for index, name in names.items()}
        assert again.config.num_labels == 3
        assert torch.equal(again(**given).logits, expected)
        assert again.score.weight.requires_grad
        assert torch.equal(copy.deepcopy(again)(**given).logits, expected)
        whole = local_twin(swarm, model)
        whole.score.weight.zero_()  # what counts is what was saved
        torch.testing.assert_close(
            PeftModel.from_pretrained(whole, tmp_path / "saved")(**given).logits, expected, atol=1e-4, rtol=0
        )
    other = classifier(swarm, tuning_mode="deep_ptune", pre_seq_len=P)
    other.save_pretrained(tmp_path / "deep")
    with torch.no_grad():
        deep = classifier(swarm, prompts=tmp_path / "deep")
        assert torch.equal(deep(**given).logits, other(**given).logits)
    plain = classifier(swarm)
    plain.save_pretrained(tmp_path / "head")
    with torch.no_grad():
        found = classifier(swarm, prompts=tmp_path / "head", seed=9)
        assert found.prompts is None
        assert torch.equal(found(**given).logits, plain(**given).logits)


def test_what_peft_has_trained_locally_is_loaded_and_peft_trains_over_the_swarm(
    swarm: MemorySwarm, tmp_path: Path
) -> None:
    given, labels = batch("left"), KINDS["single_label_classification"]
    remote = classifier(swarm)
    wrapped = []
    for base in (local_twin(swarm, remote), remote):
        torch.manual_seed(1)
        config = PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=P)
        wrapped.append(get_peft_model(base, config))
    gradients = []
    for one in wrapped:
        loss = one(**given, labels=labels).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
    wrapped[0].save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        found = classifier(swarm, prompts=tmp_path / "peft")(**given).logits
        torch.testing.assert_close(found, wrapped[0](**given).logits, atol=1e-4, rtol=0)


def test_a_new_head_is_drawn_by_the_seed_alone(swarm: MemorySwarm) -> None:
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    one, same, other = (classifier(swarm, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_labels": 0}, "num_labels is 0"),
        ({"num_labels": "2"}, "num_labels is '2'"),
        ({"id2label": ["bad", "good"]}, r"id2label is \['bad', 'good'\]; give a dictionary"),
        ({"num_labels": 2, "id2label": {0: "a"}}, "give one of them"),
        ({"problem_type": "guess"}, "problem_type is 'guess'"),
        ({"num_lables": 2}, "has no argument num_lables"),
    ],
)
def test_a_mistake_is_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        arguments.classifier("model", **options)


def test_a_family_without_a_classifier_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = write_tiny("cohere", tmp_path / "model")
    with MemorySwarm(folder, [(0, 4)]) as swarm:
        with pytest.raises(
            UnsupportedFamily, match="has no class for sequence classification of type cohere"
        ):
            classifier(swarm)
        assert swarm.model(chosen=families.base_class) is not None


def test_another_number_of_labels_than_was_saved_is_refused(swarm: MemorySwarm, tmp_path: Path) -> None:
    classifier(swarm).save_pretrained(tmp_path / "head")
    with pytest.raises(BundleError, match=r"score\.weight, which does not fit"):
        classifier(swarm, prompts=tmp_path / "head", num_labels=5)


def test_the_classes_have_the_names_that_people_know() -> None:
    for name in ("DistributedLlamaForSequenceClassification", "DistributedBloomModel"):
        assert callable(getattr(corolla, name).from_pretrained)
    with pytest.raises(AttributeError, match="no class"):
        _ = corolla.DistributedNonsenseForSequenceClassification
    with pytest.raises(UsageError, match=r"Use AutoDistributedModel\.from_pretrained"):
        corolla.AutoDistributedModel()


def test_no_answer_is_read_off_padding(swarm: MemorySwarm) -> None:
    given = batch("right")
    of_another_token = classifier(swarm, pad_token_id=2)  # the tokenizer's is 0
    with pytest.raises(UsageError, match=r"not the pad_token_id \(2\), and the attention mask says"):
        of_another_token(**given)
    model = classifier(swarm, pad_token_id=0)
    mask, embedded = given["attention_mask"], model.get_input_embeddings()(given["input_ids"])
    with pytest.raises(UsageError, match="A classifier reads a row's answer off its last token"):
        model(inputs_embeds=embedded, attention_mask=mask)
    with torch.no_grad():
        left = batch("left")
        embedded = model.get_input_embeddings()(left["input_ids"])
        found = model(inputs_embeds=embedded, attention_mask=left["attention_mask"]).logits
        torch.testing.assert_close(found, local_twin(swarm, model)(**left).logits, atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="pad_token_id is 999; this model has 256 tokens"):
        classifier(swarm, pad_token_id=999)
    with pytest.raises(UsageError, match="pad_token_id is '0'; give the number of a token"):
        classifier(swarm, pad_token_id="0")


def test_a_pad_token_that_was_added_is_there_again(swarm: MemorySwarm, tmp_path: Path) -> None:
    model, given = classifier(swarm), batch("right")
    model.resize_token_embeddings(257, mean_resizing=False)
    model.config.pad_token_id = 256
    given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, 256)
    model.save_pretrained(tmp_path / "added")
    again = classifier(swarm, prompts=tmp_path / "added")
    assert again.config.pad_token_id == 256
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)
