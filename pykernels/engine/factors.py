"""Factors of adapters as pieces of rows take them: laid out and widened once per tensor, within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import prod
from threading import Lock

import torch

from pykernels.adapters.change import Change
from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.shard import TensorInfo

ROOM = 64 << 20
PATIENCE = 64
"""Pieces for which factors that were used stay: tensors of several experts and adapters come in turns."""

Pair = tuple[torch.Tensor, torch.Tensor]


class Factors:
    """A [r, columns] and rows of B [rows, r] of a change, of one expert where it has several.

    A file keeps the experts of B next to each other, and a transposed change its factors the other way round:
    cutting pieces from there reads most of both again for each. What is held takes at most ``room`` bytes;
    float32 factors that lie as they are needed are not copied at all.
    """

    def __init__(self, read: Callable[[TensorInfo, int, int], torch.Tensor]) -> None:
        self.room = ROOM
        self._read = read
        self._held: OrderedDict[tuple[object, ...], Pair] = OrderedDict()
        self._used: dict[tuple[object, ...], int] = {}
        self._pieces = 0
        self._lock = Lock()

    def piece(self, change: Change, dtype: torch.dtype, expert: int, first: int, count: int) -> Pair:
        """A, and rows ``first`` to ``first + count`` of B, contiguous, in ``dtype``."""
        a, b = change.tensors[:2]
        if (
            not (change.transposed or change.experts)
            and TORCH_DTYPE[a.dtype] == TORCH_DTYPE[b.dtype] == dtype
        ):
            A, B = self._read(a, 0, prod(a.shape)), self._read(b, first * change.rank, count * change.rank)
            return A.view(change.rank, -1), B.view(count, -1)
        with self._lock:
            held = self._whole(change, dtype)
        if held is not None:
            return held[0][expert], held[1][expert][first : first + count]
        A, B = self._views(change)
        rows = B[expert][first : first + count]
        return A[expert].to(dtype).contiguous(), rows.to(dtype).contiguous()

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._held.clear()
            self._used.clear()

    def _views(self, change: Change) -> Pair:
        """[experts, r, columns] and [experts, rows, r], in the file's own memory."""
        a, b = (self._read(info, 0, prod(info.shape)) for info in change.tensors[:2])
        experts, outputs = max(1, change.experts), change.tensors[1].shape[0]
        A = a.view(experts, change.rank, -1)
        B = b.view(outputs, change.rank, experts).permute(2, 0, 1)
        return (B.transpose(1, 2), A.transpose(1, 2)) if change.transposed else (A, B)

    def _whole(self, change: Change, dtype: torch.dtype) -> Pair | None:
        """Of all experts; None where that is more than there is room for."""
        a, b = change.tensors[:2]
        key = (a.file, a.start, b.start, change.transposed, change.experts, dtype)
        self._pieces += 1
        if key in self._held:
            self._held.move_to_end(key)
            self._used[key] = self._pieces
            return self._held[key]
        views = self._views(change)
        size = sum(v.numel() * dtype.itemsize for v in views if not _as_needed(v, dtype))
        if size and not self._make_room(size):
            return None
        pair = views[0].to(dtype).contiguous(), views[1].to(dtype).contiguous()
        if size:
            self._held[key] = pair
            self._used[key] = self._pieces
        return pair

    def _make_room(self, size: int) -> bool:
        """Drop what has not been used for long, the oldest first, and only if that is enough."""
        free, old = self.room - self._size(), []
        for key, pair in self._held.items():
            if free >= size or self._pieces - self._used[key] <= PATIENCE:
                break
            old.append(key)
            free += _nbytes(pair)
        if free < size:
            return False
        for key in old:
            del self._held[key], self._used[key]
        return True

    def _size(self) -> int:
        return sum(map(_nbytes, self._held.values()))


def _nbytes(pair: Pair) -> int:
    return sum(t.numel() * t.element_size() for t in pair)


def _as_needed(view: torch.Tensor, dtype: torch.dtype) -> bool:
    return view.dtype == dtype and view.is_contiguous()
