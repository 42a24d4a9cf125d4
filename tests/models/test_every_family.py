"""Every family of transformers is exact through a swarm, or refused in one sentence before it is served."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from tests.covering import every_time
from tests.models.every_family import FAMILIES, REPORT, compare, tiny

from corolla.errors import UnsupportedFamily
from corolla.models.checks.selfcheck import check_family

# Blocks that return tuples, norms without weights, positions that are added before the blocks, alibi, heads whose
# keys and values are of unlike widths, projections that are clipped in place; convolutions, recurrences that go on by
# one token at a time only, blocks with both, a choice of tokens that is cached; inputs of each block made of the token
# ids, keys and values that later blocks take from earlier ones, several streams; recurrences alone, which know no mask
# of earlier tokens; token ids themselves, and padding that changes what stands behind it; what the block before has
# returned; blocks with weights in common, and first embeddings in each; pairs of heads of keys and values; blocks of
# two layers each; tokens that an earlier block has chosen; embeddings of several tokens within blocks.
EXACT = (
    "gptj", "codegen", "olmo", "nanochat", "mpt", "gpt_neox_japanese", "biogpt", "deepseek_v3", "lfm2", "jamba",
    "falcon_h1", "qwen3_next", "deepseek_v32", "gemma4_text", "gemma3n_text", "mamba", "dbrx",
    "cohere_compass_text", "deepseek_v4", "zaya", "zamba", "zamba2", "diffllama", "longcat_flash", "hy_v4",
    "qwen4_exp_text",
)  # fmt: skip
# Of those that also take images or sound, the part that reads and writes text.
TEXT = (
    "gemma3", "mistral3", "qwen3_5", "qwen4_exp", "phi4_multimodal", "voxtral", "dots3_note",
    "moss_transcribe_diarize",
)  # fmt: skip
REFUSED = {
    "bert": "run by a part of the model",
    "doge": "choose among tokens with equal scores",
    "emu3": r"no blocks of their own, and those of the models in them \(vq_config, text_config\) are not split",
    "prophetnet": "an encoder and a decoder",
    "xlm": "not one list of layers",
    "dory": "do not run once each",
    "inkling2_text": "besides hidden states their blocks take what earlier blocks have made",
    "recurrent_gemma": "keep what they know of a sequence in themselves",
    "openai-gpt": "keeps no cache of keys and values",
    "xlstm": "a cache of their own kind",
}


# What the others of both lists show besides, another one shows too, or a test of its own.
OFTEN = (
    "gptj", "olmo", "nanochat", "mpt", "biogpt", "lfm2", "falcon_h1", "qwen3_next", "deepseek_v32", "gemma3n_text",
    "mamba", "gemma3", "hy_v4",
)  # fmt: skip


@pytest.mark.parametrize("family", every_time(OFTEN, [*EXACT, *TEXT]))
def test_a_family_is_exact(family: str, tmp_path: Path) -> None:
    compare(tiny(family), tmp_path)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedFamily, match=REFUSED[family]) as error:
        check_family(tiny(family))
    assert "\n" not in str(error.value)


def test_the_report_names_every_family() -> None:
    text = REPORT.read_text()
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip("written with another transformers")
    named = re.findall(r"^\| (\S+) \| (exact|refused|not compared) \|", text, re.M)
    assert [family for family, _ in named] == sorted(FAMILIES)
