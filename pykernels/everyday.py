"""Calls of every day: the compiled ones that take tensors as objects and ask them what they must know."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch.autograd import forward_ad

from pykernels import _C
from pykernels.native import FLOAT_ROWS, threads

_WATCHES = (torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state, forward_ad)
"""What everyday calls ask in place of ``memory.watched``: a transform's tensors have no memory to lend."""

_WRITTEN = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)
"""What the public function calls: the way through it takes as long as all other questions together."""

Call: TypeAlias = Callable[..., torch.Tensor | None]

SHORTCUTS_OF = ("2.13.",)
"""Releases of torch whose library the tests have asked; in another a name of C++ may mean something else."""


@torch.inference_mode(False)  # whose tensors do not count what changes them
def take_shortcuts() -> bool:
    """Ask torch's library directly what calls must know of tensors, where its answers are seen to be right.

    Whether memory lies behind a tensor takes a few nanoseconds then; False: Python goes on to be asked.
    """
    if not torch.__version__.startswith(SHORTCUTS_OF):
        return False
    with torch._C._DisableFuncTorch(), torch._C._DisableTorchDispatch():  # whatever the first call stands in
        return _C.take_shortcuts(torch._C.__file__, torch.Tensor, _trials())


def _trials() -> list[tuple[torch.Tensor, int, int, int, bool, bool]]:
    """Tensors and what Python says of them."""
    plain, learned = torch.zeros(8, device="cpu"), torch.nn.Parameter(torch.zeros(3, device="cpu"))
    freed = plain.clone()
    freed.untyped_storage().resize_(0)
    some = [plain, plain[2:6], plain.bfloat16(), freed, torch._neg_view(plain), learned, learned * 2]
    trials = []
    for t in some:
        lies = t.untyped_storage().nbytes(), int(t.storage_offset())
        trials.append((t, t._cdata, *lies, t.is_neg(), t.requires_grad))
    return trials


take_shortcuts()


def _written(tensor: torch.Tensor) -> bool:
    """Counts a change; False where torch allows none, of which its count says nothing."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    _WRITTEN((tensor,))
    return True


def rows(op: str, forced: ContextVar[str | None]) -> Call:
    """The call (x, dim, out) of softmax or log_softmax, or (x, dim, keepdim) of logsumexp, that leaves what
    it does not take, returning None.

    It reads tensors by DLPack's exchange protocol, which answers in nanoseconds what attributes answer in a
    microsecond. A torch that does not speak it (older than 2.10) has all its calls left.
    """
    _C.lend_tensors(torch.Tensor, forced, torch.empty_like, _written, threads, _WATCHES)
    calls: dict[str, Call] = {
        "softmax": _C.softmax_rows,
        "log_softmax": _C.log_softmax_rows,
        "logsumexp": _C.logsumexp_rows,
    }
    return calls[op]


def layers(forced: ContextVar[str | None], adapter: type) -> tuple[Call, Call, Call]:
    """The calls of that kind (x, weight, A, B, scaling, bias, column_scale), (x, weight, adapters, index,
    bias) and, of a merge, (weight, adapters, fan_in_fan_out, out, rounding).
    """
    types, asked = (torch.Tensor, torch.nn.Parameter, adapter), (forced, torch.is_grad_enabled, threads)
    _C.lend_layers(*types, *asked, FLOAT_ROWS, _WATCHES, _written)
    return _C.lora_layer, _C.lora_layers, _C.lora_merge
