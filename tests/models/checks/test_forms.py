"""What is read off a family's code by trying it on a miniature, whatever the CPU's products round."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from tests.models.every_family import tiny
from tests.tiny_models import FAMILIES, write_tiny
from transformers import AutoConfig

from corolla.errors import CorollaError, UnsupportedFamily
from corolla.models.checks import forms

ONE_SEQUENCE = {
    "bloom",
    "opt",
    "gpt_oss",
}  # locally too: positions of another kind, or masks that do not look at them


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_one_row_are_told_apart_by_most(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "_flat_rows", {})
    config = AutoConfig.from_pretrained(write_tiny(family, tmp_path))
    assert forms.reads_flat_rows(config) == (family not in ONE_SEQUENCE)


def test_an_argument_that_no_block_reads_is_none_that_is_left_out() -> None:
    """Each block of the former chooses its own tokens, the latter's take what entered earlier blocks."""
    forms.refuse_what_is_left_out(tiny("glm_moe_dsa"))
    assert not forms.cuts_of(tiny("glm_moe_dsa")).passed
    with pytest.raises(UnsupportedFamily, match="what earlier blocks have made"):
        forms.refuse_what_is_left_out(tiny("inkling2_text"))


@pytest.mark.parametrize("error", [OSError(errno.EFBIG, "File too large"), ValueError("odd (os error 28)")])
def test_a_full_disk_is_not_the_fault_of_a_family(error: Exception) -> None:
    with (
        pytest.raises(CorollaError, match=r"^The disk is full \(") as raised,
        forms.refusing(tiny("llama"), ""),
    ):
        raise error
    assert not isinstance(raised.value, UnsupportedFamily)


def test_another_error_of_the_system_is() -> None:
    with pytest.raises(UnsupportedFamily, match="cannot be served"), forms.refusing(tiny("llama"), "served"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "odd.json")


@pytest.mark.parametrize("family", ["trocr", "whisper"])
def test_a_cache_of_which_the_family_s_code_does_not_say_the_kind_is_any(family: str) -> None:
    assert forms.cuts_of(tiny(family)).plain


def test_padding_in_front_is_asked_of_transformers_itself() -> None:
    """deepseek_v4 puts tokens together by their places; opt counts places without padding."""
    families = ("llama", "opt", "bloom", "deepseek_v4")
    assert [forms.takes_padding_in_front(tiny(family)) for family in families] == [True, True, True, False]


def test_cuts_are_measured_where_rotary_embeddings_change_with_the_length() -> None:
    config = tiny("gemma4_text")
    plain = forms.cuts_of(config)
    config.max_position_embeddings = 64
    config.rope_parameters["sliding_attention"] |= {"rope_type": "dynamic", "factor": 2.0}
    assert forms.cuts_of(config) == plain
