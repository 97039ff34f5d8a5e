"""The upper half of the fixed tree of every floating reduction: kernels sum blocks, this adds them."""

from __future__ import annotations

import torch


def add_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """blocks [b, *S], float64 -> [*S]: neighbours are added until one is left; zeros where b = 0."""
    if len(blocks) == 0:
        return blocks.new_zeros(blocks.shape[1:])
    while len(blocks) > 1:
        if len(blocks) % 2:
            blocks = torch.cat([blocks, torch.zeros_like(blocks[:1])])
        blocks = blocks[0::2] + blocks[1::2]
    return blocks[0]
