"""A thread that reads ahead of the computation and lets go of what lies behind it.

A file in the page cache costs one probe per tensor. Pages behind are unmapped here: that takes a tenth of the
time of a merge, and nobody needs to wait for it.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Sequence
from threading import Condition, Thread
from typing import Protocol

from pykernels.engine.mapped import Inputs
from pykernels.engine.units import Source

WINDOW = 512 << 20
"""Bytes of input that may be on their way ahead of the computation."""
STEP = 4 << 20
NEWS = 16 << 20
"""Bytes of input behind which the thread is woken: once per small tensor would slow the computation down."""


class Reads(Protocol):
    """What is read at one time: an output's inputs, or what goes to a device together."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The bytes of files that are read."""


class Prefetcher:
    """Asks the system for the sources of what comes, at most ``WINDOW`` bytes ahead of ``advance``."""

    def __init__(self, coming: Sequence[Reads], inputs: Inputs) -> None:
        self._coming = coming
        self._inputs = inputs
        self._used = self._fresh = 0
        self._behind: deque[Reads] = deque()
        self._stopped = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="pykernels-prefetch", daemon=True)
        self._thread.start()

    def advance(self, reads: Reads) -> None:
        """``reads`` is not needed again soon."""
        self._behind.append(reads)
        self._fresh += _size(reads)
        if self._fresh >= NEWS:
            with self._changed:
                self._used, self._fresh = self._used + self._fresh, 0
                self._changed.notify()

    def stop(self) -> None:
        """No more is needed."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        ahead, asked = deque(self._coming), 0
        with contextlib.suppress(OSError):  # reading itself will say what is wrong
            while not self._stopped:
                seen = self._used
                while self._behind:
                    for source in self._behind.popleft().sources:
                        self._inputs.drop(source)
                if ahead and (asked <= seen or asked + _size(ahead[0]) <= seen + WINDOW):
                    asked += _size(ahead[0])
                    _ask(ahead.popleft().sources)
                    continue
                with self._changed:
                    while self._used == seen and not self._stopped:
                        self._changed.wait()


def _size(reads: Reads) -> int:
    return sum(source.nbytes for source in reads.sources)


def _cached(source: Source) -> bool:
    """Whether first, middle and last byte are in the page cache."""
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return False
    handle = os.open(source.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for place in (source.start, (source.start + source.end) // 2, source.end - 1):
            os.preadv(handle, [bytearray(1)], place, nowait)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _ask(sources: Sequence[Source]) -> None:
    """Have what is not in memory read, a few megabytes of each source in turn."""
    sources = [source for source in sources if source.nbytes and not _cached(source)]
    if not sources or not hasattr(os, "posix_fadvise"):
        return
    with contextlib.ExitStack() as stack:
        handles = []
        for source in sources:
            handles.append(os.open(source.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            stack.callback(os.close, handles[-1])
        for at in range(0, max(source.nbytes for source in sources), STEP):
            for source, handle in zip(sources, handles, strict=True):
                count = min(STEP, source.nbytes - at)
                if count > 0:
                    os.posix_fadvise(handle, source.start + at, count, os.POSIX_FADV_WILLNEED)
