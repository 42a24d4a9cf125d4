"""Whether a family's own code computes a token by itself otherwise than among others: seen in a miniature, once a
process.

Some bound the length of a recurrence's time steps in passes of several tokens only. It is more than rounding, so what
a session has computed token by token must come so again where it is computed anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checks.miniature import EDGE, miniature
from corolla.models.checks.padding import has_states
from corolla.models.checks.splitting import split_miniature
from corolla.models.span import Span

ROWS, FIRST = 8, 3
ROUNDING = 1e-5  # of the largest value: ten times what another arrangement of the same sums makes

_found: dict[bytes, bool] = {}


def steps_differ(config: PretrainedConfig) -> bool:
    """Whether steps of one token behind others give something else than one pass over all, by more than rounding.

    Keys and values make no such difference. Raises whatever the family's code makes of its miniature.
    """
    if not has_states(config):
        return False
    key = canonical_config(miniature(config).to_dict())
    if key not in _found:
        with split_miniature(config) as (_, spans), torch.no_grad():
            _found[key] = not _same_steps(spans)
    return _found[key]


def _same_steps(spans: list[Span]) -> bool:
    value = torch.randn(ROWS, EDGE, spans[0].width).to(spans[0].device)
    for span in spans:
        found, wanted = _in_steps(span, value), span.forward(value)
        if bool((found - wanted).abs().max() > ROUNDING * (1 + wanted.abs().max())):
            return False
        value = wanted
    return True


def _in_steps(span: Span, hidden: Tensor) -> Tensor:
    """The first few tokens at once, the others one by one."""
    cache = span.new_cache()
    parts = [span.forward(hidden[:, :FIRST], cache=cache)]
    parts += [span.forward(hidden[:, at : at + 1], cache=cache) for at in range(FIRST, hidden.shape[1])]
    return torch.cat(parts, 1)
