"""What adapters take of the memory beside chunks and the ring, told before anything is read.

Whole tensors (``Adapted.whole``) take copies of themselves; merges by rows the factors of all adapters of a
tensor at once, as the kernels pack them, since their sum is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

from pykernels.adapters.change import ADD, Change
from pykernels.engine.compute import CHUNK_BYTES
from pykernels.engine.files import TORCH_DTYPE, shown
from pykernels.engine.units import Adapted, Output, Plan
from pykernels.ops.merge_lora_peft import last_dora

COPIES = 4
"""Of a whole tensor in float32 that are held at once: product, its scaled copy, what is merged, result."""
NORMED = 2
"""Copies more with rounding peft where there are norms: the unmerged weight, and its sum with the product."""
SHARE = 2
"""Half of the memory may go to factors; chunks, ring and factors that stay for later pieces take the rest."""


def check_adapted(plan: Plan, memory: int) -> None:
    """Raise ValueError for a tensor whose adapters take more than ``memory``."""
    for out in plan.outputs:
        sources = [s for s in out.sources if isinstance(s, Adapted)]
        kept = sum(s.nbytes for s in sources if s.whole)  # one per model stays until the next tensor
        for source in sources:
            if source.whole:
                need = _copies(source) * _width(source) * out.numel + kept - source.nbytes
                why = "which must be whole (rounding peft, or norms of columns)"
            else:
                need, why = SHARE * _factors(source, out), "for the factors of its adapters"
            if need > memory:
                raise ValueError(
                    f"memory must be at least {need} bytes for tensor {shown(out.name)}, {why}, got {memory}"
                )


def _copies(source: Adapted) -> int:
    """With rounding peft also the deltas that the norm of a later adapter needs again."""
    if source.rounding != "peft":
        return COPIES
    last = last_dora([c if len(c.tensors) > 2 else None for c in _adds(source)])
    return COPIES if last < 0 else COPIES + NORMED + last


def _factors(source: Adapted, out: Output) -> int:
    """Bytes of A and a chunk's rows of B, packed, and laid out before where the file has them otherwise.

    Rows of B whose norms are folded in are in float64 for a while.
    """
    adds = _adds(source)
    rows = CHUNK_BYTES // max(1, source.columns * TORCH_DTYPE[out.dtype].itemsize) + 1
    rows = min(source.shape[1] if source.is_stack else source.rows, rows)
    wide = any(len(c.tensors) > 2 for c in adds)
    total = 0
    for change in adds:
        copies = 2 if _is_laid_out(change) else 1
        total += change.rank * (source.columns * copies + rows * (copies + 2 * wide))
    return total * _width(source)


def _adds(source: Adapted) -> Sequence[Change]:
    return [change for change in source.changes if change.kind == ADD]


def _is_laid_out(change: Change) -> bool:
    return bool(change.transposed or change.experts) or any(t.dtype != "F32" for t in change.tensors[:2])


def _width(source: Adapted) -> int:
    return 8 if source.dtype == "F64" else 4
