"""Exact k-th largest magnitude of task vectors, and the selection it stands for."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch

from pykernels import backends, check, library

OP = "kth_magnitude"
DIGIT = 16
"""Bits of a key that one histogram round settles."""


def kth_magnitude(
    base: torch.Tensor | None, tuned: Sequence[torch.Tensor], density: float | Sequence[float]
) -> torch.Tensor:
    """The k-th largest |tuned - base| of every model, exact, without a task vector in memory.

    k = max(1, int(density * numel)), 0 for density 0 (Decision g of the package's method notes).

    Args:
        base: contiguous tensor [*S], or None when ``tuned`` holds task vectors already.
        tuned: 1 to 64 contiguous tensors [*S] of base's dtype.
        density: kept fraction in [0, 1], a number or one per model.

    Returns:
        Tensor [n], float32 (float64 for float64 inputs); +Inf where k = 0; NaN ranks above Inf; 0 for no
        elements.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    if library.needed():
        inputs = library.inputs(OP, base, tuned)
        return library.call(OP, None, *inputs, check.density(OP, density, len(tuned)))
    return _run(base, tuned, density)


def _run(
    base: torch.Tensor | None, tuned: Sequence[torch.Tensor], density: float | Sequence[float]
) -> torch.Tensor:
    like = check.tensors(OP, base, tuned)
    k = counts(check.density(OP, density, len(tuned)), like.numel())
    wide = like.dtype == torch.float64
    if like.numel() == 0:
        return like.new_zeros(len(tuned), dtype=torch.float64 if wide else torch.float32)
    key = backends.call(OP, like)(base, list(tuned), k).key
    if isinstance(key, torch.Tensor):
        return _magnitudes(key)
    for i in (i for i, count in enumerate(k) if count == like.numel()):
        key[i] = _smallest(base, tuned[i])
    values = [math.inf if count == 0 else _magnitude(x, wide) for x, count in zip(key, k, strict=True)]
    return torch.tensor(values, dtype=torch.float64 if wide else torch.float32, device=like.device)


def counts(density: Sequence[float], numel: int) -> list[int]:
    """k per model: int(density * numel) in binary64, at least 1 unless the density is 0."""
    return [0 if d == 0 else min(numel, max(1, int(d * numel))) for d in density]


def _smallest(base: torch.Tensor | None, tuned: torch.Tensor) -> int:
    """The smallest key of a model: what k = numel asks for, though its cut keeps all without a search."""
    key = 0
    for shift in range((64 if tuned.dtype == torch.float64 else 32) - DIGIT, -1, -DIGIT):
        bins = backends.call("magnitude_histogram", tuned)(base, [tuned], shift, [key])
        key = key << DIGIT | int(bins[0].nonzero()[0])
    return key


def _magnitudes(key: torch.Tensor) -> torch.Tensor:
    """Keys [n] on their device as float32; past all floats stands the key of k = 0."""
    key = torch.where(key > 0x7F800000, torch.where(key > 0x7FFFFFFF, 0x7F800000, 0x7FC00000), key)
    return key.to(torch.int32).view(torch.float32)


def _magnitude(key: int, wide: bool) -> float:
    if key > (0x7FF << 52 if wide else 0x7F800000):
        return math.nan
    value: float
    [value] = (
        struct.unpack("<d", struct.pack("<Q", key)) if wide else struct.unpack("<f", struct.pack("<I", key))
    )
    return value


def _fake(base: torch.Tensor | None, tuned: list[torch.Tensor], density: list[float]) -> torch.Tensor:
    like = check.tensors(OP, base, tuned)
    check.density(OP, density, len(tuned))
    return like.new_empty(len(tuned), dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


library.define(OP, "Tensor? base, Tensor[] tuned, float[] density", _run, _fake, out=False)
