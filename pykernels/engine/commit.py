"""The hidden folder that a merge works in, and the order in which its files get their final names.

OUT/.pykernels-<id>/ holds everything until it is complete; a merge's <id> is a hash of the plan, so a later
run of the same plan finds it. Its ``journal.jsonl`` is reserved for resuming: one line per finished shard.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pykernels.engine.companions import INDEX
from pykernels.engine.files import shown
from pykernels.engine.leftovers import replaced
from pykernels.engine.preflight import HIDDEN, OutputError
from pykernels.engine.units import Plan


@contextlib.contextmanager
def workplace(out: Path, mark: str) -> Iterator[Path]:
    """A fresh hidden folder in OUT, named by ``mark``, gone again at the end, as OUT is if new and empty.

    Raises OutputError while another run writes into OUT.
    """
    made = not out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        for leftover in out.glob(f"{HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = out / f"{HIDDEN}{mark}"
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if made:
                with contextlib.suppress(OSError):  # not empty: the run succeeded
                    out.rmdir()


def plan_id(plan: Plan) -> str:
    """Equal for two runs that write the same bytes from the same files."""
    files = [sorted((path, vars(identity)) for path, identity in m.identities.items()) for m in plan.models]
    shards = [vars(shard) for shard in plan.shards]
    text = json.dumps([plan.recipe, plan.seed, files, shards], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{shown(out, 300)}: another run is writing into it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def publish(plan: Plan, folder: Path, out: Path, names: Sequence[str], *, durable: bool) -> None:
    """Move ``names`` and the shards from ``folder`` to OUT; what makes them loadable comes last.

    OUT's old checkpoint goes first, its index before its weights: files of two merges never make a model
    together. Files that belong to no checkpoint stay.
    """
    new = {shard.name for shard in plan.shards}
    for old in replaced(out, names):
        with contextlib.suppress(FileNotFoundError):
            old.unlink()
    if durable:
        for name in names:
            sync(folder / name)
        sync(out)
    ordered = [
        *(name for name in names if name != INDEX),
        *sorted(new),
        *(name for name in names if name == INDEX),
    ]
    for name in ordered:
        (folder / name).replace(out / name)
    if durable:
        sync(out)
        sync(out.absolute().parent)


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, are on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)
