"""Every message of the door, by its text."""

from __future__ import annotations

import math
import re

import pytest
import torch

import pykernels as pk
from pykernels import check

X, Y = torch.zeros(4), torch.zeros(5)
HALF = torch.zeros(4, dtype=torch.bfloat16)
STRIDED = torch.zeros(4, 2)[:, 0]
META = torch.zeros(4, device="meta")
FLOATS = "float32, bfloat16, float16 or float64"
STORE = torch.zeros(12)
LEARNED = torch.ones(2, requires_grad=True)


def ties(base=X, tuned=(X, X), **options):
    """ties_merge with arguments that are right unless given."""
    return pk.ties_merge(base, tuned, **{"density": 0.5, **options})


def dare(**options):
    """dare_merge with arguments that are right unless given."""
    return pk.dare_merge(X, [X, X], **{"density": 0.5, "seed": 1, **options})


V, T = ValueError, TypeError
CASES = [
    (lambda: ties(tuned=[X, Y]), V, "ties_merge: tuned[1] must have base's shape [4], got [5]"),
    (lambda: ties(tuned=[X.reshape(2, 2)]), V, "ties_merge: tuned[0] must have base's shape [4], got [2, 2]"),
    (lambda: ties(tuned=[HALF]), T,
     "ties_merge: tuned[0] must have base's dtype torch.float32, got torch.bfloat16"),
    (lambda: ties(tuned=[X, META]), V, "ties_merge: tuned[1] must be on base's device cpu, got meta"),
    (lambda: ties(tuned=[X, STRIDED]), V, "ties_merge: tuned[1] must be contiguous, got strides [2]"),
    (lambda: ties(tuned=[X, X[:1].expand(4)]), V, "ties_merge: tuned[1] must be contiguous, got strides [0]"),
    (lambda: ties(base=STRIDED), V, "ties_merge: base must be contiguous, got strides [2]"),
    (lambda: ties(base=X.int()), T, f"ties_merge: base must be {FLOATS}, got torch.int32"),
    (lambda: ties(base=[0.0]), T, "ties_merge: base must be a tensor, got list"),
    (lambda: ties(tuned=X), T, "ties_merge: tuned must be a sequence of tensors, got Tensor"),
    (lambda: ties(tuned=iter([X])), T, "ties_merge: tuned must be a sequence of tensors, got list_iterator"),
    (lambda: ties(tuned=[]), V, "ties_merge: tuned must hold 1 to 64 tensors, got 0"),
    (lambda: ties(tuned=[X] * 65), V, "ties_merge: tuned must hold 1 to 64 tensors, got 65"),
    (lambda: ties(tuned=[X, 1.0]), T, "ties_merge: tuned[1] must be a tensor, got float"),
    (lambda: ties(None, [X, Y]), V, "ties_merge: tuned[1] must have tuned[0]'s shape [4], got [5]"),
    (lambda: ties(None, [1.0]), T, "ties_merge: tuned[0] must be a tensor, got float"),
    (lambda: pk.linear_merge([X, Y], 1.0), V,
     "linear_merge: tensors[1] must have tensors[0]'s shape [4], got [5]"),
    (lambda: pk.task_arithmetic(X, [Y]), V, "task_arithmetic: tuned[0] must have base's shape [4], got [5]"),
    (lambda: pk.kth_magnitude(X, [Y], 0.5), V, "kth_magnitude: tuned[0] must have base's shape [4], got [5]"),
    (lambda: pk.elect_sign([X, HALF]), T,
     "elect_sign: deltas[1] must have deltas[0]'s dtype torch.float32, got"),
    (lambda: pk.trim(STRIDED, 0.5), V, "trim: delta must be contiguous, got strides [2]"),
    (lambda: pk.trim(None, 0.5), T, "trim: delta must be a tensor, got NoneType"),
    (lambda: pk.drop_rescale(X.long(), 0.5, seed=1), T,
     f"drop_rescale: delta must be {FLOATS}, got torch.int64"),
    (lambda: ties(weight=[1.0] * 3), V,
     "ties_merge: weight must be a number or 2 of them, one per model, got a list of 3"),
    (lambda: ties(weight="ab"), T, "ties_merge: weight must be a number or one per model, got 'ab'"),
    (lambda: ties(weight=[1.0, None]), T,
     "ties_merge: weight must be a number or one per model, got [1.0, None]"),
    (lambda: ties(weight=None), T, "ties_merge: weight must be a number or one per model, got None"),
    (lambda: ties(weight=math.inf), V, "ties_merge: weight must be finite in float32, got inf"),
    (lambda: ties(weight=[1.0, 1e39]), V, "ties_merge: weight must be finite in float32, got 1e+39"),
    (lambda: pk.linear_merge([X], math.nan), V, "linear_merge: weight must be finite in float32, got nan"),
    (lambda: ties(weight=torch.ones(3)), V, "ties_merge: weight must have shape [] or [2], got [3]"),
    (lambda: ties(weight=torch.ones(2, 1)), V, "ties_merge: weight must have shape [] or [2], got [2, 1]"),
    (lambda: ties(weight=torch.ones(2).long()), T, f"ties_merge: weight must be {FLOATS}, got torch.int64"),
    (lambda: ties(weight=torch.ones(2, device="meta")), V,
     "ties_merge: weight must be on the inputs' device cpu, got meta"),
    (lambda: dare(weight=torch.tensor([1.0, math.nan])), V,
     "dare_merge: weight must be finite in float32, got nan"),
    (lambda: pk.elect_sign([X], torch.ones(2)), V, "elect_sign: weight must have shape [] or [1], got [2]"),
    (lambda: dare(lambda_=torch.ones(1)), V, "dare_merge: lambda_ must have shape [], got [1]"),
    (lambda: dare(lambda_=torch.tensor(1)), T, f"dare_merge: lambda_ must be {FLOATS}, got torch.int64"),
    (lambda: pk.task_arithmetic(X, [X], lambda_=torch.ones((), device="meta")), V,
     "task_arithmetic: lambda_ must be on the inputs' device cpu, got meta"),
    (lambda: pk.task_arithmetic(X, [X], lambda_=torch.tensor(math.inf)), V,
     "task_arithmetic: lambda_ must be finite in float32, got inf"),
    (lambda: ties(weight=LEARNED), V,
     "ties_merge: weight must not require grad, as no gradient is defined: pass weight.detach()"),
    (lambda: ties(lambda_=LEARNED[0]), V, "ties_merge: lambda_ must not require grad, as no gradient is"),
    (lambda: dare(weight=LEARNED), V, "dare_merge: weight must not require grad, as no gradient is"),
    (lambda: dare(lambda_=LEARNED[0]), V, "dare_merge: lambda_ must not require grad, as no gradient is"),
    (lambda: pk.elect_sign([X, X], LEARNED), V, "elect_sign: weight must not require grad, as no"),
    (lambda: pk.linear_merge([X, X], LEARNED, out=Y), V,
     "linear_merge: out must be None where a gradient is asked for: out= records none"),
    (lambda: pk.task_arithmetic(X, [X], lambda_=LEARNED[0], out=X), V,
     "task_arithmetic: out must be None where a gradient is asked for"),
    (lambda: pk.linear_merge([X, X], [LEARNED[0], LEARNED[1]]), V,
     "linear_merge: weight must be one tensor where its gradient is asked for, got a list: torch.stack it"),
    (lambda: pk.linear_merge([X, Y], LEARNED), V,
     "linear_merge: tensors[1] must have tensors[0]'s shape [4], got [5]"),
    (lambda: pk.linear_merge([X], LEARNED), V, "linear_merge: weight must have shape [] or [1], got [2]"),
    (lambda: pk.linear_merge([X, X], LEARNED, normalize=1), V,
     "linear_merge: normalize must be one of True, False"),
    (lambda: pk.task_arithmetic(X, [X, X], weight=LEARNED, out_dtype=torch.int8), T,
     f"task_arithmetic: out_dtype must be {FLOATS}, got torch.int8"),
    (lambda: pk.task_arithmetic(X, [X, X], weight=LEARNED, lambda_="1"), T,
     "task_arithmetic: lambda_ must be a number, got str"),
    (lambda: ties(density=-0.1), V, "ties_merge: density must lie in [0, 1], got -0.1"),
    (lambda: ties(density=[0.5, 1.01]), V, "ties_merge: density must lie in [0, 1], got 1.01"),
    (lambda: ties(density=math.nan), V, "ties_merge: density must be finite in float32, got nan"),
    (lambda: ties(density=[0.5]), V,
     "ties_merge: density must be a number or 2 of them, one per model, got a list of 1"),
    (lambda: dare(density=2), V, "dare_merge: density must lie in [0, 1], got 2.0"),
    (lambda: pk.trim(X, 20), V, "trim: density must lie in [0, 1], got 20.0"),
    (lambda: ties(lambda_="1"), T, "ties_merge: lambda_ must be a number, got str"),
    (lambda: ties(lambda_=True), T, "ties_merge: lambda_ must be a number, got bool"),
    (lambda: dare(lambda_=math.nan), V, "dare_merge: lambda_ must be finite in float32, got nan"),
    (lambda: pk.task_arithmetic(X, [X], lambda_=-1e39), V,
     "task_arithmetic: lambda_ must be finite in float32, got"),
    (lambda: ties(normalize="mean"), V,
     "ties_merge: normalize must be one of True, False, 'count', got 'mean'"),
    (lambda: ties(normalize=1), V, "ties_merge: normalize must be one of True, False, 'count', got 1"),
    (lambda: pk.linear_merge([X], 1.0, normalize="count"), V,
     "linear_merge: normalize must be one of True, False, got"),
    (lambda: dare(normalize="count"), V, "dare_merge: normalize must be one of True, False, got 'count'"),
    (lambda: ties(elect="votes"), V, "ties_merge: elect must be one of 'weighted', 'plain', got 'votes'"),
    (lambda: dare(elect=None), V, "dare_merge: elect must be one of 'weighted', 'plain', got None"),
    (lambda: pk.elect_sign([X], elect=""), V, "elect_sign: elect must be one of 'weighted', 'plain', got ''"),
    (lambda: ties(tie="all"), V, "ties_merge: tie must be one of 'index', 'keep', got 'all'"),
    (lambda: pk.trim(X, 0.5, tie=None), V, "trim: tie must be one of 'index', 'keep', got None"),
    (lambda: dare(rescale=True), V, "dare_merge: rescale must be one of 'density', 'l1', None, got True"),
    (lambda: dare(consensus="sum"), V, "dare_merge: consensus must be one of None, 'ties', got 'sum'"),
    (lambda: pk.drop_rescale(X, 0.5, seed=1, rescale="l2"), V,
     "drop_rescale: rescale must be one of 'density', 'l1'"),
    (lambda: dare(seed=1.0), T, "dare_merge: seed must be an integer, got float"),
    (lambda: dare(seed=True), T, "dare_merge: seed must be an integer, got bool"),
    (lambda: dare(seed=-1), V, "dare_merge: seed must lie in [0, 2**64), got -1"),
    (lambda: pk.drop_rescale(X, 0.5, seed=2**64), V,
     "drop_rescale: seed must lie in [0, 2**64), got 1844674407370955161"),
    (lambda: ties(out_dtype=torch.int8), T, f"ties_merge: out_dtype must be {FLOATS}, got torch.int8"),
    (lambda: ties(out=[0.0]), T, "ties_merge: out must be a tensor, got list"),
    (lambda: ties(out=X.int()), T, f"ties_merge: out must be {FLOATS}, got torch.int32"),
    (lambda: ties(out=HALF, out_dtype=torch.float32), T,
     "ties_merge: out must have out_dtype torch.float32, got"),
    (lambda: ties(out=torch.zeros(4, requires_grad=True)), V,
     "ties_merge: out must not require grad, as no gradient is defined: pass out.detach()"),
    (lambda: ties(out=Y), V, "ties_merge: out must have the inputs' shape [4], got [5]"),
    (lambda: ties(out=META), V,
     "ties_merge: out must be a dense tensor with data, got torch.strided on meta"),
    (lambda: ties(out=torch.zeros(4).to_sparse()), V, "ties_merge: out must be a dense tensor with data"),
    (lambda: ties(tuned=[torch._neg_view(X)]), V, "ties_merge: tuned[0] must not be a negated view"),
    (lambda: ties(out=torch.zeros(4, 2)[:, 1]), V, "ties_merge: out must be contiguous, got strides [2]"),
    (lambda: ties(tuned=[STORE[:4]], out=STORE[2:6]), V,
     "must be an input itself or share no memory with it"),
    (lambda: ties(base=STORE[3:7], out=STORE[:4]), V, "must be an input itself or share no memory with it"),
    (lambda: ties(out=torch.tensor(0.0)), V, "ties_merge: out must have the inputs' shape [4], got []"),
    (lambda: ties(tuned=[STORE[:4]], out=STORE.view(torch.float16)[:4]), V, "overlaps input 0 in part"),
    (lambda: pk.trim(STORE[:4], 0.5, out=STORE[1:5]), V,
     "trim: out must be an input itself or share no memory with it"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "text"), CASES, ids=[f"{i}-{c[2][:50]}" for i, c in enumerate(CASES)]
)
def test_messages(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    "name", ["linear_merge", "task_arithmetic", "ties_merge", "dare_merge", "trim", "drop_rescale"]
)
def test_every_op_checks_out(name):
    op = getattr(pk, name)
    arguments = {
        "linear_merge": ([X], 1.0), "task_arithmetic": (X, [X]), "ties_merge": (X, [X]),
        "dare_merge": (X, [X]), "trim": (X, 0.5), "drop_rescale": (X, 0.5),
    }[name]  # fmt: skip
    options = {"density": 0.5} if name in ("ties_merge", "dare_merge") else {}
    options |= {"seed": 1} if name in ("dare_merge", "drop_rescale") else {}
    with pytest.raises(ValueError, match=rf"^{name}: out must have the inputs' shape \[4\], got \[5\]$"):
        op(*arguments, **options, out=Y)


def test_an_error_comes_before_anything_is_written():
    out = torch.full((4,), 7.0)
    with pytest.raises(ValueError, match="density"):
        ties(density=3.0, out=out)
    assert out.tolist() == [7.0] * 4


def test_numbers_of_every_kind_are_taken():
    import numpy as np

    expected = ties(weight=[1.0, 2.0], density=[0.5, 0.5])
    for weight in ((1, 2), np.array([1.0, 2.0], dtype=np.float32), torch.tensor([1.0, 2.0])):
        assert torch.equal(ties(weight=weight, density=np.float64(0.5)), expected)
    assert check.per_model("op", "weight", 2, 3) == [2.0] * 3
