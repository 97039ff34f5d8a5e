"""csrc/cuda/mma.h: which lane holds what, what tensor cores cut off, and numbers as sums of bf16."""

from __future__ import annotations

import math

import pytest
import torch

from pykernels import cuda
from pykernels.rows import CODES
from tests.where import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="the kernel around a single product is emulated alone")
CUT = 11 * 2.0**-23
"""As ``kCut`` in csrc/cuda/mma.h."""
HALVES = [torch.bfloat16, torch.float16]


def multiplied(start: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """start + left @ right by one warp's product."""
    out = start.clone()
    cuda._cuda.multiply(out.data_ptr(), left.data_ptr(), right.data_ptr(), CODES[left.dtype])
    return out


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_element_is_where_it_belongs(dtype):
    """Small integers: exact, and no two rows, columns or ranks alike."""
    left = (torch.arange(256) * 7 % 31).view(16, 16).to(dtype)
    right = (torch.arange(128) * 5 % 29).view(16, 8).to(dtype)
    start = torch.arange(128).view(16, 8).float()
    assert torch.equal(multiplied(start, left, right), start + left.float() @ right.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_cut_off_is_within_the_bound_and_is_cut_off(dtype):
    left, right = normal(16, 16, seed=0, dtype=dtype), normal(16, 8, seed=1, dtype=dtype)
    start = normal(16, 8, seed=2)
    exact = start.double() + left.double() @ right.double()
    most = start.double().abs() + left.double().abs() @ right.double().abs()
    off = (multiplied(start, left, right).double() - exact).abs()
    assert bool((off <= CUT * most).all()) and bool(off.any())


def test_what_is_not_finite_comes_through():
    left, right = torch.ones(16, 16).bfloat16(), torch.ones(16, 8).bfloat16()
    left[3, 5], left[9, 1] = math.inf, math.nan
    out = multiplied(torch.zeros(16, 8), left, right)
    assert bool((out[3] == math.inf).all()) and bool(out[9].isnan().all()) and float(out[0, 0]) == 16


def parts(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(*x.shape, 3, dtype=torch.bfloat16)
    cuda._cuda.split(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def test_three_parts_are_the_number():
    largest = torch.finfo(torch.float32).max
    x = torch.cat([normal(1000, seed=3), torch.tensor([0.0, -0.0, largest, -largest, 1e-30, 3.1e38])])
    assert torch.equal(parts(x).double().sum(1), x.double()) and bool(parts(x)[-4:-2].isfinite().all())
    halves = normal(1000, seed=4, dtype=torch.float16).float()
    assert not bool(parts(halves)[:, 2].any()) and not bool(parts(x.bfloat16().float())[:, 1:].any())


def test_parts_of_what_is_not_finite_are_itself_and_nothing():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    got = parts(x)
    assert torch.equal(got[:2, 0].float(), x[:2]) and bool(got[2, 0].isnan()) and not bool(got[:, 1:].any())
    low = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # would be cut off to infinity
    assert bool(parts(low)[0, 0].isnan())
