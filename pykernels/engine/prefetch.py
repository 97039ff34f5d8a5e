"""Reading ahead for files that are not in the page cache; files that are cost one probe per tensor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from threading import Condition, Thread

from pykernels.engine.units import Output, Source

WINDOW = 512 << 20
"""Bytes of input that may be on their way ahead of the computation."""
STEP = 4 << 20


class Prefetcher:
    """Asks the system for the sources of coming outputs, at most ``WINDOW`` bytes ahead of ``advance``."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = outputs
        self._used = 0
        self._stopped = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="pykernels-prefetch", daemon=True)
        self._thread.start()

    def advance(self, output: Output) -> None:
        """``output`` was computed."""
        with self._changed:
            self._used += sum(source.nbytes for source in output.sources)
            self._changed.notify()

    def stop(self) -> None:
        """No more is needed."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        asked = 0
        with contextlib.suppress(OSError):  # reading itself will say what is wrong
            for output in self._outputs:
                size = sum(source.nbytes for source in output.sources)
                with self._changed:
                    while not self._stopped and asked > self._used and asked + size > self._used + WINDOW:
                        self._changed.wait()
                    if self._stopped:
                        return
                asked += size
                _ask([source for source in output.sources if source.nbytes and not _cached(source)])


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
    """Have the sources read, a few megabytes of each in turn, as the kernels will want them."""
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
