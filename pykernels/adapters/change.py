"""What an adapter does to one tensor of a base: plain data, which a plan keeps beside the tensor's bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pykernels.engine.shard import TensorInfo

REPLACE, ADD, ROWS, VECTOR = "replace", "add", "rows", "vector"


@dataclass(frozen=True)
class Change:
    """One step; the steps of a tensor, seen as a matrix of rows, are taken in their order.

    kind "replace": the tensor becomes ``tensors[0]``, in the base's dtype. "add": ``scaling * B @ A`` of
    ``tensors`` (A, B) is added; a third of them is DoRA's magnitude. "rows": the rows ``index`` become those
    of ``tensors[0]``. "vector": ``scaling * tensors[0]`` is added to a bias.

    ``transposed``: (B @ A).T is added, the norm of a magnitude is that of columns. ``rounded``: PEFT rounds
    the product to the base's dtype before it is added. ``experts``: A [experts * r, in] and B [out, r *
    experts] hold a product per expert; the tensor is the one of ``expert``, or with None all of them, one
    after another. ``offset``: the tensor begins at this row of the product.
    """

    kind: str
    adapter: int
    tensors: tuple[TensorInfo, ...]
    scaling: float = 1.0
    transposed: bool = False
    rounded: bool = False
    experts: int = 0
    expert: int | None = None
    offset: int = 0
    index: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Of an "add"."""
        return self.tensors[0].shape[0] // max(1, self.experts)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.end - t.start for t in self.tensors)

    @staticmethod
    def of(d: dict[str, Any]) -> Change:
        """Read back from plain data."""
        tensors = tuple(TensorInfo(**{**t, "shape": tuple(t["shape"])}) for t in d["tensors"])
        return Change(**{**d, "tensors": tensors, "index": tuple(d["index"])})
