"""merge_lora against float64: every instruction set, dtype, orientation and edge of a tile."""

from __future__ import annotations

import math

import pytest
import torch

import pykernels as pk
from pykernels import LoRA
from pykernels.ref.rounding import NAN, round_once
from tests import walls
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.lora_cases import adapter, assert_merged, random, split, truth, weight

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
merge_lora_cpu = pytest.importorskip("pykernels.merge_lora_cpu", exc_type=ImportError)
ISAS = native.isas()

SHAPES = [
    (1, 1, (1,)), (5, 15, (2,)), (6, 16, (3,)), (7, 17, (1, 2)), (11, 31, (8,)), (12, 32, (4, 1, 3)),
    (13, 33, (5,)), (47, 65, (16,)), (48, 63, (2, 2)), (49, 511, (16,)), (95, 513, (1,)), (96, 64, (64,)),
    (97, 129, (7, 9)), (3, 4095, (12,)), (4, 4097, (13,)), (193, 130, (512, 300)),
    (6, 16, (63,)), (6, 16, (65,)), (6, 16, (128,)), (6, 16, (129,)),
]  # fmt: skip
"""Rows beside tiles (6, 12) and stretches (48, 96), columns beside panels (8-32), blocks (512, 4096)."""


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this machine has, one after another."""
    with native.use_isa(request.param):
        yield request.param


def several(out: int, into: int, ranks: tuple[int, ...], **options) -> list[LoRA]:
    """An adapter per rank."""
    return [adapter(out, into, rank, 10 * i, **options) for i, rank in enumerate(ranks)]


def compiled(w: torch.Tensor, adapters: list[LoRA], fan_in_fan_out: bool, dtype=None) -> torch.Tensor:
    """The compiled result; ``out`` starts as NaN."""
    out = torch.full(w.shape, math.nan, dtype=dtype or w.dtype)
    merge_lora_cpu.merge_lora(out, w, *split(adapters), fan_in_fan_out)
    return out


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-r{'+'.join(map(str, s[2]))}")
def test_merges_within_the_bound_and_to_the_same_bits(shape, dtype, fan):
    rows, cols, ranks = shape
    out, into = (cols, rows) if fan else (rows, cols)
    w, adapters = weight(out, into, dtype, fan_in_fan_out=fan), several(out, into, ranks)
    with native.use_isa(ISAS[0]):
        first = compiled(w, adapters, fan)
    assert_merged(first, w, adapters, fan)
    for name in ISAS[1:]:
        with native.use_isa(name):
            assert_same_bits(compiled(w, adapters, fan), first)


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("order", ["D", "DL", "LD", "LDLD"])
def test_magnitudes(order, dtype, fan):
    rows, cols = (101, 4100) if order == "LD" else (55, 70)
    out, into = (cols, rows) if fan else (rows, cols)
    w = weight(out, into, dtype, fan_in_fan_out=fan)
    adapters = [adapter(out, into, 3 + i, 10 * i, dora=kind == "D") for i, kind in enumerate(order)]
    with native.use_isa(ISAS[0]):
        first = compiled(w, adapters, fan)
    assert_merged(first, w, adapters, fan)
    for name in ISAS[1:]:
        with native.use_isa(name):
            assert_same_bits(compiled(w, adapters, fan), first)


def test_rows_get_the_norm_of_their_magnitude(isa):
    w, [a] = weight(40, 300, torch.float32), several(40, 300, (4,), dora=True)
    torch.testing.assert_close(torch.linalg.vector_norm(pk.merge_lora(w, [a]), dim=1), a.magnitude)
    turned = pk.merge_lora(w.t().contiguous(), [a], fan_in_fan_out=True)
    torch.testing.assert_close(torch.linalg.vector_norm(turned, dim=0), a.magnitude)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_no_bit_depends_on_threads_or_on_which_rows_are_merged_together(dora):
    w, adapters = weight(301, 530, torch.bfloat16), several(301, 530, (5, 16), dora=dora)
    with native.use_threads(1):
        whole = pk.merge_lora(w, adapters)
    with native.use_threads(3):
        assert_same_bits(pk.merge_lora(w, adapters), whole)
    for cut in (1, 50, 200):
        for rows in (slice(0, cut), slice(cut, None)):
            part = [a._replace(B=a.B[rows], magnitude=a.magnitude[rows] if dora else None) for a in adapters]
            assert_same_bits(pk.merge_lora(w[rows], part), whole[rows])


def test_rows_of_a_turned_weight_go_with_columns_of_A():
    w, adapters = weight(70, 200, torch.bfloat16, fan_in_fan_out=True), several(70, 200, (5, 3))
    whole = pk.merge_lora(w, adapters, fan_in_fan_out=True)
    part = [a._replace(A=a.A[:, 30:99]) for a in adapters]
    assert_same_bits(pk.merge_lora(w[30:99], part, fan_in_fan_out=True), whole[30:99])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
@pytest.mark.parametrize("count", [1, 8])
def test_nearly_all_elements_are_rounded_right_whatever_the_number_of_adapters(count, dtype):
    """The error is that of the one rounding: to a hundred-thousandth, for eight adapters as for one."""
    w, sigma = weight(512, 1024, dtype), 0.02
    adapters = [
        LoRA(random(16, 1024, seed=i, size=sigma), random(512, 16, seed=i + 50, size=sigma), 2.0)
        for i in range(count)
    ]
    merged, exact = pk.merge_lora(w, adapters), truth(w, adapters)
    best = round_once(exact, dtype)
    assert float((merged != best).double().mean()) <= 1e-4 * (8 if dtype == torch.float16 else 1)
    ratio = (merged.double() - exact).abs().mean() / (best.double() - exact).abs().mean()
    assert float(ratio) < 1.00001


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=SHORT.get)
def test_adapters_of_any_dtype_over_any_weight(kind, isa):
    w, adapters = weight(20, 40, torch.bfloat16), several(20, 40, (3,), dtype=kind)
    adapters += several(20, 40, (2,))
    assert_merged(compiled(w, adapters, False), w, adapters)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_nothing_but_out_is_written_at_any_alignment(dtype, monkeypatch):
    monkeypatch.setattr(merge_lora_cpu, "_C", walls.Walled(merge_lora_cpu._C))
    for place in ("end", "start", 7):
        monkeypatch.setattr(walls, "PLACES", (place,))
        for fan in (False, True):
            w = weight(50, 37, dtype, fan_in_fan_out=fan)
            adapters = [adapter(50, 37, 3, 0, dora=True), adapter(50, 37, 2, 10)]
            wanted = pk.merge_lora(w, adapters, fan_in_fan_out=fan)
            assert_merged(wanted, w, adapters, fan)
            pk.merge_lora(w, adapters, fan_in_fan_out=fan, out=w)
            assert_same_bits(w, wanted)


def test_out_of_another_dtype(isa):
    w, adapters = weight(30, 50, torch.bfloat16), several(30, 50, (3,))
    wide = compiled(w, adapters, False, torch.float32)
    assert_merged(wide, w, adapters)
    assert_same_bits(compiled(w, adapters, False, torch.float64), wide.double())
    assert_same_bits(compiled(w, adapters, False), wide.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_special_values(dtype, isa):
    w = weight(8, 20, dtype)
    w[1, 2], w[3, 4], w[5, 6] = math.nan, math.inf, -math.inf
    a = adapter(8, 20, 2, 0)
    out = compiled(w, [a], False)
    bits, canonical = NAN[dtype]
    assert int(out.isnan().sum()) == 1 and int(out.view(bits)[1, 2]) == canonical
    assert out[3, 4] == math.inf and out[5, 6] == -math.inf
    a.A[1, 7] = math.inf
    assert bool(compiled(w, [a], False)[0, 7].isinf() | compiled(w, [a], False)[0, 7].isnan())
    zero = LoRA(a.A[:, :20] * 0 + 1, a.B * 0, 1.0, torch.ones(8))
    assert bool(compiled(w * 0, [zero._replace(A=torch.ones(2, 20))], False).isnan().any())


@pytest.mark.parametrize("kind", ["midway", "nan", "infinite"])
def test_one_element_of_a_tile_is_rounded_with_care(kind, isa):
    """The t-th tile of 6 x 16 holds one at its t-th place: a sum midway between two numbers, or no number."""
    t = torch.arange(96)
    places = t // 16, t * 16 + t % 16
    w, delta = weight(6, 96 * 16, torch.bfloat16), random(6, 96 * 16, seed=3, size=0.002)
    sign = 1.0 - 2 * (t % 2)
    w[places] = {
        "midway": (sign * (1 + (t // 2 + 40 * (t % 2)) / 128)).bfloat16(),
        "nan": torch.full((96,), 0xFFC1 - 2**16, dtype=torch.int16).view(torch.bfloat16),
        "infinite": (sign * 3e38).bfloat16(),
    }[kind]
    delta[places] = {"midway": 2.0**-8, "nan": 1.0, "infinite": 3e38}[kind] * sign
    want = (w.float() + delta).bfloat16()
    want.view(torch.int16)[want.isnan()] = 0x7FC0
    assert_same_bits(compiled(w, [LoRA(delta, torch.eye(6), 1.0)], False), want)


def test_empty_weights():
    for shape in ((0, 4), (4, 0)):
        w = torch.empty(shape)
        assert pk.merge_lora(w, [LoRA(torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0)]).shape == shape


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=SHORT.get)
def test_the_reference_is_the_truth_rounded_once(dtype, fan, monkeypatch):
    monkeypatch.setattr("pykernels.ref.merge_lora.LARGEST", 40)  # blocks of two rows
    w = weight(9, 20, dtype, fan_in_fan_out=fan)
    adapters = [adapter(9, 20, 3, 0), adapter(9, 20, 2, 10, dora=True)]
    with pk.use_backend("ref"):
        got = pk.merge_lora(w, adapters, fan_in_fan_out=fan)
    wanted = round_once(truth(w, adapters, fan), dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)
    else:
        assert_same_bits(got, wanted)


def test_strided_factors_are_taken_as_they_are():
    w, [a] = weight(20, 30, torch.bfloat16), several(20, 30, (4,))
    strided = LoRA(a.A.t().contiguous().t(), torch.stack([a.B, a.B], -1)[..., 0], a.scaling)
    assert_same_bits(pk.merge_lora(w, [strided]), pk.merge_lora(w, [a]))


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
def test_negated_views_are_taken_as_they_are(fan):
    w, [a] = weight(20, 30, torch.bfloat16, fan_in_fan_out=fan), several(20, 30, (4,))
    turned = a._replace(A=torch.complex(a.A, -a.A).conj().imag, B=torch.complex(a.B, -a.B).conj().imag)
    assert turned.A.is_neg() and turned.B.is_neg()
    given = pk.merge_lora(w, [turned], fan_in_fan_out=fan)
    assert_same_bits(given, pk.merge_lora(w, [a], fan_in_fan_out=fan))


def test_kinds_of_adapters():
    A, B = random(4, 30, seed=1), random(20, 4, seed=2)
    R, d, b = random(4, 4, seed=3), random(4, seed=4), random(20, seed=5)
    w = torch.zeros(20, 30, dtype=torch.float64)

    def delta(adapter: LoRA) -> torch.Tensor:
        return pk.merge_lora(w, [adapter])

    def close(got: LoRA, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(delta(got), wanted, rtol=1e-5, atol=1e-5)

    close(LoRA.rslora(A, B, 3.0), 3.0 / 2.0 * (B @ A).double())
    close(LoRA.xs(A, R, B, 0.5), 0.5 * (B @ R @ A).double())
    close(LoRA.vera(A, B, d, b), (torch.diag(b) @ B @ torch.diag(d) @ A).double())
    close(LoRA.pissa(A, B, A * 2, B + 1, 0.3), 0.3 * (B @ A - (B + 1) @ (A * 2)).double())
    half = LoRA.xs(A.bfloat16(), R.bfloat16(), B.bfloat16())
    assert half.A.dtype == half.B.dtype == torch.float32
