"""Compressed activations: small, close, the same every time, and refused when they make no sense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.whole import decode

from corolla.config import SwarmConfig, WireFormat
from corolla.errors import ProtocolError, UsageError
from corolla.wire.frames import Packet, compress, encode, expand
from corolla.wire.messages import ClientMessage, Step

FORMS: list[tuple[WireFormat, float]] = [("float16", 5e-4), ("int8", 0.5 / 127 + 1e-6)]


def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize(("form", "error"), FORMS)
@given(
    rows=st.integers(1, 3), tokens=st.integers(1, 4), size=st.integers(1, 200), exponent=st.integers(-30, 30)
)
def test_values_come_back_close(
    form: WireFormat, error: float, rows: int, tokens: int, size: int, exponent: int
) -> None:
    values = noise(rows, tokens, size, scale=10.0**exponent)
    packet = Packet(Step(position=0), compress({"hidden": values}, form))
    found, came = expand(decode(b"".join(encode(packet)), ClientMessage).tensors)
    assert came == form
    assert set(found) == {"hidden"}
    largest = values.abs().amax(-1, keepdim=True)
    assert bool(((found["hidden"] - values).abs() <= error * largest).all())


@pytest.mark.parametrize(("form", "error"), FORMS)
def test_an_outlier_spoils_its_block_at_most(form: WireFormat, error: float) -> None:
    values = noise(1, 1, 256)
    values[0, 0, 3] = 1e4
    found, _ = expand(compress({"hidden": values}, form))
    difference = (found["hidden"] - values).abs()
    limit = error * (values[..., 64:].abs().max() if form == "int8" else 1e4)
    assert bool((difference[..., 64:] <= limit).all())


@pytest.mark.parametrize(("form", "share"), [("float16", 0.51), ("int8", 0.33)])
def test_they_are_small(form: WireFormat, share: float) -> None:
    values = noise(2, 8, 576)
    sent = compress({"hidden": values}, form)
    assert sum(tensor.nbytes for tensor in sent.values()) <= share * values.nbytes


@pytest.mark.parametrize("form", ["float16", "int8"])
def test_what_was_compressed_once_stays_as_it_is(form: WireFormat) -> None:
    once, _ = expand(compress({"grad": noise(1, 5, 100)}, form))
    twice, _ = expand(compress(once, form))
    torch.testing.assert_close(once["grad"], twice["grad"], rtol=1e-6, atol=1e-6)


def test_plain_tensors_stay_themselves() -> None:
    values = noise(1, 2, 3)
    found, form = expand(compress({"hidden": values}, "compute"))
    assert found["hidden"] is values
    assert form == "compute"


@pytest.mark.parametrize("form", ["float16", "int8"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_values_that_have_no_scale_break_nothing(form: WireFormat, value: float) -> None:
    found, _ = expand(compress({"hidden": torch.full((1, 1, 70), value)}, form))
    assert found["hidden"].shape == (1, 1, 70)
    assert value != 0.0 or not found["hidden"].any()
    assert value == 0.0 or not bool(torch.isfinite(found["hidden"]).any())


def test_scales_that_do_not_fit_are_refused() -> None:
    sent = compress({"hidden": noise(1, 2, 130)}, "int8")
    with pytest.raises(ProtocolError) as refused:
        expand(sent | {"hidden_scales": torch.ones(1, 2, 2)})
    assert refused.value.field == "hidden_scales"
    with pytest.raises(ProtocolError) as refused:
        expand({"hidden": sent["hidden"]})
    assert refused.value.field == "hidden"
    with pytest.raises(ProtocolError):
        expand({"hidden": noise(1, 2, 130), "hidden_scales": torch.ones(1, 2, 1)})


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UsageError, match="float16"):
        SwarmConfig(wire="int4")
