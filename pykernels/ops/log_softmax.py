"""The logarithm of softmax over one dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from pykernels import backends, check, library
from pykernels.ops import softmax_gradient as gradient
from pykernels.ops.softmax_pass import Options, examine, over_rows

OP = "log_softmax"
_everyday = backends.everyday(OP)


def log_softmax(
    x: torch.Tensor,
    dim: int = -1,
    *,
    dtype: torch.dtype | None = None,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    safe: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """z - log(sum(e**z)) over ``dim``, z being x through softcap, temperature and mask, in this order.

    Without options a drop-in for ``torch.log_softmax``, special values included. The bits of a row depend on
    its content and length alone. Computed in float32 (float64 for float64), rounded once.

    Args:
        x, dim, dtype, temperature, mask, softcap, out: as for :func:`pykernels.softmax`.
        safe: a row whose sum is 0 (nothing but -inf) gives -inf, not NaN, and no gradient.

    Returns:
        The log-probabilities [*S], contiguous (``out`` where given). Differentiable, twice too, in ``x`` and
        a float ``mask``.

    Raises:
        As :func:`pykernels.softmax`.
    """
    plain = softcap is None and safe is False and type(temperature) is float and temperature == 1.0
    if plain and mask is None and dtype is None and not is_dynamo_compiling():
        done = _everyday(x, dim, out)
        if done is not None:
            return done
    options = Options(temperature, mask, softcap, None, safe)
    if library.needed(x, mask):
        examine(OP, x, dim, dtype, options)
        if any(map(library.wants_gradient, (x, mask))):
            check.no_out(OP, out)
        return library.call(OP, out, x, dim, dtype, temperature, mask, softcap, safe)
    return over_rows(OP, x, dim, dtype, options, out)


def _run(
    x: torch.Tensor,
    dim: int,
    dtype: torch.dtype | None,
    temperature: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    safe: bool,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return over_rows(OP, x, dim, dtype, Options(temperature, mask, softcap, None, safe), out)


def _fake(
    x: torch.Tensor,
    dim: int,
    dtype: torch.dtype | None,
    temperature: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    safe: bool,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    examine(OP, x, dim, dtype, Options(temperature, mask, softcap, None, safe))
    if out is not None:
        check.row_output(OP, out, x, dtype or x.dtype)
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, dim, _, temperature, mask, softcap, safe = inputs
    gradient.save(ctx, x, output, dim, Options(temperature, mask, softcap, None, safe))


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    by_x, by_mask, _ = gradient.gradients(ctx, grad, "log_softmax_backward")
    return by_x, None, None, None, by_mask, None, None


def _tangent(y: torch.Tensor, primals: Any, tangents: Any) -> torch.Tensor:
    x, dim, _, temperature, mask, softcap, safe = primals
    by = (tangents[0], tangents[4], None)
    return gradient.tangent(OP, y, x, dim, Options(temperature, mask, softcap, None, safe), by)


library.define(
    OP,
    "Tensor x, int dim, ScalarType? dtype, float temperature, Tensor? mask, float? softcap, bool safe",
    _run,
    _fake,
    out=True,
)
library.differentiate(OP, _setup_context, _backward, _tangent)
