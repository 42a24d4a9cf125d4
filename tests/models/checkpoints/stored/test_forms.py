"""Every way to store weights gives the weights that are meant, as `tests/stored_models.py` has them by definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.stored_models import FORMS, write_stored

from corolla.models.checkpoints.checkpoint import open_checkpoint


def everything(_name: str) -> bool:
    return True


@pytest.mark.parametrize("form", [*FORMS, "mxfp4"])
def test_weights_are_those_that_are_meant(tmp_path: Path, form: str) -> None:
    family = "gpt_oss" if form == "mxfp4" else "llama"
    stored, plain = (
        open_checkpoint(str(one)) for one in write_stored(form, tmp_path, family=family, layers=2)
    )
    assert stored.stored_as
    assert plain.stored_as is None
    meant = plain.tensors(everything)
    found = stored.tensors(everything, widen_to=torch.float32)
    assert set(found) == set(meant)
    for name, tensor in meant.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(
            found[name], tensor, rtol=2e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    narrow = stored.tensors(everything, widen_to=torch.bfloat16)
    for name, tensor in meant.items():
        torch.testing.assert_close(narrow[name].float(), tensor, rtol=2**-7, atol=1e-6)
    changed = [name for name in meant if not torch.equal(narrow[name].float(), tensor)]
    assert changed
    assert stored.elements(everything) == plain.elements(everything)
    assert stored.stored_bytes(everything) < plain.stored_bytes(everything)
