"""The public ops as torch operators, for ``torch.compile`` and for gradients.

``torch.ops.pykernels.<op>`` returns a new tensor, ``torch.ops.pykernels.<op>.out`` fills one. Schemas know
no unions, so a weight is a list of numbers and a tensor of which one is empty or None, and words stand for
rules. An eager call without a gradient never comes here: the dispatcher costs more than a small merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from pykernels import check, memory

NAMESPACE = "pykernels"
_LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_SIGN = 1 << 63


def define(
    op: str,
    arguments: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    out: bool,
    returns: str = "Tensor",
) -> None:
    """Define ``op`` and, where ``out``, its overload that fills a tensor.

    ``arguments`` is the schema's list, ``returns`` its result. ``run`` takes them by name, and ``out`` too;
    ``fake`` does the same with tensors that have no data: it checks, and returns an empty result.
    """
    _LIBRARY.define(f"{op}({arguments}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_LIBRARY)
    if not out:
        return

    def fill(*positional: Any, **named: Any) -> None:
        run(*positional, **named)

    def fake_fill(*positional: Any, **named: Any) -> None:
        fake(*positional, **named)

    name = f"{op}.out"
    star = "" if "*" in arguments else "*, "  # out is given by name
    _LIBRARY.define(f"{name}({arguments}, {star}Tensor(a!) out) -> ()", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, fill, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_fill, lib=_LIBRARY)


def differentiate(op: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give ``op`` a gradient; the arguments are those of ``torch.library.register_autograd``."""
    torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=setup_context, lib=_LIBRARY)


def needed(*coefficients: object) -> bool:
    """Whether a call must go by the operator: compiled, watched, or a tensor asks for a gradient or is of a
    type with operators of its own.
    """
    if is_compiling() or memory.watched():
        return True
    for value in coefficients:
        if check.is_tensor(value) and (wants_gradient(value) or memory.dispatches(value)):
            return True
    return False


def wants_gradient(value: object) -> bool:
    """Whether this is a tensor whose gradient is being recorded."""
    return check.is_tensor(value) and value.requires_grad and torch.is_grad_enabled()


def call(op: str, out: torch.Tensor | None, *positional: Any, **named: Any) -> torch.Tensor:
    """Run ``op`` through the dispatcher; the result is ``out`` where given."""
    overloads = getattr(torch.ops.pykernels, op)
    if out is None:
        result: torch.Tensor = overloads.default(*positional, **named)
        return result
    overloads.out(*positional, **named, out=out)
    return out


def empty(
    op: str, like: torch.Tensor, out_dtype: torch.dtype | None, out: torch.Tensor | None
) -> torch.Tensor:
    """The result of a fake: ``out``, checked as far as it goes without addresses, or a new tensor."""
    if out is not None:
        check.output(op, out, out_dtype, like, ())
        return out
    return torch.empty_like(like, dtype=check.result_dtype(op, out_dtype, like))


def inputs(
    op: str, base: torch.Tensor | None, tuned: Sequence[torch.Tensor], name: str = "tuned"
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The tensors of a call by operator: checked, and constants, as they get no gradient.

    In a graph no more is checked than can be traced: fakes check the rest, and kernels everything.
    """
    if is_compiling():
        check.models(op, tuned, name)
    else:
        check.tensors(op, base, tuned, name)
    return None if base is None else constant(base), [constant(t) for t in tuned]


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that gets no gradient."""
    return tensor.detach() if isinstance(tensor, torch.Tensor) and tensor.requires_grad else tensor


def signed(seed: int) -> int:
    """A seed of 64 bits as a schema's int, which has a sign."""
    return seed - 2 * _SIGN if seed >= _SIGN else seed


def unsigned(seed: int) -> int:
    """What :func:`signed` took."""
    return seed + 2 * _SIGN if seed < 0 else seed
