"""Tensors as adapters change them, rows at a time: sources that are more than bytes of a file.

Traffic: the base's rows and the same rows of B once, A once per piece. Beside what is returned, factors that
files keep in another layout are held within a bound (``factors``), and where rows depend on each other
(``Adapted.whole``) one whole tensor per model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from math import prod
from typing import Protocol

import torch
from torch.nn import functional

from pykernels import backends
from pykernels.adapters.change import REPLACE, ROWS, VECTOR, Change
from pykernels.engine.arena import Arena
from pykernels.engine.factors import Factors, Pair
from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.shard import TensorInfo
from pykernels.engine.units import Adapted
from pykernels.ops.lora import LoRA
from pykernels.ops.merge_lora import merge_lora
from pykernels.ops.merge_lora_peft import Layer, delta, last_dora

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

Read = Callable[[TensorInfo | Adapted, int, int], torch.Tensor]
"""``count`` elements of a tensor from flat index ``first`` on, as bytes of its file."""


class Pieces(Protocol):
    """Where the factors of rows come from."""

    def piece(self, change: Change, dtype: torch.dtype, expert: int, first: int, count: int) -> Pair:
        """As :meth:`Factors.piece`."""


class Merge(Protocol):
    """How adapters are merged into rows."""

    def __call__(
        self, weight: torch.Tensor, adapters: Sequence[LoRA], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As :func:`pykernels.merge_lora`."""


class AdaptedTensors:
    """Reads elements of adapted sources. Its answers depend on the source alone, not on how it is cut."""

    def __init__(self, read: Read, pieces: Pieces | None = None, merge: Merge = merge_lora) -> None:
        self._read = read
        self._merge = merge
        self._held: dict[int, tuple[Adapted, torch.Tensor]] = {}
        self._room: Arena | None = None
        self.factors = Factors(read)
        self._pieces = pieces or self.factors
        # Adapters are merged by the backend of whoever opened the files.
        self._context = backends.host_context()

    def elements(
        self, source: Adapted, first: int, count: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``count`` elements from flat index ``first`` on, 1-D; ``out`` (same dtype) takes them."""
        columns = source.columns
        begin, end = first // columns, -(-(first + count) // columns)
        aligned = out is not None and (begin * columns, end * columns) == (first, first + count)
        if source.whole:
            rows = self._whole(source)[begin:end]
        else:
            target = out.view(-1, columns) if out is not None and aligned else None
            rows = self._context.copy().run(self.rows, source, begin, end - begin, target)
        found = rows.reshape(-1)[first - begin * columns :][:count]
        return found if out is None or found.data_ptr() == out.data_ptr() else out.copy_(found)

    def stored(
        self, tensor: TensorInfo | Adapted, first: int, end: int, columns: int | None = None
    ) -> torch.Tensor:
        """Rows ``first`` to ``end`` as they lie in the file, [rows, columns]."""
        columns = tensor.columns if isinstance(tensor, Adapted) else columns or 1
        return self._read(tensor, first * columns, (end - first) * columns).view(-1, columns)

    def product(
        self, change: Change, source: Adapted, first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """scaling * B @ A on rows ``first`` to ``end``, and |scaling| |B| |A|: float64 [rows, columns]."""
        found = []
        step = source.shape[1] if source.is_stack else source.rows
        for begin, stop in cut_at(first, end, step):
            like = torch.empty(stop - begin, 0, dtype=torch.float64, device="cpu")
            if source.whole and not source.is_stack:
                lora = _oriented(self._lora(change, like.dtype), change.transposed)
                lora = lora._replace(B=lora.B[change.offset :][begin:stop])
            else:
                lora = self._slice(change, source, begin, like)
            A, B, scaling = lora.A, lora.B, lora.scaling
            found.append((scaling * (B @ A), abs(scaling) * (B.abs() @ A.abs())))
        return torch.cat([moved for moved, _ in found]), torch.cat([bound for _, bound in found])

    def _whole(self, source: Adapted) -> torch.Tensor:
        held = self._held.get(source.model)
        if held is None or held[0] != source:
            self._held.pop(source.model, None)  # before the next takes as much
            rows = self._context.copy().run(self.rows, source, 0, source.rows, None)
            held = self._held[source.model] = (source, rows)
        return held[1]

    def rows(self, source: Adapted, first: int, count: int, out: torch.Tensor | None) -> torch.Tensor:
        """Rows ``first`` to ``first + count`` of the matrix, through all changes; in ``out`` where given."""
        columns = source.columns
        weight = self._read(source, first * columns, count * columns).view(count, columns)
        groups = [(kind, list(group)) for kind, group in groupby(source.changes, key=lambda c: c.kind)]
        for i, (kind, group) in enumerate(groups):
            target = out if i == len(groups) - 1 else None
            weight = self._changed(kind, group, source, weight, first, target)
        if out is not None and weight.data_ptr() != out.data_ptr():
            out.copy_(weight)
            return out
        return weight

    def _changed(
        self,
        kind: str,
        group: Sequence[Change],
        source: Adapted,
        weight: torch.Tensor,
        first: int,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        count, columns = weight.shape
        if kind == REPLACE:
            info = group[-1].tensors[0]
            return self._read(info, first * columns, count * columns).view(count, columns).to(weight.dtype)
        if kind == ROWS:
            return self.overwritten(group, weight, first)
        if kind == VECTOR:
            return self._moved(group, weight, first, source.rounding)
        if source.rounding == "peft":
            return self._as_peft(group, source, weight)
        if not source.is_stack:
            return self._merged(group, source, weight, first, out)
        step = source.shape[1]  # an expert's rows
        pieces = []
        for begin, end in cut_at(first, first + count, step):
            part = weight[begin - first : end - first]
            target = None if out is None else out[begin - first : end - first]
            pieces.append(self._merged(group, source, part, begin, target))
        return torch.cat(pieces) if out is None else out

    def overwritten(self, group: Sequence[Change], weight: torch.Tensor, first: int) -> torch.Tensor:
        """A copy of the rows from ``first`` on, with those that changes of kind "rows" overwrite."""
        weight = weight.clone()
        for change in group:
            columns = weight.shape[1]
            for i, row in enumerate(change.index):
                if first <= row < first + len(weight):
                    weight[row - first] = self._read(change.tensors[0], i * columns, columns)
        return weight

    def _moved(
        self, group: Sequence[Change], weight: torch.Tensor, first: int, rounding: str
    ) -> torch.Tensor:
        """Biases: their sum in float64 and one rounding, or PEFT's roundings."""
        added = [(c.scaling, self._read(c.tensors[0], first, len(weight)).view(-1, 1)) for c in group]
        if rounding == "peft":
            weight = weight.clone()
            for scaling, bias in added:
                weight += bias.to(_wide(weight.dtype)) * scaling
            return weight
        return sum((s * bias.double() for s, bias in added), weight.double()).to(weight.dtype)

    def _merged(
        self,
        group: Sequence[Change],
        source: Adapted,
        weight: torch.Tensor,
        first: int,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """One read and one write of the rows for all low-rank changes of a run."""
        if source.whole:
            turned = _turned(group)
            loras = [_oriented(self._lora(c, weight.dtype), c.transposed != turned) for c in group]
            return merge_lora(weight, loras, fan_in_fan_out=turned, out=out)
        loras = [self._slice(change, source, first, weight) for change in group]
        return self._merge(weight, loras, out=out)

    def _factor(self, info: TensorInfo, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Elements of a factor as PEFT loads them by default: float32, float64 beside a base of float64."""
        return self._read(info, first, count).to(_wide(dtype))

    def _lora(self, change: Change, dtype: torch.dtype, expert: int | None = None) -> LoRA:
        """A whole change, as PEFT writes it: A [r, in], B [out, r]; of one expert where there are several."""
        a, b = change.tensors[:2]
        A = self._factor(a, 0, prod(a.shape), dtype).view(a.shape[0], -1)
        B = self._factor(b, 0, prod(b.shape), dtype).view(b.shape[0], -1)
        if change.experts:
            at = change.expert if expert is None else expert
            A, B = A.view(change.experts, change.rank, -1)[at], B.view(len(B), -1, change.experts)[..., at]
        magnitude = None
        if len(change.tensors) > 2:
            magnitude = self._factor(change.tensors[2], 0, prod(change.tensors[2].shape), dtype)
        return LoRA(A, B, change.scaling, magnitude)

    def _slice(self, change: Change, source: Adapted, first: int, weight: torch.Tensor) -> LoRA:
        """The part of a change that falls on rows ``first`` to ``first + len(weight)`` of the matrix."""
        count, expert = len(weight), None
        if change.experts and change.expert is None:
            expert, first = divmod(first, source.shape[1])
        start = first + change.offset
        at = change.expert if expert is None else expert
        A, B = self._pieces.piece(change, _wide(weight.dtype), at or 0, start, count)
        magnitude = None
        if len(change.tensors) > 2:
            magnitude = self._factor(change.tensors[2], start, count, weight.dtype)
        return LoRA(A, B, change.scaling, magnitude)

    def _as_peft(self, group: Sequence[Change], source: Adapted, weight: torch.Tensor) -> torch.Tensor:
        """PEFT's operations in PEFT's order on matrices of PEFT's shapes, for the same bits."""
        layer = Layer(weight, _turned(group))
        last = last_dora([c if len(c.tensors) > 2 else None for c in group])
        for i, change in enumerate(group):
            moved = self._delta(change, source, kept=i < last).reshape(-1, source.columns)[change.offset :][
                : len(weight)
            ]
            magnitude = self._lora(change, weight.dtype).magnitude
            layer.merge(moved.to(weight.dtype) if change.rounded else moved, magnitude, kept=i < last)
            del moved
        return layer.weight

    def _delta(self, change: Change, source: Adapted, *, kept: bool) -> torch.Tensor:
        dtype = TORCH_DTYPE[source.dtype]
        if source.is_stack:
            loras = [self._lora(change, dtype, expert) for expert in range(change.experts)]
            return torch.stack([delta(x.A, x.B, x.scaling, change.transposed) for x in loras])
        A, B, scaling, _ = self._lora(change, dtype)
        kernel = change.tensors[0].shape[2:]
        if prod(kernel) == 1:
            return delta(A, B, scaling, change.transposed, None if kept else self._place(B, A))
        inputs = A.view(change.tensors[0].shape).transpose(0, 1)
        return _CONV[len(kernel)](inputs, B.view(*B.shape, *(1 for _ in kernel))).transpose(0, 1) * scaling

    def _place(self, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Memory for B A until the next is asked for: as blocks of the heap, these would leave gaps there."""
        nbytes = len(B) * A.shape[1] * A.itemsize
        if self._room is None or self._room.size < nbytes:
            self._room = None  # before the next takes as much
            self._room = Arena(nbytes)
        return self._room.tensor(0, nbytes, A.dtype).view(len(B), -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which factors are added to a weight of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _turned(group: Sequence[Change]) -> bool:
    """Whether the norms of a run are those of columns; where there are none, either way will do."""
    return any(c.transposed for c in group if len(c.tensors) > 2)


def _oriented(lora: LoRA, turn: bool) -> LoRA:
    """The same change of the transposed weight."""
    return lora._replace(A=lora.B.t(), B=lora.A.t()) if turn else lora


def cut_at(first: int, end: int, step: int) -> list[tuple[int, int]]:
    """``first`` to ``end``, cut at multiples of ``step``: (first, end) of every part."""
    edges = [first, *range((first // step + 1) * step, end, step), end]
    return [(a, b) for a, b in pairwise(edges) if b > a]
