"""The public ops as torch operators, for ``torch.compile`` and for gradients.

``torch.ops.pykernels.<op>`` returns a new tensor, ``torch.ops.pykernels.<op>.out`` fills one. Schemas know
no unions, so a weight is a list of numbers and a tensor of which one is empty or None, and words stand for
rules. An eager call without a gradient never comes here: the dispatcher costs more than a small merge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map

from pykernels import check, memory

NAMESPACE = "pykernels"
_LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_SIGN = 1 << 63
_transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
_differentiable: set[str] = set()
"""Operators that see to tangents by themselves."""


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
    torch.library.register_vmap(f"{NAMESPACE}::{op}", functools.partial(_slice_by_slice, op), lib=_LIBRARY)
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


def _slice_by_slice(op: str, info: Any, in_dims: Any, *positional: Any, **named: Any) -> Any:
    """The rule of ``torch.func.vmap``: a call for every slice, so that its bits are those of a call alone."""
    if not info.batch_size:
        raise NotImplementedError(f"{op}: vmap must go over at least one slice, got a dimension of size 0")
    overload = getattr(torch.ops.pykernels, op).default
    found = []
    for i in range(info.batch_size):
        mine = tree_map(lambda v, d, i=i: v if d is None else v.select(d, i), positional, in_dims)
        found.append(overload(*mine, **named))
    stacked = tree_map(lambda *slices: torch.stack(slices), *found)
    return stacked, tree_map(lambda _: 0, stacked)


def differentiate(
    op: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    tangent: Callable[..., torch.Tensor] | None = None,
) -> None:
    """Give ``op`` a gradient, by functions as ``torch.library.register_autograd`` takes them.

    ``tangent`` (result, primals, tangents) gives the forward derivative, the arguments being those of the
    schema and a tangent None where there is none; without it a tangent is refused, as torch would drop it.
    """
    overload = getattr(torch.ops.pykernels, op).default
    reverse = make_autograd_impl(overload, Info(backward, setup_context))

    def kernel(keys: Any, *positional: Any, **named: Any) -> Any:
        if not duals(positional):
            _no_transform(op, positional)
            return reverse(keys, *positional, **named)
        if tangent is None:
            refuse_tangent(op)
        primals = [_part(value, 0) for value in positional]
        result = reverse(keys, *primals, **named)
        whole, *rest = result if isinstance(result, tuple) else (result,)
        along = tangent(whole, primals, [_part(value, 1) for value in positional], **named)
        whole = forward_ad.make_dual(whole, along)  # type: ignore[no-untyped-call]
        return (whole, *rest) if rest else whole

    _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)
    _differentiable.add(op)


def _no_transform(op: str, values: Sequence[Any]) -> None:
    """Refuse the gradients of torch.func: torch gives registered formulas no way to nest in them."""
    if _transforms() and torch.is_grad_enabled() and torch._C._any_requires_grad(*values):
        raise NotImplementedError(
            f"{op}: torch.func.grad, vjp and jacrev are not supported: use backward() or torch.autograd.grad"
        )


def duals(values: Sequence[Any]) -> bool:
    """Whether a tensor among some arguments carries a tangent."""
    return memory.duals() and any(
        isinstance(v, torch.Tensor) and _part(v, 1) is not None
        for value in values
        for v in (value if isinstance(value, list | tuple) else (value,))
    )


def no_tangent(op: str, values: Sequence[Any]) -> None:
    """Refuse tangents that would be dropped without a word."""
    if duals(values):
        refuse_tangent(op)


def refuse_tangent(op: str) -> NoReturn:
    """Say that there is no forward derivative."""
    raise NotImplementedError(
        f"{op}: no forward derivative is defined here, and an argument carries a tangent: detach it"
    )


def _part(value: Any, which: int) -> Any:
    """The primal (0) or the tangent (1) of a tensor, or of each of several; a number has no tangent."""
    if isinstance(value, torch.Tensor):
        return forward_ad.unpack_dual(value)[which]  # type: ignore[no-untyped-call]
    if isinstance(value, list | tuple):
        return [_part(v, which) for v in value]
    return None if which else value


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
    if not is_compiling() and (out is not None or op not in _differentiable):
        no_tangent(op, [out, *positional])
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
        no_tangent(op, [base, *tuned])
    return None if base is None else constant(base), [constant(t) for t in tuned]


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that gets no gradient."""
    return tensor.detach() if isinstance(tensor, torch.Tensor) and tensor.requires_grad else tensor


def numbers(values: Sequence[float]) -> torch.Tensor:
    """Numbers as a tensor [n] of the host, float64, so that a graph holds their places and not their values.

    By products: those torch takes out of a graph, while it compiles what a fill is given, each time anew.
    """
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    return torch.cat([one[:0], *(one * value for value in values)])


def signed(seed: int) -> int:
    """A seed of 64 bits as a schema's int, which has a sign."""
    return seed - 2 * _SIGN if seed >= _SIGN else seed


def unsigned(seed: int) -> int:
    """What :func:`signed` took."""
    return seed + 2 * _SIGN if seed < 0 else seed
