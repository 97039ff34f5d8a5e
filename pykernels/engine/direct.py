"""Output files whose bytes go to the disk without passing through the page cache, where that works."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path


def open_output(path: Path, *, direct: bool) -> tuple[int, bool]:
    """Create ``path`` for writing; the descriptor, and whether it takes whole blocks only (O_DIRECT)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            path.unlink(missing_ok=True)  # some systems create the file before they refuse
    return os.open(path, flags, 0o666), False


def allocate(handle: int, nbytes: int) -> None:
    """Reserve the file's blocks where the file system can; the C library's emulation would write zeros."""
    fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
    if fallocate is not None and fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) == -1:
        return  # not supported here; a full disk shows itself again at the first write
