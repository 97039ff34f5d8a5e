"""Philox4x32-10 (Salmon et al., 2011, Parallel Random Numbers: As Easy as 1, 2, 3) and the layout of masks.

Stateless: a draw depends on nothing but the key (seed and tensor name), the model's index and the flat index.
"""

from __future__ import annotations

import hashlib

import torch

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFF_FFFF
TILE, LANES = 128, 16


def mask_key(seed: int, name: str) -> int:
    """The 64-bit key of a tensor's masks: blake2b of the seed (8 bytes, little endian) and the UTF-8 name."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def philox(counter: tuple[torch.Tensor, ...], key: int) -> tuple[torch.Tensor, ...]:
    """Four counter words [*S] and a 64-bit key -> four random words [*S]; int64 tensors of 32 bits each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32
    for _ in range(10):
        low0, high0 = _product(c0, MULTIPLIERS[0])
        low1, high1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def draws(
    key: int, model: int, offset: int, count: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """The 16-bit draws of elements offset .. offset + count - 1 of a tensor [count], int64 in 0..65535.

    128 consecutive elements are a tile, drawn by 16 calls (lanes l) with counter (c low, c high, model, 0),
    c = 16 * tile + l. Word j of lane l is for elements 32j + 2l (low half) and 32j + 2l + 1 (high half).
    """
    first, last = offset // TILE, -(-(offset + count) // TILE)
    c = torch.arange(first * LANES, last * LANES, device=device)
    words = philox((c & WORD, c >> 32, torch.full_like(c, model), torch.zeros_like(c)), key)
    by_tile = torch.stack([w.reshape(-1, LANES) for w in words], dim=1)
    halves = torch.stack([by_tile & 0xFFFF, by_tile >> 16], dim=-1).reshape(-1)
    return halves[offset - first * TILE :][:count]


def _product(word: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    product = word * multiplier  # wraps past 2**63, which leaves the bits right
    return product & WORD, (product >> 32) & WORD
