"""merge_in_order on CUDA: bit for bit what the CPU's kernel gives, on each side of each edge of its tiles."""

from __future__ import annotations

import math

import pytest
import torch

import pykernels as pk
from pykernels import LoRA, backends
from pykernels.ops import merge_lora as ops
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.lora_cases import adapter, split, weight
from tests.test_cuda_merge_lora import on_device, placed
from tests.test_merge_lora import compiled, several
from tests.walls import Walls
from tests.where import DEVICE, EMULATED, there

kernels = pytest.importorskip("pykernels.merge_in_order_cuda", exc_type=ImportError)
if why := backends.missing("cuda"):
    pytest.skip(why, allow_module_level=True)

SHAPES = [
    (1, 1, (1,)), (15, 17, (31,)), (16, 16, (32,)), (17, 15, (33,)), (63, 127, (2, 1)), (64, 128, (64,)),
    (65, 129, (65,)), (47, 130, (7, 9)), (48, 40, (96,)), (49, 33, (40, 60)), (129, 20, (5,)),
]  # fmt: skip
"""Rows and columns beside those of threads (16) and tiles (64 or 48, 128), ranks beside a run (32) and where
chains are cut (64)."""


def run(w: torch.Tensor, adapters: list[LoRA], fan: bool = False, dtype=None) -> torch.Tensor:
    """The kernel's result; ``out`` starts as NaN."""
    out = torch.full(w.shape, math.nan, dtype=dtype or w.dtype, device=DEVICE)
    kernels.merge_in_order(out, there(w), *split(on_device(adapters)), fan)
    return out.cpu()


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-r{'+'.join(map(str, s[2]))}")
def test_bits_are_those_of_the_cpu(shape, fan):
    """All dtypes, of weights and factors, and magnitudes or none, in turn."""
    rows, cols, ranks = shape
    out, into = (cols, rows) if fan else (rows, cols)
    dtype, kind = DTYPES[(rows + fan) % 3], DTYPES[cols % 3]
    adapters = several(out, into, ranks, dtype=kind, dora=(rows + cols) % 2 == 1)
    w = weight(out, into, dtype, fan_in_fan_out=fan)
    assert_same_bits(run(w, adapters, fan), compiled(w, adapters, fan))


@pytest.mark.parametrize("order", ["D", "LDL", "LDLD"])
def test_magnitudes_one_after_another(order):
    """Also norms of rows in several blocks of 4096 columns."""
    rows, cols = (3, 4096 + 100) if order == "D" else (50, 70)
    adapters = [adapter(rows, cols, 3 + i, 10 * i, dora=kind == "D") for i, kind in enumerate(order)]
    for dtype in DTYPES:
        w = weight(rows, cols, dtype)
        assert_same_bits(run(w, adapters), compiled(w, adapters, False))


def test_signs_of_zero_and_what_is_not_finite():
    """A chain may end at -0, and the first run is not added to 0."""
    for ranks in ((3,), (70,)):
        adapters = several(20, 24, ranks)
        w = weight(20, 24, torch.float32)
        w[0], w[1, 2], w[3, 4], w[5, 6] = -0.0, math.nan, math.inf, -math.inf
        adapters[0].B[0] = -1e-38
        adapters[0].A[:, :8] = 1e-38
        adapters[0].A[1, 7], adapters[0].A[0, 9], adapters[0].B[8, 1] = math.inf, math.nan, -math.inf
        assert_same_bits(run(w, adapters), compiled(w, adapters, False))
        assert bool((run(w, adapters)[0, :7].view(torch.int32) == torch.tensor(-(2**31)).int()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_outputs_of_any_dtype_at_any_address(dtype):
    w, adapters = weight(18, 33, dtype), several(18, 33, (5,), dora=True)
    for to in (*DTYPES, torch.float64):
        assert_same_bits(run(w, adapters, dtype=to), compiled(w, adapters, False, dtype=to))
    wanted = run(w, adapters)
    if EMULATED:
        in_place = placed(w, 1)
        kernels.merge_in_order(in_place, in_place, *split(adapters), False)
        assert_same_bits(in_place, wanted)


def test_empty_weights():
    for shape in ((0, 4), (4, 0)):
        for fan in (False, True):
            out, into = shape[::-1] if fan else shape
            a = LoRA(torch.ones(1, into), torch.ones(out, 1), 1.0, torch.ones(out))
            assert run(torch.empty(shape), [a], fan).shape == shape


@pytest.mark.skipif(not EMULATED, reason="racecheck is the sanitizer's (bench/device.sh)")
@pytest.mark.parametrize("order", ["warps", "reverse"])
@pytest.mark.parametrize("fan", [False, True], ids=["rows", "columns"])
def test_no_bit_depends_on_which_warp_or_block_is_ahead(order, fan):
    out, into = (130, 70) if fan else (70, 130)
    w, adapters = (
        weight(out, into, torch.bfloat16, fan_in_fan_out=fan),
        several(out, into, (40, 30), dora=True),
    )
    wanted = compiled(w, adapters, fan)
    try:
        getattr(kernels._cuda, order)(True)
        assert_same_bits(run(w, adapters, fan), wanted)
    finally:
        getattr(kernels._cuda, order)(False)


@pytest.mark.memory
@pytest.mark.skipif(not EMULATED, reason="compute-sanitizer watches the device's memory (bench/device.sh)")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_nothing_outside_is_touched(at_end, monkeypatch):
    """Sums and factors too, which the wrapper makes."""
    for name in ("merge_in_order", "squares_in_order"):
        monkeypatch.setattr(kernels._cuda, name, Walled(getattr(kernels._cuda, name), at_end))
    for rows, cols, dtype in ((1, 3, torch.bfloat16), (65, 129, torch.float32), (49, 40, torch.float16)):
        for fan in (False, True):
            out, into = (cols, rows) if fan else (rows, cols)
            w = weight(out, into, dtype, fan_in_fan_out=fan)
            adapters = [*several(out, into, (33,)), adapter(out, into, 2, 3, dora=True)]
            assert_same_bits(run(w, adapters, fan), compiled(w, adapters, fan))


class Walled:
    """A launch whose tensors are moved between guard pages, and its output back."""

    def __init__(self, launch, at_end):
        self.launch, self.at_end, self.squares = launch, at_end, "squares" in launch.__name__

    def __call__(self, out, code, at, dtype, rows, cols, left, right, rank, scale, by_column, *where):
        walls, single = Walls(), (torch.float32, torch.bfloat16, torch.float16)
        sums = (-(-rows // 48) * cols) if by_column else -(-cols // 4096) * rows
        wide = torch.float64 if self.squares else single[code]
        mine = walls.place(
            memory(out, sums if self.squares else rows * cols, wide).clone(), at_end=self.at_end
        )
        given = (
            (at, rows * cols, single[dtype]),
            (left, rows * rank, single[0]),
            (right, rank * cols, single[0]),
        )
        moved = [walls.place(memory(*tensor).clone(), at_end=self.at_end).data_ptr() for tensor in given]
        per = (
            walls.place(memory(scale, cols if by_column else rows, single[0]).clone(), at_end=self.at_end)
            if scale
            else None
        )
        self.launch(
            mine.data_ptr(), code, moved[0], dtype, rows, cols, moved[1], moved[2], rank,
            0 if per is None else per.data_ptr(), by_column, *where,
        )  # fmt: skip
        memory(out, mine.numel(), wide).copy_(mine)


def memory(address: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over an address."""
    import ctypes

    room = (ctypes.c_uint8 * (numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(room, dtype=dtype)


def test_the_op_chooses_the_backend_and_says_where_it_runs():
    w, adapters = weight(40, 60, torch.bfloat16), several(40, 60, (4, 2), dora=True)
    wanted = compiled(w, adapters, False)
    assert_same_bits(ops.merge_in_order(w, adapters), wanted)
    assert ops.serves_in_order(torch.device("cpu"))
    with pk.use_backend("cuda"):
        assert_same_bits(ops.merge_in_order(there(w), on_device(adapters)).cpu(), wanted)
    with pk.use_backend("ref"):
        assert not ops.serves_in_order(torch.device("cpu"))
        with pytest.raises(RuntimeError, match=r"merge_in_order: no backend has it for .* on cpu"):
            ops.merge_in_order(w, adapters)


def test_a_launch_that_fails_says_what_it_was_for(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("out of patience")

    monkeypatch.setattr(kernels._cuda, "merge_in_order", refuse)
    with pytest.raises(RuntimeError, match=r"merge_in_order: launch on .* shape \[3, 4\] failed: out of"):
        run(weight(3, 4, torch.float32), several(3, 4, (1,)))
