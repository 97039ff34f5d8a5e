"""Fused kernels and a streaming engine for merging model weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykernels.backends import use_backend as use_backend
    from pykernels.engine.run import merge as merge
    from pykernels.engine.run import merge_state_dicts as merge_state_dicts
    from pykernels.engine.verify import verify as verify
    from pykernels.ops.compose_lora import compose_lora as compose_lora
    from pykernels.ops.dare_merge import dare_merge as dare_merge
    from pykernels.ops.dora_norm import dora_norm as dora_norm
    from pykernels.ops.drop_rescale import drop_rescale as drop_rescale
    from pykernels.ops.elect_sign import elect_sign as elect_sign
    from pykernels.ops.kth_magnitude import kth_magnitude as kth_magnitude
    from pykernels.ops.linear_merge import linear_merge as linear_merge
    from pykernels.ops.log_softmax import log_softmax as log_softmax
    from pykernels.ops.logsumexp import logsumexp as logsumexp
    from pykernels.ops.lora import LoRA as LoRA
    from pykernels.ops.lora_linear import lora_linear as lora_linear
    from pykernels.ops.lora_linear_grouped import lora_linear_grouped as lora_linear_grouped
    from pykernels.ops.merge_lora import merge_lora as merge_lora
    from pykernels.ops.softmax import softmax as softmax
    from pykernels.ops.task_arithmetic import task_arithmetic as task_arithmetic
    from pykernels.ops.ties_merge import ties_merge as ties_merge
    from pykernels.ops.trim import trim as trim

__version__ = "0.1.0"

_HOMES = {
    "merge": "pykernels.engine.run",
    "merge_state_dicts": "pykernels.engine.run",
    "verify": "pykernels.engine.verify",
    "use_backend": "pykernels.backends",
    "LoRA": "pykernels.ops.lora",
    **{
        op: f"pykernels.ops.{op}"
        for op in (
            "compose_lora",
            "dare_merge",
            "dora_norm",
            "drop_rescale",
            "elect_sign",
            "kth_magnitude",
            "linear_merge",
            "log_softmax",
            "logsumexp",
            "merge_lora",
            "lora_linear",
            "lora_linear_grouped",
            "softmax",
            "task_arithmetic",
            "ties_merge",
            "trim",
        )
    },
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import pykernels`` (and --help) costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pykernels' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, used already or not."""
    return sorted({*globals(), *_HOMES})
