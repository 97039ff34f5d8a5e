"""Where results go: out=, out_dtype=, results over inputs; and how backends are chosen."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch

import pykernels as pk
from pykernels import backends
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT, make

ALL = (*DTYPES, torch.float64)
OPS = {
    "linear_merge": lambda b, t, **o: pk.linear_merge([b, *t], [0.5, 0.25, 2.0, -1.0], **o),
    "task_arithmetic": lambda b, t, **o: pk.task_arithmetic(b, t, weight=0.3, **o),
    "ties_merge": lambda b, t, **o: pk.ties_merge(b, t, density=0.3, **o),
    "ties_merge_keep": lambda b, t, **o: pk.ties_merge(b, t, density=0.3, tie="keep", elect="plain", **o),
    "ties_merge_untrimmed": lambda b, t, **o: pk.ties_merge(b, t, density=1.0, **o),
    "dare_merge": lambda b, t, **o: pk.dare_merge(b, t, density=0.3, seed=1, **o),
    "dare_merge_l1": lambda b, t, **o: pk.dare_merge(
        b, t, density=0.3, seed=1, rescale="l1", consensus="ties", **o
    ),
}
FREE = pytest.mark.skipif("PYKERNELS_BACKEND" in os.environ, reason="the environment has chosen a backend")
NUMEL = 65536 + 4096 + 77


@pytest.fixture(params=["default", "ref"])
def backend(request):
    """What a user gets, and the references forced."""
    if request.param == "default":
        yield
    else:
        with pk.use_backend(request.param):
            yield


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_out_is_filled_and_returned(op, dtype, backend):
    base, tuned = make("ties", NUMEL, 3, dtype)
    wanted = OPS[op](base, tuned)
    out = torch.full_like(base, math.nan)
    assert OPS[op](base, tuned, out=out) is out
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("which", [0, 1, 3], ids=["base", "first", "last"])
@pytest.mark.parametrize("op", OPS)
def test_out_may_be_an_input(op, which, backend):
    for dtype in DTYPES:
        base, tuned = make("gaussian", NUMEL, 3, dtype)
        wanted = OPS[op](base, tuned)
        inputs = [base.clone(), *(t.clone() for t in tuned)]
        others = [x.clone() for x in inputs]
        assert OPS[op](inputs[0], inputs[1:], out=inputs[which]) is inputs[which]
        assert_same_bits(inputs[which], wanted)
        assert all(
            torch.equal(a, b) for i, (a, b) in enumerate(zip(inputs, others, strict=True)) if i != which
        )


def test_stages_may_overwrite_their_input(backend):
    for dtype in ALL:
        delta = make("student", NUMEL, 1, dtype)[1][0]
        for run in (
            lambda d, **o: pk.trim(d, 0.2, **o),
            lambda d, **o: pk.drop_rescale(d, 0.2, seed=1, rescale="l1", **o),
        ):
            copy = delta.clone()
            assert run(copy, out=copy) is copy
            assert_same_bits(copy, run(delta))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("out_dtype", ALL, ids=lambda d: f"to_{SHORT[d]}")
@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_out_dtype(op, dtype, out_dtype, backend):
    base, tuned = make("integers", 3001, 3, dtype)
    got = OPS[op](base, tuned, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    wide = OPS[op](base.double(), [t.double() for t in tuned])
    torch.testing.assert_close(got, wide.to(out_dtype), rtol=1e-6 + torch.finfo(out_dtype).eps, atol=1e-5)
    out = torch.empty(3001, dtype=out_dtype)
    assert_same_bits(OPS[op](base, tuned, out=out), got)


MORE = OPS | {
    "trim": lambda b, t, **o: pk.trim(b, 0.2, **o),
    "drop_rescale": lambda b, t, **o: pk.drop_rescale(b, 0.2, seed=1, **o),
    "merge_lora": lambda b, t, **o: pk.merge_lora(b, [pk.LoRA(torch.ones(1, 4), torch.ones(4, 1), 1.0)], **o),
}


@pytest.mark.parametrize("op", MORE)
def test_a_graph_that_saved_out_does_not_use_what_stands_there_now(op):
    base, tuned = make("gaussian", 16, 3, torch.float32)
    base, *tuned = (x.view(4, 4) for x in (base, *tuned))
    saved = base.clone().requires_grad_().exp()
    MORE[op](base, tuned, out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


ROWS = {
    "softmax": lambda b, t, **o: pk.softmax(b, **o),
    "log_softmax": lambda b, t, **o: pk.log_softmax(b, **o),
}


@pytest.mark.parametrize("op", MORE | ROWS)
def test_an_inference_tensor_is_filled_in_inference_mode_alone(op):
    """As torch has it."""
    base, tuned = make("gaussian", 16, 3, torch.float32)
    base, *tuned = (x.view(4, 4) for x in (base, *tuned))
    with torch.inference_mode():
        out = torch.zeros(4, 4)
        assert_same_bits((MORE | ROWS)[op](base, tuned, out=out), (MORE | ROWS)[op](base, tuned))
        out.zero_()
    with torch.no_grad(), pytest.raises(RuntimeError, match="out must not be an inference tensor outside"):
        (MORE | ROWS)[op](base, tuned, out=out)
    assert not out.any()


def test_results_have_the_inputs_shape_and_inputs_are_left_alone(backend):
    base, tuned = make("gaussian", 2 * 3 * 5, 3, torch.bfloat16)
    shaped = [x.clone().reshape(2, 3, 5) for x in (base, *tuned)]
    for run in OPS.values():
        assert_same_bits(run(shaped[0], shaped[1:]).reshape(-1), run(base, tuned))
    assert all(torch.equal(a.reshape(-1), b) for a, b in zip(shaped, (base, *tuned), strict=True))


def test_tensors_that_share_memory_as_inputs(backend):
    base, tuned = make("gaussian", 5000, 1, torch.float32)
    wanted = pk.ties_merge(base, [tuned[0].clone(), base.clone(), tuned[0].clone()], density=0.5)
    assert_same_bits(pk.ties_merge(base, [tuned[0], base, tuned[0]], density=0.5), wanted)


def test_gradients_are_not_recorded(backend):
    base = torch.ones(8, requires_grad=True)
    with torch.no_grad():
        merged = pk.task_arithmetic(base, [base * 2])
    assert not merged.requires_grad and merged.tolist() == [2.0] * 8


@FREE
def test_forced_backends():
    x = torch.ones(3)
    with pk.use_backend("ref"):
        assert backends.call("ties_merge", x).__module__ == "pykernels.ref.blocks"
        assert backends.find("ties_fused", x) is None
        with pk.use_backend("cpu"):
            assert backends.call("ties_merge", x).__module__ == "pykernels.native"
        assert backends.call("ties_merge", x).__module__ == "pykernels.ref.blocks"
    assert backends.call("ties_merge", x).__module__ == "pykernels.native"
    assert backends.call("ties_merge", x.double()).__module__ == "pykernels.ref.blocks"
    with (
        pytest.raises(ValueError, match="known backends are cpu, cuda, triton, torch, ref, got 'gpu'"),
        pk.use_backend("gpu"),
    ):
        pass
    with pk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu was forced and does not run on meta"):
        backends.call("ties_merge", x.to("meta"))


def test_every_row_of_the_table_names_a_function():
    for op, row in backends.grid():
        assert set(row) == set(backends.BACKENDS)
        for name, state in row.items():
            if state == "yes":
                place = torch.device(backends._runs_on(name) or "cpu")
                with pk.use_backend(name):
                    assert callable(backends.call(op, torch.ones(1, device=place)))


@FREE
def test_without_the_compiled_module_the_references_serve_with_a_warning(monkeypatch):
    base, tuned = make("gaussian", 5000, 2, torch.bfloat16)
    with pk.use_backend("ref"):
        wanted = pk.ties_merge(base, tuned, density=0.5)
    monkeypatch.setattr(
        backends, "missing", lambda name: None if name == "ref" else "pykernels._C is not built"
    )
    backends._automatic.cache_clear()
    backends._warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="the PyTorch references serve"):
            assert_same_bits(pk.ties_merge(base, tuned, density=0.5), wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one warning a process, whatever else is called
            pk.ties_merge(base, tuned, density=0.5)
            pk.linear_merge(tuned, 1.0)
            pk.trim(tuned[0].float(), 0.5)
        with (
            pytest.raises(RuntimeError, match="cpu cannot run here: "),
            pk.use_backend("cpu"),
        ):
            pass
    finally:
        backends._automatic.cache_clear()


CHILD = """
import torch, pykernels
try:
    print(pykernels.trim(torch.tensor([1.0, 2.0, 3.0]), 0.4).tolist())
    from pykernels import backends, native
    print(backends.call("trim", torch.ones(1)).__module__, native._C.isa())
except Exception as error:
    print(type(error).__name__, error)
"""


def child(**environment: str) -> str:
    """What a fresh interpreter prints that imports the package in this environment."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_environment_variables():
    native = pytest.importorskip("pykernels.native", exc_type=ImportError)
    last = native.isas()[-1]
    said = child(PYKERNELS_BACKEND="ref", PYKERNELS_ISA=last)
    assert said == f"[0.0, 0.0, 3.0]\npykernels.ref.blocks {last}\n"
    assert "known backends are cpu, cuda, triton, torch, ref, got 'gpu'" in child(PYKERNELS_BACKEND="gpu")
    assert "got 'mmx'" in child(PYKERNELS_ISA="mmx")
