"""Which number format a machine should compute in.

Invariant: `auto` never picks a format that this machine's matrix products emulate; it looks at the machine
first and at the checkpoint second.
"""

from __future__ import annotations

import torch

from corolla.errors import UsageError

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_dtype(
    requested: str, checkpoint_dtype: torch.dtype | None, device: torch.device | str
) -> torch.dtype:
    """The dtype to compute in on `device`.

    `requested` is a name in `DTYPES` or `auto`: the checkpoint's own where the machine multiplies it at full
    speed, else float32 (a CPU without AVX-512 bf16 runs bfloat16 at 2 GFLOP/s and float32 at 140).
    Raises `UsageError` for another name.
    """
    if requested != "auto":
        if requested not in DTYPES:
            raise UsageError(f"Unknown dtype {requested!r}; use auto, {', '.join(DTYPES)}.")
        return DTYPES[requested]
    wanted = checkpoint_dtype or torch.float32
    if wanted in (torch.float32, torch.float64):
        return wanted
    return wanted if _is_fast(wanted, torch.device(device)) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` to `bfloat16`, the spelling used in announcements."""
    return str(dtype).removeprefix("torch.")


def _is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return dtype == torch.bfloat16 and has_bf16
    return True
