"""What the rows of every compiled backend share: codes of dtypes and elections, outputs in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pykernels import grouping

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As ``DType`` in csrc/math/dtype.h."""
MASKS = {**CODES, torch.bool: 3}
"""As ``MaskKind`` in csrc/cpu/softmax_jobs.h."""
COMBINE = {None: 0, "weighted": 1, "plain": 2}
NONE_KEPT = 0xFFFF_FFFF
"""A key above all others; keys of cuts are 32 bits in the kernels."""
SUM_BLOCK = 4096
"""Elements of a block of the sums in float64 (l1_norms, dot_products)."""
_PIECE = 1 << 18


def through_float32(function: Callable[..., None], out: torch.Tensor, *args: object) -> None:
    """float64 outputs of narrower inputs: the float32 result, in the back half of ``out``, widened."""
    flat = out.view(-1)
    narrow = flat.view(torch.float32)[flat.numel() :]
    with grouping.alone():
        function(narrow.view(out.shape), *args)
    for start in range(0, flat.numel(), _PIECE):  # front to back: never over what is still to be read
        flat[start : start + _PIECE] = narrow[start : start + _PIECE].clone()


def add_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """blocks [b, *S], float64 -> [*S]: neighbours are added until one is left; zeros where b = 0.

    The upper half of the fixed tree of every floating reduction: kernels sum blocks, this adds them.
    """
    if len(blocks) == 0:
        return blocks.new_zeros(blocks.shape[1:])
    while len(blocks) > 1:
        if len(blocks) % 2:
            blocks = torch.cat([blocks, torch.zeros_like(blocks[:1])])
        blocks = blocks[0::2] + blocks[1::2]
    return blocks[0]
