"""Softmax over one dimension, with the options of attention and sampling fused in."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from pykernels import backends, check, library
from pykernels.ops import softmax_gradient as gradient
from pykernels.ops.softmax_pass import Options, examine, over_rows

OP = "softmax"
_everyday = backends.everyday(OP)


def softmax(
    x: torch.Tensor,
    dim: int = -1,
    *,
    dtype: torch.dtype | None = None,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | float | None = None,
    safe: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """e**z / sum(e**z) over ``dim``, z being x through softcap, temperature and mask, in this order.

    Without options a drop-in for ``torch.softmax``, special values included, within 5 units in the last
    place, tested to rows of 10^8 elements (Dukhan and Ablavatski, 2020, is where the passes come from). The
    bits of a row depend on its content and length alone, on a GPU on the architecture too, and with Triton
    beyond 4096 elements on whether its elements are neighbours in memory. Computed in float32 (float64 for
    float64), rounded once.

    Args:
        x: tensor [*S] of any strides: float32, bfloat16, float16 or float64, or what ``dtype`` makes of it.
        dim: the dimension to reduce.
        dtype: cast x to this first; the result's dtype, default x's.
        temperature: positive; z = u / temperature.
        mask: tensor that broadcasts to [*S]. bool: False takes an element out, NaN or not. Float: is added.
        softcap: positive c; u = c * tanh(x / c).
        sink: a logit per row that takes part in the sum alone: a number, or a tensor that broadcasts to [*S]
            with 1 in place of ``dim``.
        safe: a row whose sum is 0 (nothing but -inf) gives 0, not NaN.
        out: tensor [*S] of the result's dtype to fill, of any strides; may be ``x``. None where a gradient
            is asked for.

    Returns:
        The probabilities [*S], contiguous (``out`` where given). Differentiable, twice too, in ``x``, a float
        ``mask`` and a ``sink`` that is a tensor.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError (dtype of out, or out that overlaps itself),
        NotImplementedError (sparse x): an argument breaks a rule above; the text names it and its value.
    """
    plain = softcap is None and safe is False and type(temperature) is float and temperature == 1.0
    if plain and mask is None and sink is None and dtype is None and not is_dynamo_compiling():
        done = _everyday(x, dim, out)
        if done is not None:
            return done
    if sink is not None and not check.is_tensor(sink):
        check.row_input(OP, x, dtype)
        sink = torch.full((), check.number(OP, "sink", sink), dtype=torch.float64, device=x.device)
    options = Options(temperature, mask, softcap, sink, safe)
    if library.needed(x, mask, sink):
        examine(OP, x, dim, dtype, options)
        if any(map(library.wants_gradient, (x, mask, sink))):
            check.no_out(OP, out)
        return library.call(OP, out, x, dim, dtype, *options)
    return over_rows(OP, x, dim, dtype, options, out)


def _run(
    x: torch.Tensor,
    dim: int,
    dtype: torch.dtype | None,
    temperature: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    sink: torch.Tensor | None,
    safe: bool,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return over_rows(OP, x, dim, dtype, Options(temperature, mask, softcap, sink, safe), out)


def _fake(
    x: torch.Tensor,
    dim: int,
    dtype: torch.dtype | None,
    temperature: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    sink: torch.Tensor | None,
    safe: bool,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    examine(OP, x, dim, dtype, Options(temperature, mask, softcap, sink, safe))
    if out is not None:
        check.row_output(OP, out, x, dtype or x.dtype)
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, dim, _, temperature, mask, softcap, sink, safe = inputs
    gradient.save(ctx, x, output, dim, Options(temperature, mask, softcap, sink, safe))


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    by_x, by_mask, by_sink = gradient.gradients(ctx, grad, "softmax_backward")
    return by_x, None, None, None, by_mask, None, by_sink, None


def _tangent(y: torch.Tensor, primals: Any, tangents: Any) -> torch.Tensor:
    x, dim, _, temperature, mask, softcap, sink, safe = primals
    by = (tangents[0], tangents[4], tangents[6])
    return gradient.tangent(OP, y, x, dim, Options(temperature, mask, softcap, sink, safe), by)


library.define(
    OP,
    "Tensor x, int dim, ScalarType? dtype, float temperature, Tensor? mask, float? softcap, Tensor? sink, "
    "bool safe",
    _run,
    _fake,
    out=True,
)
library.differentiate(OP, _setup_context, _backward, _tangent)
