"""What softmax and log_softmax share: options, checks, and the way from tensors of any strides to rows.

Kernels take contiguous views [outer, n, inner] and reduce over the middle. A result is contiguous, so an
input that is not, or that is to be rounded to a dtype first, is copied into the result and worked on there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pykernels import backends, check

_PIECE = 1 << 16
"""Elements from which on a mask is rather walked in several calls than copied."""


class Options(NamedTuple):
    """What turns x into logits, and the logit and the rule that concern whole rows."""

    temperature: float = 1.0
    mask: torch.Tensor | None = None
    softcap: float | None = None
    sink: torch.Tensor | None = None
    safe: bool = False


def examine(op: str, x: torch.Tensor, dim: int, dtype: torch.dtype | None, options: Options) -> int:
    """Check everything but ``out``; returns the dimension counted from 0."""
    check.row_input(op, x, dtype)
    at = check.dimension(op, dim, x.dim())
    temperature, mask, softcap, sink, safe = options
    if temperature != 1.0:
        check.positive(op, "temperature", temperature)
    if softcap is not None:
        check.positive(op, "softcap", softcap)
    if mask is not None:
        check.beside(op, "mask", mask, x, x.shape)
        if mask.dtype not in (torch.bool, *check.FLOAT_DTYPES):
            raise TypeError(f"{op}: mask must be bool or of a float dtype, got {mask.dtype}")
    if sink is not None:
        check.beside(op, "sink", sink, x, reduced(x.shape, at))
        if sink.dtype not in check.FLOAT_DTYPES:
            raise TypeError(f"{op}: sink must be of a float dtype, got {sink.dtype}")
    if safe is not False:
        check.choice(op, "safe", safe, (True, False))
    return at


def reduced(shape: Sequence[int], at: int) -> list[int]:
    """``shape`` with 1 in place of the reduced dimension."""
    return [1 if i == at else n for i, n in enumerate(shape)]


def over_rows(
    op: str,
    x: torch.Tensor,
    dim: int,
    dtype: torch.dtype | None,
    options: Options,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check, and run row op ``op`` over dimension ``dim`` of ``x``."""
    at = examine(op, x, dim, dtype, options)
    kind = dtype or x.dtype
    if out is not None:
        check.row_output(op, out, x, kind)
        torch.autograd.graph.increment_version(out)
    target = out
    if target is None or not _writable(target, x, options):
        target = backends.fresh(x.shape, kind, x.device)
    source = x if _readable(x, kind) else target.detach().copy_(x)
    if x.numel():
        _split(op, target, source, at, options)
    if out is None or target is out:
        return target
    out.detach().copy_(target)
    return out


def _readable(x: torch.Tensor, kind: torch.dtype) -> bool:
    """Whether kernels take ``x`` as it lies; widening to float32 is theirs."""
    widened = kind == torch.float32 and x.dtype in backends.NATIVE_DTYPES
    return x.is_contiguous() and not x.is_neg() and (x.dtype == kind or widened)


def _writable(out: torch.Tensor, x: torch.Tensor, options: Options) -> bool:
    """Whether kernels may fill ``out`` as it lies: contiguous, and in no input's memory unless in place."""
    if not out.is_contiguous() or out.is_neg():
        return False
    if not check.apart(out, x):
        inplace = out.data_ptr() == x.data_ptr() and out.dtype == x.dtype and _readable(x, x.dtype)
        if not inplace:
            return False
    return (options.mask is None or check.apart(out, options.mask)) and (
        options.sink is None or check.apart(out, options.sink)
    )


def rows_of(tensor: torch.Tensor, at: int) -> torch.Tensor:
    """A tensor as [outer, n, inner], ``at`` in the middle; RuntimeError where its strides forbid it."""
    shape = tensor.shape
    if at == len(shape) - 1:
        return tensor.view(-1 if tensor.numel() else math.prod(shape[:-1]), shape[-1], 1)
    if not shape:
        return tensor.view(1, 1, 1)
    return tensor.view(math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :]))


def _split(op: str, out: torch.Tensor, x: torch.Tensor, at: int, options: Options) -> None:
    """Call the row op once, or slice by slice where a broadcast mask has no three-dimensional view."""
    temperature, mask, softcap, sink, safe = options
    if mask is not None:
        mask = narrow(mask, x).expand(x.shape)
        try:
            mask = rows_of(mask, at)
        except RuntimeError:
            if at and x[0].numel() >= _PIECE:
                whole = None if sink is None else sink.expand(reduced(x.shape, at))
                for i in range(x.shape[0]):
                    part = options._replace(mask=mask[i], sink=None if whole is None else whole[i])
                    _split(op, out[i], x[i], at - 1, part)
                return
            mask = rows_of(mask.contiguous(), at)
    out3, x3 = rows_of(out, at), rows_of(x, at)
    if sink is not None:
        sink = narrow(sink, x).expand(reduced(x.shape, at)).reshape(x3.shape[0], x3.shape[2]).contiguous()
        sink = sink if sink.dtype == torch.float64 else sink.to(torch.float32)
    backends.call(op, x)(out3, x3, float(temperature), softcap, mask, sink, safe)


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrow(tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A mask or sink as kernels take it: no wider than float32, unless x is, and no negated view."""
    if tensor.dtype == torch.float64 and x.dtype != torch.float64:
        return tensor.to(torch.float32)
    return tensor.resolve_neg()
