"""The fixed tree of every floating reduction: float64 sums over blocks of 4096 flat elements."""

from __future__ import annotations

import torch

from pykernels.ref.delta import in_order

BLOCK, LANES = 4096, 16


def block_sums(terms: torch.Tensor) -> torch.Tensor:
    """Sum of terms [*S], float64, per block of 4096 flat elements -> [blocks], float64.

    In a block, lane l of 16 starts at +0 and adds elements l, l + 16, ... in order; then neighbouring lanes
    are added until one is left.
    """
    flat = terms.reshape(-1)
    blocks = -(-flat.numel() // BLOCK)
    padded = torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.numel()))
    lanes = in_order(
        (flat.new_zeros(blocks, LANES), *padded.reshape(blocks, BLOCK // LANES, LANES).unbind(1))
    )
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes[:, 0]
