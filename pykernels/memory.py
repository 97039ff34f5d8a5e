"""Whether memory lies behind a tensor, and whether somebody follows work by its operators instead.

A storage may be freed or shrunk under its tensors (``resize_(0)``, as FSDP does between uses of a parameter),
and some tensors never have one: fakes, wrappers, zeros that autograd makes. Kernels get addresses and would
read whatever is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types that leave every operator to torch."""


def _look(tensors: Sequence[torch.Tensor]) -> bool:
    """The first call finds out who knows: nobody, where the compiled module is not built."""
    global hold
    hold = _compiled() or _nobody_knows
    return hold(tensors)


def _compiled() -> Callable[[Sequence[torch.Tensor]], bool] | None:
    try:
        from pykernels import _C
    except ImportError:
        return None
    return _C.have_memory if _C.know_tensors(torch.Tensor, torch.nn.Parameter) else None


def _nobody_knows(tensors: Sequence[torch.Tensor]) -> bool:
    return False


hold: Callable[[Sequence[torch.Tensor]], bool] = _look
"""Whether each of some plain tensors has memory behind all its elements, much sooner than by the same
questions from Python; False as well where one is open, for :func:`examine` to answer.
"""

_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
_tracing: Callable[[], Any] = torch._C._get_tracing_state


def watched() -> bool:
    """Whether work is followed by its operators: by a mode of dispatch (fake tensors, make_fx), a transform
    of torch.func, a trace, or forward differentiation. What a kernel does to memory would escape them.
    """
    return bool(_modes()) or _transforms() is not None or _tracing() is not None or duals()


def duals() -> bool:
    """Whether tensors may carry tangents now."""
    return forward_ad._current_level >= 0


def dispatches(tensor: torch.Tensor) -> bool:
    """Whether the type of a tensor handles operators itself: its memory, if any, is its own matter."""
    kind = type(tensor)
    return kind not in PLAIN and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _holds(tensor: torch.Tensor) -> bool:
    try:
        nbytes, storage = span(tensor), tensor.untyped_storage()
        start = storage.data_ptr()
        return not nbytes or (start != 0 and tensor.data_ptr() + nbytes <= start + storage.nbytes())
    except RuntimeError:  # of a transform of torch.func, or never allocated
        return False


def span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.nbytes
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def examine(op: str, name: str, tensor: torch.Tensor, *, plain: bool = False) -> None:
    """A dense tensor must have memory behind all its elements, unless operators on it are followed.

    ``plain``: where the operator does not take it, a type that handles operators itself is none of ours.
    """
    if is_compiling():  # fakes, and every run of the graph checks
        return
    if hold((tensor,)):
        return
    if dispatches(tensor):
        if plain and not watched():
            raise TypeError(
                f"{op}: {name} must be a plain tensor, got {type(tensor).__name__}, which has operators of "
                "its own"
            )
    elif not _holds(tensor) and not _followed(tensor):
        raise ValueError(
            f"{op}: {name} must have memory behind all its elements, a storage of at least "
            f"{tensor.storage_offset() * tensor.element_size() + span(tensor)} bytes, got {_held(tensor)}"
        )


def _followed(tensor: torch.Tensor) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)
    return wrapped and watched()


def _held(tensor: torch.Tensor) -> int:
    """Bytes of the storage, 0 where it was never allocated."""
    try:
        storage = tensor.untyped_storage()
        return storage.nbytes() if storage.data_ptr() else 0
    except RuntimeError:
        return 0
