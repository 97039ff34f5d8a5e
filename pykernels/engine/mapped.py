"""Input files mapped into memory: tensors that alias the page cache, no copy and no anonymous memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from threading import Lock

import torch

from pykernels.engine.adapted import AdaptedTensors
from pykernels.engine.files import TORCH_DTYPE, FileError, FileIdentity, TensorInfo, open_regular, shown
from pykernels.engine.units import Adapted, Source

PAGE = 4096
MAX_OPEN = 64
"""Files mapped at once: a model may have hundreds, and descriptors are few."""
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None

with warnings.catch_warnings():
    # torch says once per process that a read-only buffer must not be written to; nothing here writes to one.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class MappedFile:
    """One file, mapped read-only. It stays mapped as long as this object or one of its tensors lives.

    It cannot be unmapped earlier: torch does not pin the buffer, and a tensor would be left without memory.
    """

    def __init__(self, path: str, identity: FileIdentity | None = None) -> None:
        """Raises FileError when the file is no longer the one that ``identity`` was taken of."""
        with open_regular(Path(path)) as handle:
            check_identity(path, os.fstat(handle), identity)
            self._map = mmap.mmap(handle, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)
        self._address = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()

    def tensor(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes ``start`` to ``end`` as a 1-D tensor that aliases the file, at any alignment; read-only."""
        if end == start:
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(self._map, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start)

    def drop(self, start: int, end: int) -> None:
        """These bytes are not needed again soon: their pages leave this process, not the page cache."""
        first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if last > first and _MADVISE is not None:
            # Not mmap's own method: it holds the interpreter's lock, for milliseconds per tensor.
            _MADVISE(
                ctypes.c_void_p(self._address + first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
            )


def check_identity(path: str, status: os.stat_result, identity: FileIdentity | None) -> None:
    """Raise FileError when size or modification time differ from those that the plan was made with."""
    if identity and (status.st_size, status.st_mtime_ns) != (identity.size, identity.mtime_ns):
        raise FileError(
            f"{shown(path, 300)}: changed since its header was read: {identity.size} bytes then, "
            f"{status.st_size} now, modified at {identity.mtime_ns} ns then, {status.st_mtime_ns} now"
        )


def check_files(identities: Mapping[str, FileIdentity]) -> None:
    """Raise FileError, naming the file, when one is no longer what its header was read of."""
    for path, identity in identities.items():
        check_identity(path, Path(path).stat(), identity)


class Inputs:
    """All input files of a plan; maps each on first use and keeps the latest few. Any thread may ask."""

    def __init__(self, identities: Mapping[str, FileIdentity]) -> None:
        self._identities = identities
        self._open: OrderedDict[str, MappedFile] = OrderedDict()
        self._lock = Lock()
        self.adapted = AdaptedTensors(self._stored)

    def file(self, path: str) -> MappedFile:
        """The mapped file. Raises FileError when it changed since it was planned."""
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
            if len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)
            mapped = self._open[path] = MappedFile(path, self._identities.get(path))
            return mapped

    def check(self) -> None:
        """Raise FileError when a file changed since its header was read."""
        check_files(self._identities)

    def elements(
        self, source: Source, first: int, count: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``count`` elements of a source from flat index ``first`` on, 1-D; ``out`` (same dtype) takes them.

        They alias the file, unless adapters change them or there is an ``out``.
        """
        if isinstance(source, Adapted):
            return self.adapted.elements(source, first, count, out)
        stored = self._stored(source, first, count)
        return stored if out is None else out.copy_(stored)

    def matrix(self, info: TensorInfo) -> torch.Tensor:
        """A whole tensor of an adapter, [rows, columns], aliasing the file."""
        return self._stored(info, 0, prod(info.shape)).view(info.shape[0], -1)

    def bytes_of(self, info: TensorInfo) -> torch.Tensor:
        """The bytes of a whole tensor, whatever its dtype."""
        return self.file(info.file).tensor(info.start, info.end, torch.uint8)

    def _stored(self, source: Source | TensorInfo, first: int, count: int) -> torch.Tensor:
        dtype = TORCH_DTYPE[source.dtype]
        start = source.start + first * dtype.itemsize
        return self.file(source.file).tensor(start, start + count * dtype.itemsize, dtype)

    def bytes(self, source: Source, first: int, count: int) -> torch.Tensor:
        """``count`` bytes of a source from byte ``first`` on, whatever its dtype."""
        start = source.start + first
        return self.file(source.file).tensor(start, start + count, torch.uint8)

    def drop(self, source: Source) -> None:
        """The source was used up."""
        mapped = self._open.get(source.file)
        if mapped is not None:
            mapped.drop(source.start, source.end)

    def close(self) -> None:
        """Let go of every file; each is unmapped with its last tensor."""
        self._open.clear()
        self.adapted.factors.clear()
