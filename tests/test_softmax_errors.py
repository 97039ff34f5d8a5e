"""Every message of the softmax family, by its text."""

from __future__ import annotations

import re

import pytest
import torch

import pykernels as pk
from tests.softmax_cases import NAN

X = torch.zeros(2, 3)
FLOATS = "float32, bfloat16, float16 or float64"
OUT_OF_RANGE = "Dimension out of range (expected to be in range of [-2, 1], but got 2)"
V, T, D, R = ValueError, TypeError, IndexError, RuntimeError
ERRORS = [
    (lambda op: op(X.int()), T, f"x must be {FLOATS}, or dtype= given, got torch.int32"),
    (lambda op: op(X.to(torch.complex64), dtype=torch.float32), T, f"x must be {FLOATS}, got torch.complex"),
    (lambda op: op([0.0]), T, "x must be a tensor, got list"),
    (lambda op: op(X, dtype=torch.int32), T, f"dtype must be {FLOATS}, got torch.int32"),
    (lambda op: op(X, 2), D, OUT_OF_RANGE),
    (lambda op: op(torch.tensor(1.0), 1), D, "Dimension out of range (expected to be in range of [-1, 0]"),
    (lambda op: op(X, 1.0), T, "dim must be an integer, got float"),
    (lambda op: op(X, None), T, "dim must be an integer, got NoneType"),
    (lambda op: op(X, True), T, "dim must be an integer, got bool"),
    (lambda op: op(X.to_sparse()), NotImplementedError, "x must be a dense tensor, got torch.sparse_coo"),
    (lambda op: op(X.to("meta")), V, "x must be a tensor with data, got one on meta"),
    (lambda op: op(X, temperature=0.0), V, "temperature must be positive and normal in float32, got 0.0"),
    (lambda op: op(X, temperature=NAN), V, "temperature must be finite in float32, got nan"),
    (lambda op: op(X, temperature="1"), T, "temperature must be a number, got str"),
    (lambda op: op(X, softcap=-1), V, "softcap must be positive and normal in float32, got -1.0"),
    (lambda op: op(X, mask=[True]), T, "mask must be a tensor, got list"),
    (lambda op: op(X, mask=X.int()), T, "mask must be bool or of a float dtype, got torch.int32"),
    (lambda op: op(X, mask=X.t()), V, "mask must broadcast to [2, 3], got [3, 2]"),
    (lambda op: op(X, mask=X[None]), V, "mask must broadcast to [2, 3], got [1, 2, 3]"),
    (lambda op: op(X, mask=X.to("meta")), V, "mask must be a dense tensor with data, got torch.strided on m"),
    (lambda op: op(X, safe=1), V, "safe must be one of True, False, got 1"),
    (lambda op: op(X, out=[0.0]), T, "out must be a tensor, got list"),
    (lambda op: op(X, out=X.half()), R, "out must have the result's dtype torch.float32, got torch.float16"),
    (lambda op: op(X, out=X.t()), V, "out must have x's shape [2, 3], got [3, 2]"),
    (lambda op: op(X, out=X.to("meta")), V, "out must be a dense tensor with data, got torch.strided on me"),
    (lambda op: op(X, out=torch.zeros(1, 3).expand(2, 3)), R,
     "out must have a place for every element, got strides [0, 1]"),
    (lambda op: op(X, out=torch.zeros(2, 3, requires_grad=True)), V, "out must not require grad"),
    (lambda op: op(torch.zeros(2, requires_grad=True), out=torch.zeros(2)), V,
     "out must be None where a gradient is asked for"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("call", "kind", "text"), ERRORS, ids=[f"{i}-{e[2][:40]}" for i, e in enumerate(ERRORS)]
)
def test_messages(name, call, kind, text):
    with pytest.raises(kind, match=re.escape(f"{name}: {text}")):
        call(getattr(pk, name))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: pk.softmax(X, sink=torch.zeros(2)), V, "softmax: sink must broadcast to [2, 1], got [2]"),
        (
            lambda: pk.softmax(X, sink=X[:1, :1].int()),
            T,
            "softmax: sink must be of a float dtype, got torch.",
        ),
        (lambda: pk.softmax(X, sink="0"), T, "softmax: sink must be a number, got str"),
        (lambda: pk.softmax([0.0], sink=0.0), T, "softmax: x must be a tensor, got list"),
        (lambda: pk.logsumexp(X, ()), V, "logsumexp: dim must name one dimension or several different ones"),
        (lambda: pk.logsumexp(X, (1, -1)), V, "different ones, got [1, -1]"),
        (lambda: pk.logsumexp(X, None), T, "logsumexp: dim must be an integer or several, got NoneType"),
        (lambda: pk.logsumexp(X, (0, 2)), D, f"logsumexp: {OUT_OF_RANGE}"),
        (lambda: pk.logsumexp(X, 0.5), T, "logsumexp: dim must be an integer or several, got float"),
        (lambda: pk.logsumexp(X.to(torch.complex64)), T, f"logsumexp: x must be {FLOATS}, got torch.complex"),
        (lambda: pk.logsumexp(X, keepdim=1), V, "logsumexp: keepdim must be one of True, False, got 1"),
        (lambda: pk.logsumexp(X, temperature=-1.0), V, "logsumexp: temperature must be positive and normal"),
    ],
)
def test_messages_of_one_op(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


def test_an_error_comes_before_anything_is_written():
    out = torch.full((2, 3), 7.0)
    with pytest.raises(ValueError, match="temperature"):
        pk.softmax(X, temperature=-1.0, out=out)
    assert out.tolist() == [[7.0] * 3] * 2
