"""One rounding from float64 to any output dtype, with the canonical NaN."""

from __future__ import annotations

import torch

NAN = {
    torch.float16: (torch.int16, 0x7E00),
    torch.bfloat16: (torch.int16, 0x7FC0),
    torch.float32: (torch.int32, 0x7FC0_0000),
    torch.float64: (torch.int64, 0x7FF8_0000_0000_0000),
}


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exact [*S], float64 -> [*S] in ``dtype``: to nearest even, once; all NaN become the canonical one."""
    narrow = odd_float32(exact) if dtype in (torch.float16, torch.bfloat16) else exact
    rounded = narrow.to(dtype)
    if dtype in NAN:
        bits, canonical = NAN[dtype]
        rounded.view(bits).masked_fill_(exact.isnan(), canonical)
    return rounded


def odd_float32(exact: torch.Tensor) -> torch.Tensor:
    """float64 -> float32 rounded to odd: towards zero, then the last bit set where anything was lost.

    What is lost stays visible in the last bit, so a second rounding to 16 bits gives what a single one would.
    """
    near = exact.to(torch.float32)
    bits = near.view(torch.int32) - (near.double().abs() > exact.abs()).to(torch.int32)
    return torch.where(near.double() == exact, bits, bits | 1).view(torch.float32)
