"""A merged checkpoint read back: headers, cover, checksums and finite values, and samples computed again.

Bytes: the output once; the inputs of the samples once or twice.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from pykernels.engine.files import TORCH_DTYPE, FileError, open_checkpoint, open_regular, shown
from pykernels.engine.leftovers import WEIGHTS
from pykernels.engine.nonfinite import count_nonfinite
from pykernels.engine.recompute import recompute
from pykernels.engine.record import Record, file_digest, read_record
from pykernels.engine.units import Output
from pykernels.engine.writer import Written

SLICE = 1 << 20
SAMPLES = 8


@dataclass(frozen=True)
class VerifyReport:
    """What a check of a merge found. ``failures``: every fault, naming shard and tensor.

    ``nonfinite``: elements that are NaN or infinite, for every tensor that has some. ``recomputed``: the
    tensors that were merged again; ``notes`` say why fewer than asked for.
    """

    out: Path
    failures: tuple[str, ...]
    tensors: int
    nbytes: int
    nonfinite: dict[str, int]
    recomputed: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """No failure."""
        return not self.failures

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for every tensor with NaN or infinite elements."""
        return tuple(
            f"{count} NaN or infinite elements in {shown(name)}" for name, count in self.nonfinite.items()
        )

    @property
    def summary(self) -> str:
        """What was checked, and the notes: all but findings."""
        state = "verified" if self.ok else f"{len(self.failures)} failures"
        lines = [
            f"{self.out}: {state}: {self.tensors} tensors, {self.nbytes / 1e9:.2f} GB, {self.seconds:.2f} s",
            f"recomputed with the reference: {', '.join(map(shown, self.recomputed)) or 'nothing'}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __str__(self) -> str:
        """Everything, in a few lines for people."""
        return "\n".join([self.summary, *self.warnings, *self.failures])


@dataclass
class _Findings:
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nonfinite: dict[str, int] = field(default_factory=dict)
    readable: set[int] = field(default_factory=set)  # shards of the planned size


def verify(out: str | Path, *, samples: int = SAMPLES) -> VerifyReport:
    """Check a merge that :func:`pykernels.merge` wrote into ``out`` against its record.

    Every byte of the weights is read: headers must be the planned ones, tensors must have their checksums.
    Up to ``samples`` of them are merged again with the reference, if their inputs are still the same files.

    Raises FileError when ``out`` holds no readable record; all other faults are in the report.
    """
    start = time.perf_counter()
    out = Path(out)
    record = read_record(out)
    found = _Findings()
    _check_shards(out, record, found)
    _check_directory(out, record, found)
    _check_companions(out, record, found)
    damaged = _check_tensors(out, record, found)
    intact = [o for o in record.plan.outputs if o.shard in found.readable and o.name not in damaged]
    wrong, notes, recomputed = recompute(out, record.plan, intact, samples)
    outputs = record.plan.outputs
    return VerifyReport(
        out, (*found.failures, *wrong), len(outputs), sum(o.nbytes for o in outputs), found.nonfinite,
        tuple(recomputed), (*found.notes, *notes), time.perf_counter() - start,
    )  # fmt: skip


def _check_shards(out: Path, record: Record, found: _Findings) -> None:
    """Every planned file must have the planned size and begin with the planned header."""
    for number, shard in enumerate(record.plan.shards):
        try:
            with open_regular(out / shard.name) as handle:
                size = os.fstat(handle).st_size
                header = record.plan.header(number)
                if size != shard.nbytes:
                    found.failures.append(f"{shard.name}: {size} bytes, {shard.nbytes} were written")
                    continue
                found.readable.add(number)
                if (read := os.pread(handle, len(header), 0)) != header:
                    at = next(i for i, (a, b) in enumerate(zip(read, header, strict=True)) if a != b)
                    found.failures.append(
                        f"{shard.name}: the header differs from the planned one at byte {at}"
                    )
        except (FileError, OSError) as error:
            found.failures.append(f"{shard.name}: {error}")


def _check_directory(out: Path, record: Record, found: _Findings) -> None:
    """What a loader sees must be exactly the planned tensors."""
    planned = {o.name for o in record.plan.outputs}
    try:
        checkpoint = open_checkpoint(out)
        there = checkpoint.tensors.keys()
        found.failures += [f"{shown(name)}: not in the checkpoint" for name in sorted(planned - there)]
        found.failures += [f"{shown(name)}: not part of this merge" for name in sorted(there - planned)]
        found.notes += checkpoint.warnings
    except FileError as error:
        found.failures.append(str(error))
    shards = {shard.name for shard in record.plan.shards}
    for extra in sorted(p.name for p in out.glob("*.safetensors") if p.name not in shards):
        # Loaders of the model look for model*.safetensors; adapters beside it are another matter.
        told = found.failures if fnmatch.fnmatch(extra, WEIGHTS) else found.notes
        told.append(f"{shown(extra)}: not part of this merge")


def _check_companions(out: Path, record: Record, found: _Findings) -> None:
    """The small files must be as they were written."""
    for name, digest in record.companions.items():
        try:
            if file_digest(out / Path(name).name) != digest:
                found.failures.append(f"{shown(name)}: was changed since the merge")
        except FileError as error:
            found.failures.append(str(error))


def _check_tensors(out: Path, record: Record, found: _Findings) -> set[str]:
    """Read every tensor; returns those whose bytes are not what was written."""
    readable = [o for o in record.plan.outputs if o.shard in found.readable]
    shards = record.plan.shards
    damaged = set()
    with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
        seen = pool.map(lambda o: _read(out / shards[o.shard].name, o), readable)
        for output, now in zip(readable, seen, strict=True):
            then = record.tensors.get(output.name)
            if now.nonfinite:
                found.nonfinite[output.name] = now.nonfinite
            if then is not None and now.xxh3_128 == then.xxh3_128:
                if now.nonfinite != then.nonfinite:
                    found.failures.append(
                        f"{shards[output.shard].name}: tensor {shown(output.name)}: {now.nonfinite} NaN or "
                        f"infinite elements, the record says {then.nonfinite}"
                    )
            else:
                damaged.add(output.name)
                told = then.xxh3_128 if then else "none"
                found.failures.append(
                    f"{shards[output.shard].name}: tensor {shown(output.name)} "
                    f"(bytes {output.start} to {output.end}): checksum {now.xxh3_128}, the record says {told}"
                )
    return damaged


def _read(path: Path, output: Output) -> Written:
    digest, nonfinite = xxhash.xxh3_128(), 0
    dtype = TORCH_DTYPE.get(output.dtype, torch.uint8)
    with open_regular(path) as handle:
        for part in _parts(handle, output.start, output.end):
            digest.update(part)
            if dtype.is_floating_point and output.action != "copy":
                nonfinite += count_nonfinite(torch.frombuffer(part, dtype=dtype))
    return Written(digest.hexdigest(), nonfinite)


def _parts(handle: int, start: int, end: int) -> Iterator[memoryview]:
    buffer = bytearray(min(SLICE, end - start))
    position = start
    while position < end:
        part = memoryview(buffer)[: min(SLICE, end - position)]
        filled = 0
        while filled < len(part):
            count = os.preadv(handle, [part[filled:]], position + filled)
            if count == 0:
                raise FileError(f"the file ended at byte {position + filled} while it was read")
            filled += count
        yield part
        position += len(part)
