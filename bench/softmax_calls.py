"""The softmax family in the table of cases: our calls, torch's, and the least bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import pykernels
from pykernels import backends
from pykernels.bench.inputs import Inputs, Spec

Options = Mapping[str, Any]
_AT = {"spread": 2, "masked": 3}


def logits(x: Inputs, options: Options) -> torch.Tensor:
    """The tensor that the row is about: plain logits unless its options name others."""
    return x.all[_AT.get(options.get("logits", ""), 0)]


def _softmax(x: Inputs, out: torch.Tensor | None, o: Options) -> Any:
    return pykernels.softmax(logits(x, o), o.get("dim", -1), temperature=o.get("temperature", 1.0), out=out)


def bound(op: str, x: Inputs, options: Options) -> Callable[[], torch.Tensor]:
    """The call of softmax or log_softmax alone, as :func:`in_torch` gives torch's: nothing is looked up."""
    z, dim, forward = logits(x, options), options.get("dim", -1), getattr(pykernels, op)
    return lambda: forward(z, dim, out=x.out)


def _log_softmax(x: Inputs, out: torch.Tensor | None, o: Options) -> Any:
    return pykernels.log_softmax(logits(x, o), o.get("dim", -1), out=out)


def _logsumexp(x: Inputs, out: torch.Tensor | None, o: Options) -> Any:
    return pykernels.logsumexp(logits(x, o), o.get("dim", -1))


def _backward(op: str) -> Callable[[Inputs, torch.Tensor | None, Options], Any]:
    """The row itself, as operators allocate their result: grad is the first tensor, y the second."""

    def call(x: Inputs, out: torch.Tensor | None, o: Options) -> Any:
        assert out is not None
        grad, y, rows = (t.view(*t.shape, 1) for t in (x.base, x.tuned[0], out))
        backends.call(op, y)(rows, grad, y, 1.0)
        return out

    return call


CALLS: dict[str, Callable[[Inputs, torch.Tensor | None, Options], Any]] = {
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "softmax_backward": _backward("softmax_backward"),
    "log_softmax_backward": _backward("log_softmax_backward"),
}
TRAFFIC: dict[str, Callable[[Spec], int]] = {
    "softmax": lambda s: 2 * s.tensor_bytes,
    "log_softmax": lambda s: 2 * s.tensor_bytes,
    "logsumexp": lambda s: s.tensor_bytes + s.tensor_bytes // s.shape[1],
    "softmax_backward": lambda s: 3 * s.tensor_bytes,
    "log_softmax_backward": lambda s: 3 * s.tensor_bytes,
}


def agrees(op: str, got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two kernels gave the same: to the bit, or for softmax within what the order of a sum may do.

    That is one unit in the last place of 16 bits, 8 of float32, and what cancels in a logarithm or gradient.
    """
    if op not in CALLS:
        return torch.equal(got, wanted)
    if got.dtype != wanted.dtype:
        return False
    room = torch.finfo(got.dtype).eps * (8 if got.dtype == torch.float32 else 1)
    least = torch.finfo(got.dtype).smallest_normal * room
    if op in ("log_softmax", "logsumexp"):
        least = 2.0**-21
    elif op.endswith("_backward") and wanted.numel():
        least = 1e-5 * float(wanted.abs().max())
    return torch.allclose(got.double(), wanted.double(), rtol=room, atol=least, equal_nan=True)


def in_torch(op: str, x: Inputs, options: Options) -> Callable[[], torch.Tensor]:
    """torch's own op on the same tensors, into the same output."""
    z, dim, dtype = logits(x, options), options.get("dim", -1), x.base.dtype
    if op == "logsumexp":
        return lambda: torch.logsumexp(z, dim)
    if op.endswith("_backward"):
        backward = getattr(torch, {"softmax_backward": "_softmax_backward_data"}.get(op, f"_{op}_data"))
        name = "grad_input" if op == "softmax_backward" else "out"
        return lambda: backward(x.base, x.tuned[0], dim, dtype, **{name: x.out})
    forward = getattr(torch, op)
    return lambda: forward(z, dim, out=x.out)
