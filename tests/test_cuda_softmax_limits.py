"""CUDA's softmax where the device matters: rows that older ones split, and graphs."""

from __future__ import annotations

import math

import pytest
import torch

from pykernels import cuda
from tests.bounds import assert_same_bits
from tests.cases import DTYPES
from tests.softmax_cases import drawn, units
from tests.test_cuda_softmax import back, close_gradient, regime, run
from tests.where import EMULATED, there

__all__ = ["regime"]  # a fixture that every test here takes


@pytest.mark.skipif(not EMULATED, reason="a device has its own limits")
@pytest.mark.parametrize(
    ("where", "n", "dtype"),
    [("sm_89", 24_577, DTYPES[0]), ("sm_89", 50_000, DTYPES[2]), ("sm_80", 40_961, DTYPES[0])],
)
def test_rows_that_older_devices_split(where, n, dtype):
    x = drawn("3 randn", (1, n, 1), n).to(dtype)
    assert units(run(x), torch.softmax(x.double(), 1)).max() <= (3 if dtype == torch.float32 else 0.52)


@pytest.mark.skipif(not EMULATED, reason="a device has its own limits")
@pytest.mark.parametrize(
    ("where", "n", "grad_dtype", "dtype"),
    [("sm_80", 16_385, DTYPES[0], DTYPES[0]), ("sm_80", 24_577, DTYPES[0], DTYPES[1]),
     ("sm_89", 12_289, DTYPES[0], DTYPES[0]), ("sm_89", 32_769, DTYPES[1], DTYPES[1])],
)  # fmt: skip
def test_gradients_of_rows_that_older_devices_split(where, n, grad_dtype, dtype):
    """Too long for their shared memory, though no longer than a chunk."""
    y, grad = drawn("3 randn", (1, n, 1)).softmax(1).to(dtype), drawn("3 randn", (1, n, 1), 1).to(grad_dtype)
    close_gradient(back("softmax_backward", grad, y, torch.float32), "softmax_backward", grad, y)


@pytest.mark.skipif(EMULATED, reason="no CUDA device")
@pytest.mark.parametrize("n", [100, 4096, 40_000, 1_000_003])
def test_in_a_cuda_graph_on_a_stream_of_its_own(n):
    """A warp's rows, a block's, a cluster's, and chunks with scratch memory."""
    x = there(drawn("3 randn", (2, n, 1)))
    out = torch.full_like(x, math.nan)
    cuda.softmax(out, x, 1.0, None, None, None, False)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.softmax(out, x, 1.0, None, None, None, False)
    x.copy_(x.flip(1))
    graph.replay()
    assert_same_bits(out.cpu(), run(x.cpu()))
