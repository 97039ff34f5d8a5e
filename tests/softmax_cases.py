"""Rows, inputs and measures that tests of softmax share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from pykernels.ref import softmax as truth

INF, NAN = math.inf, math.nan
LEAST, MOST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max

SPECIAL: dict[str, list[float]] = {
    "all -inf": [-INF] * 4,
    "some -inf": [1, -INF, 2, -INF],
    "one inf": [1, INF, 2],
    "two inf": [INF, 0, INF],
    "inf and -inf": [INF, -INF],
    "nan": [1, NAN, 2],
    "nan among -inf": [-INF, NAN, -INF],
    "nan and inf": [INF, NAN, 0],
    "single": [3],
    "single -inf": [-INF],
    "single inf": [INF],
    "single nan": [NAN],
    "some least": [1, LEAST, 2, LEAST],
    "all least": [LEAST] * 4,
    "least and -inf": [LEAST, -INF],
    "most": [MOST, 0],
    "1e4": [1e4, -1e4, 9999],
    "1e30": [1e30, -1e30],
    "1e8": [1e8, 1e8 - 16],
    "denormal results": [0, -87.5, -95, -103, -104],
    "denormals": [1e-40, 2e-42, 0.0],
    "signed zeros": [0.0, -0.0],
}
"""By name; what they must give is what torch gives."""


def without_shortcuts() -> Iterator[None]:
    """For a fixture: Python is asked what tensors are, as where torch's library does not say."""
    from pykernels import everyday

    assert not everyday._C.take_shortcuts(torch._C.__file__, torch.Tensor, [])
    yield
    everyday.take_shortcuts()


def drawn(kind: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Logits as float32: of a language model, spread, flat, far from 0, rising, masked, or equal."""
    g = torch.Generator().manual_seed(seed)
    normal, uniform = torch.randn(shape, generator=g), torch.rand(shape, generator=g)
    if kind == "masked":
        return (3 * normal).masked_fill(uniform < 0.2, -INF)
    if kind == "ramp":
        return torch.linspace(-50, 50, math.prod(shape)).reshape(shape)
    return {
        "3 randn": 3 * normal,
        "30 randn": 30 * normal,
        "wide": 2e4 * uniform - 1e4,
        "far": normal + 1e4,
        "small": -80 * uniform,
        "denormal": -110 * uniform,
        "equal": torch.full(shape, 0.7),
    }[kind]


LOG_ROOM = 2**-23
"""What an exponential may be off by, relatively, is absolute in a logarithm of sums."""

KINDS = ("3 randn", "30 randn", "wide", "far", "small", "denormal", "equal", "ramp", "masked")

_DIGITS = {torch.float32: (24, -126), torch.bfloat16: (8, -126), torch.float16: (11, -14)}


def units(got: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """|got - truth| in units in the last place of got's dtype at ``truth`` (float64); 0 where both are NaN.

    Infinite where one is NaN or infinite and the other is not the same.
    """
    digits, least = _DIGITS[got.dtype]
    exponent = (torch.frexp(truth).exponent - 1).clamp(min=least) - (digits - 1)
    off = (got.double() - truth).abs() / torch.ldexp(torch.ones_like(truth), exponent)
    same = (got.double() == truth) | (got.isnan() & truth.isnan())
    return torch.where(same, 0.0, off.nan_to_num(INF, INF, INF))


def exact(x, dim, temperature=1.0, mask=None, softcap=None, sink=None):
    """(softmax, log_softmax, logsumexp) in float64, of logits rounded step by step as kernels round them."""
    z = truth.logits(x, temperature, softcap, None if mask is None else mask.expand(x.shape))
    row = truth.with_sink(truth.row_sum(z, dim), sink)
    return truth.softmax(z, row, False), truth.log_softmax(z, row, False), truth.logsumexp(row)


def close(got, wanted, dtype):
    """Equal but for 5 units in the last place of float32, or one rounding to 16 bits."""
    assert got.dtype == dtype and got.shape == wanted.shape and got.is_contiguous()
    if dtype == torch.float64:
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-300, equal_nan=True)
    elif got.numel():
        assert units(got, wanted).max() <= (5 if dtype == torch.float32 else 0.51)


def close_sum(got, wanted, dtype):
    """A logarithm of a sum: one rounding, and what the sum is off by."""
    assert got.dtype == dtype and got.shape == wanted.shape
    room = 1e-13 if dtype == torch.float64 else LOG_ROOM
    rounding = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=room, equal_nan=True)
