"""One safetensors file on disk: opened safely, its header read, its identity taken."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pykernels.engine.collector import no_collection
from pykernels.engine.header import parse_header, read_length
from pykernels.engine.strict_json import FileError, shown


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes ``start`` to ``end`` of ``file``; ``dtype`` is the format's ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


@dataclass(frozen=True)
class FileIdentity:
    """What tells a file from a changed one without reading its data."""

    size: int
    mtime_ns: int
    header_sha256: str


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A read-only descriptor of a regular file; never blocks on a FIFO. Raises FileError for all else."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileError(f"{shown(path)}: {_reason(path, error)}") from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
            raise FileError(
                f"{shown(path)}: not a regular file but {kinds.get(stat.S_IFMT(mode), 'a device')}"
            )
        yield handle
    finally:
        os.close(handle)


def _reason(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "not a regular file but a symbolic link that leads back to itself"
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"not a regular file but a dangling link to {shown(path.readlink())}"
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return "not a regular file but a socket or a device"
    return f"cannot be opened: {error.strerror}"


def read_shard(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], FileIdentity]:
    """Tensors (in header order), metadata and identity of one safetensors file. Raises FileError."""
    name = shown(path, 300)
    with open_regular(path) as handle:
        status = os.fstat(handle)
        head = os.pread(handle, 512, 0)
        length = read_length(name, head, status.st_size)
        raw = read_exactly(name, handle, 8, length)
    data, file = 8 + length, str(path)
    with no_collection():
        entries, metadata = parse_header(name, raw, status.st_size - data)
        tensors = {
            tensor: TensorInfo(tensor, entry.dtype, entry.shape, file, data + entry.start, data + entry.end)
            for tensor, entry in entries.items()
        }
    digest = hashlib.sha256(head[:8] + raw).hexdigest()
    return tensors, metadata, FileIdentity(status.st_size, status.st_mtime_ns, digest)


def read_exactly(name: str, handle: int, start: int, count: int) -> bytes:
    """``count`` bytes from ``start`` on. Raises FileError, which names the file, where it ends before."""
    parts, position = [], start
    while position < start + count:
        part = os.pread(handle, start + count - position, position)
        if not part:
            raise FileError(f"{name}: the file ended at byte {position} while its header was read")
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def inside(model: Path, file: Path) -> bool:
    """Whether ``file``'s real path is in the model directory or in the blobs of its Hugging Face cache."""
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(model))
    if real.is_relative_to(home):
        return True
    snapshots = next((p for p in home.parents if p.name == "snapshots"), None)
    return snapshots is not None and real.is_relative_to(snapshots.parent / "blobs")
