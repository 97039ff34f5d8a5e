"""Layers on CUDA's kernels: how their work is dealt, calls of them, and the bound on what they may be off by.

The bound, in roundings of 2^-24: a product of tensor cores is off by 22 of the largest of what it adds (kCut
in csrc/cuda/mma.h), there are at most 6 to 16 terms of a sum, and the sums of at most 8 warps and 8 blocks
are added one after another. Parts of numbers leave out 8 of a product (kLeftOut), two parts of three 512.
What an adapter adds is rounded to the result's dtype before the frozen product, torch's, is added to it.
"""

from __future__ import annotations

import math

import pytest
import torch

from pykernels.ref import lora_linear as ref
from pykernels.ref.lora_linear import Factors
from tests.bounds import U, half_ulp
from tests.lora_layers import kept_of, sizes
from tests.where import DEVICE, EMULATED, there

cuda = pytest.importorskip("pykernels.lora_linear_cuda", exc_type=ImportError)

ALL = 65536
KEY = 2**63 + 5
SHARED = 227 << 10
DEALS = {"default": (512, 128, True), "clusters": (32, 12, True), "no clusters": (32, 12, False)}
"""Columns up to which a block takes x and the result alone, blocks that a launch should have, clusters."""


def dealt(where: str) -> None:
    """Deal work so from now on; the true way on a device."""
    if EMULATED:
        block, blocks, clusters = DEALS[where]
        cuda._cuda.lora_regimes(block, blocks)
        cuda._cuda.regimes(96 << 10, 208 << 10, 32768, 4096, 1024, clusters, SHARED)


def nans(*shape, dtype):
    """A result that shows what was not written."""
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def put(c):
    """The case on the device."""
    adapters = [Factors(there(a.A), there(a.B), a.scaling) for a in c.adapters]
    return c._replace(
        adapters=adapters, **{k: there(v) for k, v in c._asdict().items() if isinstance(v, torch.Tensor)}
    )


def forward(c, threshold=ALL):
    """(out, h) of the kernels; rows of h without an adapter hold zeros, as the op has them."""
    rank = max((a.A.shape[0] for a in c.adapters), default=0)
    out, h = (
        nans(c.x.shape[0], c.weight.shape[0], dtype=c.x.dtype),
        nans(c.x.shape[0], rank, dtype=torch.float32),
    )
    if c.index is not None:
        h.zero_()
    cuda.lora_linear(out, h, *put(c)[:5], threshold, KEY)
    return out, h


def backward(c, h, threshold=ALL, *, weight=False):
    """All gradients of the kernels, as one list; that of the weight is torch's and seldom asked for."""
    like = [c.x, c.weight, *(a.A for a in c.adapters), *(a.B for a in c.adapters)]
    x, w, *low = (nans(*t.shape, dtype=t.dtype) for t in like)
    half, on = len(c.adapters), put(c)
    given = (on.grad, h, on.x, on.weight, on.adapters, on.index, threshold, KEY)
    cuda.lora_linear_backward(x, w if weight else None, low[:half], low[half:], *given)
    return [x, w, *low]


def products(terms: int) -> int:
    """Roundings of a sum of so many products by tensor cores."""
    return 22 * 6 * -(-terms // 16) + 16 + 8


def assert_near(got, truth, size, roundings, first=None):
    """Within g size and half a unit, and another half where ``first`` was rounded before the rest came."""
    room = roundings * U / (1 - roundings * U) * size
    allowed = room + half_ulp(truth.abs() + room, got.dtype) + 1e-38
    if first is not None:
        allowed = allowed + half_ulp(first.abs() + room, got.dtype) * 1.01
    off = (got.cpu().double() - truth).abs()
    bad = ~(off <= allowed)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} elements, up to {float((off / allowed).max()):.3g} of it"
    )


def check_forward(out, c, kept):
    """``out`` within the bound."""
    big, frozen = sizes(c, kept), c._replace(adapters=[], bias=None)
    truth = ref.lora_linear(*c[:5], kept)
    rank = max((a.A.shape[0] for a in c.adapters), default=0)
    count = products(c.x.shape[1]) + products(rank) + 512 + 5 + c.x.shape[1]
    assert_near(
        out, truth, ref.lora_linear(*big[:5], kept), count, truth - ref.lora_linear(*frozen[:5], kept)
    )


def check_backward(found, c, kept):
    """Gradients (x, not looked at the weight's, A of each, B of each) within their bounds."""
    truth, big = ref.lora_linear_backward(c.grad, *c[:4], kept), sizes(c, kept)
    size = ref.lora_linear_backward(big.grad, *big[:4], kept)
    rank, (m, n), k = max((a.A.shape[0] for a in c.adapters), default=0), c.grad.shape, c.x.shape[1]
    plain = truth.x - c.grad.double() @ c.weight.double()
    assert_near(found[0], truth.x, size.x, products(n) + products(rank) + 512 + 5 + n, plain)
    low, many = found[2:], len(c.adapters)
    for got, wanted, room in zip(low[:many], truth.A, size.A, strict=True):
        assert_near(got, wanted, room, products(m) + products(n) + 512 + m // 64 + 4)
    for got, wanted, room in zip(low[many:], truth.B, size.B, strict=True):
        assert_near(got, wanted, room, products(m) + products(k) + 512 + m // 64 + 4)


def check(c, threshold=ALL):
    """Forward and backward within their bounds."""
    kept = kept_of(c.x, threshold, KEY)
    out, h = forward(c, threshold)
    check_forward(out, c, kept)
    check_backward(backward(c, h, threshold), c, kept)
