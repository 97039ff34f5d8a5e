"""Output shards: computed straight into a ring of memory, hashed and written behind by one thread.

Traffic: every output byte is written once by a merge kernel and read once from memory by the writer, which
hashes it, counts its NaN and Inf and hands it to the system slice by slice while the slice is in cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import torch
import xxhash

from pykernels.engine.arena import Arena, InFlight
from pykernels.engine.direct import allocate, open_output
from pykernels.engine.nonfinite import count_nonfinite

BLOCK = 4096
"""File position and memory address agree modulo this; whole blocks are written, the rest waits."""
SLICE = 256 << 10
BATCH = 4 << 20
NEAR = 32 << 20
"""Ring positions from which on it is worth going back to the beginning early."""
DIRECT_WRITE = 4 << 20


@dataclass
class _File:
    path: Path
    handle: int
    direct: bool
    sent: int = 0  # bytes written so far, a multiple of BLOCK until the end
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    nonfinite: int = 0


@dataclass(frozen=True)
class Piece:
    """``nbytes`` bytes at ``at`` in the ring; ``tensor`` None: a header. ``last``: its tensor ends here."""

    tensor: int | None
    at: int
    nbytes: int
    dtype: torch.dtype
    last: bool


@dataclass(frozen=True)
class _Batch:
    file: _File
    origin: int  # ring position of the file's byte 0, were the ring endless
    pieces: list[Piece]
    final: bool

    @property
    def end(self) -> int:
        return self.pieces[-1].at + self.pieces[-1].nbytes


@dataclass(frozen=True)
class Written:
    """What the writer saw of one tensor."""

    xxh3_128: str
    nonfinite: int


class ShardWriter:
    """Writes files one after another: ``begin``, then ``reserve`` and fill piece by piece, then ``end``.

    A reserved tensor must be filled before the next call. ``close`` waits for the last byte; ``abort`` gives
    up. Errors of the writing thread are raised by the next call. ``written``: a record per tensor number.
    """

    def __init__(self, arena: Arena, *, durable: bool = False) -> None:
        self.written: dict[int, Written] = {}
        self.busy = 0.0  # seconds of hashing and writing
        self._arena = arena
        self._durable = durable
        self._flight = InFlight()
        self._queue: SimpleQueue[_Batch | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._file: _File | None = None
        self._files: list[_File] = []
        self._at = self._position = 0
        self._pending: list[Piece] = []
        self._thread = Thread(target=self._run, name="pykernels-writer", daemon=True)
        self._thread.start()

    def begin(self, path: Path, nbytes: int, header: bytes) -> None:
        """Create ``path``, which will have ``nbytes`` bytes and begins with ``header``."""
        handle, direct = open_output(path, direct=self._durable)
        self._file = _File(path, handle, direct)
        self._files.append(self._file)
        if direct:
            allocate(handle, nbytes)
        self._at = -(-self._at // BLOCK) * BLOCK
        self._position = 0
        for start in range(0, len(header), BATCH):
            part = header[start : start + BATCH]
            self.reserve(len(part), torch.uint8, None)
            self._arena.view[self._at - len(part) : self._at] = part

    def reserve(
        self, nbytes: int, dtype: torch.dtype, tensor: int | None, *, last: bool = False
    ) -> torch.Tensor:
        """The next ``nbytes`` bytes of the file, as a 1-D tensor to fill. ``last``: ``tensor`` ends here."""
        if nbytes > self._arena.size - BLOCK:
            raise ValueError(f"reserve: {nbytes} bytes do not fit in a ring of {self._arena.size}")
        if self._pending and self._at - self._pending[0].at >= BATCH:
            self._submit()
        if self._at + nbytes > self._arena.size or (self._at >= NEAR and self._is_free_below(nbytes)):
            self._wrap(nbytes)
        else:
            self._flight.wait(self._at, self._at + nbytes)
        self._check()
        start, self._at, self._position = self._at, self._at + nbytes, self._position + nbytes
        self._pending.append(Piece(tensor, start, nbytes, dtype, last))
        return self._arena.tensor(start, nbytes, dtype)

    def end(self) -> None:
        """The file is complete."""
        self._submit(final=True)

    def close(self) -> None:
        """Wait until everything is on its way to the disk (on it, if durable)."""
        self._queue.put(None)
        self._thread.join()
        self._check()

    def abort(self) -> None:
        """Stop as soon as possible; files stay incomplete."""
        self._failure = self._failure or RuntimeError("the merge was given up")
        self._queue.put(None)
        self._thread.join()
        for file in self._files:
            _close(file)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _is_free_below(self, nbytes: int) -> bool:
        """Whether the ring's beginning can be used again: warm pages, where those ahead may be untouched."""
        held = self._pending[0].at if self._pending else self._at - BLOCK
        return held >= nbytes + BLOCK and self._flight.is_free(0, nbytes + BLOCK)

    def _wrap(self, nbytes: int) -> None:
        self._submit()
        rest = self._position % BLOCK  # goes out with the next block, so it moves along
        self._flight.wait(0, rest + nbytes)
        view = self._arena.view
        view[:rest] = view[self._at - rest : self._at]
        self._at = rest

    def _submit(self, final: bool = False) -> None:
        self._check()
        if self._pending and self._file is not None:
            batch = _Batch(self._file, self._at - self._position, self._pending, final)
            # Whole blocks: the first one may begin with bytes that the batch before left behind.
            self._flight.add(batch.pieces[0].at // BLOCK * BLOCK, -(-batch.end // BLOCK) * BLOCK)
            self._pending = []
            self._queue.put(batch)

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            began = time.perf_counter()
            try:
                if self._failure is None:
                    self._write(batch)
            except OSError as error:
                where = f"{error.strerror} at byte {batch.file.sent}"
                self._failure = OSError(error.errno, where, str(batch.file.path))
            except BaseException as error:  # raised again on the calling thread
                self._failure = error
            finally:
                self.busy += time.perf_counter() - began
                self._flight.done()

    def _write(self, batch: _Batch) -> None:
        file = batch.file
        step = DIRECT_WRITE if file.direct else SLICE
        for piece in batch.pieces:
            for start, end in _slices(piece):
                if piece.tensor is not None:
                    file.digest.update(self._arena.view[start:end])
                    if piece.dtype.is_floating_point:
                        file.nonfinite += count_nonfinite(self._arena.tensor(start, end - start, piece.dtype))
                if end - batch.origin - file.sent >= step:
                    self._send(batch, (end - batch.origin) // BLOCK * BLOCK)
            if piece.last and piece.tensor is not None:
                self.written[piece.tensor] = Written(file.digest.hexdigest(), file.nonfinite)
                file.digest, file.nonfinite = xxhash.xxh3_128(), 0
        self._send(batch, (batch.end - batch.origin) // BLOCK * BLOCK)
        if batch.final:
            self._finish(batch)

    def _send(self, batch: _Batch, until: int) -> None:
        """Write the file's bytes from those sent already up to ``until``."""
        file = batch.file
        while file.sent < until:
            part = self._arena.view[file.sent + batch.origin : until + batch.origin]
            file.sent += _pwrite(file, part)

    def _finish(self, batch: _Batch) -> None:
        file, size = batch.file, batch.end - batch.origin
        if file.direct and file.sent < size:  # a whole block, cut off again: nobody else uses the ring there
            self._send(batch, -(-size // BLOCK) * BLOCK)
            os.ftruncate(file.handle, size)
        self._send(batch, size)
        if self._durable:
            os.fsync(file.handle)
        _close(file)


def _slices(piece: Piece) -> Iterator[tuple[int, int]]:
    end = piece.at + piece.nbytes
    for start in range(piece.at, end, SLICE):
        yield start, min(start + SLICE, end)


def _pwrite(file: _File, part: memoryview) -> int:
    try:
        return os.pwrite(file.handle, part, file.sent)
    except OSError as error:
        if not file.direct or error.errno != errno.EINVAL:
            raise
        # This file system wants other blocks than ours: go through the page cache from here on.
        fcntl.fcntl(file.handle, fcntl.F_SETFL, fcntl.fcntl(file.handle, fcntl.F_GETFL) & ~os.O_DIRECT)
        file.direct = False
        return 0


def _close(file: _File) -> None:
    if file.handle >= 0:
        os.close(file.handle)
        file.handle = -1
