"""Miniatures are made where and as they should be, however often they are asked for."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_config
from torch.utils._device import DeviceContext

from corolla.models.checks import miniature as made
from corolla.models.checks.miniature import miniature, undisturbed


def test_each_check_has_one_of_its_own() -> None:
    config = tiny_config("llama")
    first = miniature(config)
    first.hidden_size, first._attn_implementation = 1, "eager"
    again = miniature(config)
    assert (again.hidden_size, again._attn_implementation) == (64, config._attn_implementation)
    config.attention_bias = not config.attention_bias
    assert miniature(config).attention_bias == config.attention_bias


def test_it_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", rope_theta=12345.0)
    miniature(config)
    monkeypatch.setattr(made, "_in_small", None)
    miniature(config)


def test_on_the_cpu_whatever_is_set_around_and_with_no_detour_where_nothing_is() -> None:
    with torch.device("meta"), undisturbed():
        assert torch.empty(1).device.type == "cpu"
    with undisturbed():
        modes = [torch.overrides._get_current_function_mode()]
        assert torch.empty(1).device.type == "cpu"
    assert not any(isinstance(one, DeviceContext) for one in modes)
