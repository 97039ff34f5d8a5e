"""A recipe to a merged checkpoint: plan, check, compute and write behind, then publish.

Bytes: every input once (statistics of tensors beyond the memory budget read again), every output once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pykernels.backends import beside_files
from pykernels.engine.collector import frozen
from pykernels.engine.commit import plan_id, publish, workplace
from pykernels.engine.companions import CARD, INDEX, index_text, write_companions
from pykernels.engine.leftovers import foreign_weights
from pykernels.engine.mapped import Inputs
from pykernels.engine.plan import make_plan
from pykernels.engine.prefetch import Prefetcher
from pykernels.engine.preflight import check_equal, check_place, check_unchanged
from pykernels.engine.recipe import Recipe, read_recipe
from pykernels.engine.record import RECORD, file_digest, record_text
from pykernels.engine.sizes import parse_size
from pykernels.engine.state_dicts import merge_state_dicts
from pykernels.engine.station import Busy
from pykernels.engine.target import DeviceUse, Engine, Target, busy
from pykernels.engine.units import Plan
from pykernels.engine.writer import ShardWriter

__all__ = ["Progress", "Report", "merge", "merge_state_dicts", "parse_size"]

SHARE_OF_FACTORS = 8
"""Of the memory, an eighth may hold adapters' factors; chunks and the ring take less than the rest."""
TICK = 0.05
"""Seconds between two calls of a progress callback."""


@dataclass(frozen=True)
class Progress:
    """Bytes read and written so far, of how many, and the tensor at hand."""

    done: int
    total: int
    tensor: str


@dataclass(frozen=True)
class Report:
    """What a merge did, or with ``dry_run`` would do.

    ``seconds``: from first header to last rename. ``read`` and ``written``: bytes. ``nonfinite``:
    how many elements are NaN or infinite, for every output tensor that has some. ``warnings``: what a user
    should be told. ``devices``: what a merge on devices took of each; ``busy``: how long its parts worked.
    """

    out: Path
    plan: Plan
    dry_run: bool
    seconds: float
    read: int
    written: int
    nonfinite: dict[str, int]
    warnings: tuple[str, ...]
    devices: tuple[DeviceUse, ...] = ()
    busy: Busy | None = None

    @property
    def tensors(self) -> int:
        """Number of output tensors."""
        return len(self.plan.outputs)

    @property
    def shards(self) -> int:
        """Number of output files."""
        return len(self.plan.shards)

    @property
    def gb_per_second(self) -> float:
        """Bytes read and written, in 10^9 per second."""
        return (self.read + self.written) / self.seconds / 1e9


@frozen()
def merge(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    threads: int | None = None,
    memory: str | int = "2GB",
    device: str = "cpu",
    device_memory: str | int | None = None,
    shard_size: str | int = "5GB",
    seed: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    durable: bool = False,
    allow_download: bool = False,
    progress: Callable[[Progress], None] | None = None,
    planned: Callable[[Plan, Sequence[str]], None] | None = None,
) -> Report:
    """Merge the models of a recipe into the directory ``out``.

    Args:
        recipe: a path, YAML text, a mapping or a Recipe.
        out: a new or empty directory; nothing in it is loadable before the merge is complete.
        threads: of the kernels; default ``torch.get_num_threads()``.
        memory: bound on anonymous memory beside what Python and torch take ("2GB", or bytes); pinned buffers
            of devices are part of it.
        device: "cpu", "cuda", or one or more such as "cuda:0,cuda:1". Tensors are dealt to devices by bytes;
            the CPU merges float64 and copies what is not merged, and merges adapters where norms of columns
            or PEFT's roundings are wanted, or without our CUDA kernels (a warning says how many tensors).
            Files have the bytes that the CPU writes, unless no kernels but the references serve there (a
            warning says so).
        device_memory: bound on the memory taken of every device, as ``memory``; default half of what is free.
        shard_size: bytes of tensors per output file, as ``memory``.
        seed: for methods that drop at random; default the recipe's.
        dry_run: plan and check everything, write nothing.
        overwrite: replace the checkpoint that ``out`` holds: weights, index, tokenizer and the like. Weights
            of another kind (an adapter, pytorch_model.bin) stay and are named in a warning.
        durable: return only when everything is on the disk.
        allow_download: let hub ids be downloaded.
        progress: called now and then, and at the end, on this thread.
        planned: called once with the plan and what a user should be told, before the merge starts.

    Result bits depend on recipe, seed and inputs alone.

    Raises:
        ValueError: RecipeError, PlanError, FileError or OutputError, before anything is written.
        OSError: reading or writing failed; nothing has a final name then.
    """
    start = time.perf_counter()
    out = Path(out)
    budget_bytes, shard_bytes = parse_size(memory, "memory"), parse_size(shard_size, "shard_size")
    target = Target(device, device_memory)
    plan = make_plan(read_recipe(recipe), shard_size=shard_bytes, seed=seed, allow_download=allow_download)
    check_place(plan, out, overwrite=overwrite)
    budget, backend = target.budget(plan, budget_bytes), target.backend(plan)
    meter = _Meter(plan, progress)
    inputs = Inputs({path: i for model in plan.models for path, i in model.identities.items()})
    inputs.adapted.factors.room = budget_bytes // SHARE_OF_FACTORS
    try:
        check_equal(plan, inputs)
        warnings = (*plan.notes, *target.notes(plan))
        if other := foreign_weights(out):
            warnings = (*warnings, other)
        if planned is not None:
            planned(plan, warnings)
        writer: ShardWriter | None = None
        engine: Engine | None = None
        if not dry_run:
            with _threads(threads), beside_files():
                engine = target.engine(plan, inputs, budget, meter.add)
                with closing(engine):
                    writer = _write(plan, out, inputs, engine, backend, durable)
    finally:
        inputs.close()
    meter.finish()
    written = writer.written if writer else {}
    nonfinite = {plan.outputs[n].name: w.nonfinite for n, w in sorted(written.items()) if w.nonfinite}
    told = (*warnings, _nonfinite_text(nonfinite)) if nonfinite else warnings
    seconds = time.perf_counter() - start
    return Report(
        out, plan, dry_run, seconds, plan.total_read, plan.total_write, nonfinite, told,
        target.used(plan, engine), busy(engine, writer.busy if writer else 0.0),
    )  # fmt: skip


def _write(
    plan: Plan, out: Path, inputs: Inputs, compute: Engine, backend: str, durable: bool
) -> ShardWriter:
    with workplace(out, plan_id(plan)) as folder:
        names = write_companions(plan, folder)
        compute.survey()
        writer = ShardWriter(compute.arena(), durable=durable)
        prefetcher = Prefetcher(compute.reads(), inputs)
        try:
            shard = -1
            for number, output in enumerate(plan.outputs):
                if output.shard != shard:
                    shard = _next_shard(plan, shard, writer, folder)
                compute.run(number, output, writer)
                prefetcher.advance(output)
            while shard < len(plan.shards):
                shard = _next_shard(plan, shard, writer, folder)
            writer.close()
        except BaseException:
            writer.abort()
            raise
        finally:
            prefetcher.stop()
        check_unchanged(plan)
        if len(plan.shards) > 1:
            (folder / INDEX).write_text(index_text(plan), encoding="utf-8")
            names.append(INDEX)
        # A model card is there to be edited, so it is not held against its checksum later.
        companions = {name: file_digest(folder / name) for name in names if name != CARD}
        text = record_text(plan, writer.written, companions, backend)
        (folder / RECORD).write_text(text, encoding="utf-8")
        names.append(RECORD)
        publish(plan, folder, out, names, durable=durable)
        return writer


def _next_shard(plan: Plan, shard: int, writer: ShardWriter, folder: Path) -> int:
    """End the file at hand and begin the next, if there is one; its number."""
    if shard >= 0:
        writer.end()
    shard += 1
    if shard < len(plan.shards):
        writer.begin(folder / plan.shards[shard].name, plan.shards[shard].nbytes, plan.header(shard))
    return shard


class _Meter:
    """Sums up bytes and calls back at most every ``TICK`` seconds."""

    def __init__(self, plan: Plan, progress: Callable[[Progress], None] | None) -> None:
        self._total = sum(out.nbytes + sum(s.nbytes for s in out.sources) for out in plan.outputs)
        self._progress = progress
        self._done = 0
        self._called = 0.0

    def add(self, nbytes: int, tensor: str) -> None:
        """``nbytes`` more were moved for ``tensor``."""
        self._done += nbytes
        if self._progress is not None and (now := time.monotonic()) - self._called > TICK:
            self._called = now
            self._progress(Progress(self._done, self._total, tensor))

    def finish(self) -> None:
        """The last call."""
        if self._progress is not None:
            self._progress(Progress(self._done, self._total, ""))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nonfinite_text(nonfinite: Mapping[str, int]) -> str:
    named = ", ".join(f"{name} ({count})" for name, count in list(nonfinite.items())[:5])
    more = f" and {len(nonfinite) - 5} more tensors" if len(nonfinite) > 5 else ""
    return f"NaN or infinite elements in the output: {named}{more}"
