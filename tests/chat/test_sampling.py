"""Which settings are refused, and what `generate` is told."""

from __future__ import annotations

from typing import Any

import pytest

from corolla.chat.sampling import SamplingSettings
from corolla.errors import BundleError, UsageError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-39),
        ("temperature", 1e308),
        ("repetition_penalty", 1e-320),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("seed", 2**64),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_its_flag(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        SamplingSettings(**{name: value})


def test_a_bundle_may_name_some_settings() -> None:
    settings = SamplingSettings.from_dict({"temperature": 0, "top_k": 7, "allow_empty": True})
    assert settings == SamplingSettings(temperature=0, top_k=7, allow_empty=True)
    assert SamplingSettings.from_dict({}).allow_empty is False


@pytest.mark.parametrize(
    "values", [{"warmth": 1}, {"top_k": "7"}, {"top_k": True}, {"top_p": 3.0}, {"allow_empty": 1}]
)
def test_a_bundle_with_other_settings_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="sampling"):
        SamplingSettings.from_dict(values)


def test_temperature_zero_is_greedy() -> None:
    assert SamplingSettings(temperature=0, top_k=5, top_p=0.5).generate_arguments()["do_sample"] is False
    sampled = SamplingSettings(temperature=0.5, top_k=5, top_p=0.5).generate_arguments()
    assert (sampled["do_sample"], sampled["temperature"]) == (True, 0.5)
    assert (sampled["top_k"], sampled["top_p"]) == (5, 0.5)
