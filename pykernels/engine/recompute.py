"""Some outputs merged again with the reference and compared with the written ones, within a derived bound."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from pykernels.backends import use_backend
from pykernels.engine.compute import MIN_MEMORY, Budget, Compute
from pykernels.engine.files import TORCH_DTYPE, FileError, shown
from pykernels.engine.mapped import Inputs, MappedFile
from pykernels.engine.passes import chunks
from pykernels.engine.recompute_adapted import slack as adapted_slack
from pykernels.engine.units import Adapted, Output, Plan, Source

ELEMENTS = 1 << 23
"""Elements that all samples have together, at the most: seconds of the reference."""
SURVEYED = 1 << 30
"""Elements of all models up to which a model-wide threshold is found by the reference: minutes."""
STEP = 1 << 20
MEMORY = 1 << 30
UNIT = 2.0**-24
"""Largest relative error of one float32 operation."""


class _Memory:
    """A sink that keeps the pieces of one output."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def reserve(
        self, nbytes: int, dtype: torch.dtype, tensor: int | None, *, last: bool = False
    ) -> torch.Tensor:
        """Fresh memory."""
        self.pieces.append(torch.empty(nbytes // dtype.itemsize, dtype=dtype, device="cpu"))
        return self.pieces[-1]


def recompute(
    out: Path, plan: Plan, outputs: Sequence[Output], count: int
) -> tuple[list[str], list[str], list[str]]:
    """Merge up to ``count`` of ``outputs`` again: failures, notes and the names of those compared.

    Model-wide thresholds of more than ``SURVEYED`` elements come from the kernels; a note says so.
    """
    failures: list[str] = []
    notes: list[str] = []
    names: list[str] = []
    identities = {path: i for model in plan.models for path, i in model.identities.items()}
    inputs = Inputs(identities)
    with use_backend("ref"):
        exact = Inputs(identities)  # whose adapters the reference merges
    budget = Budget.of(plan, max(MEMORY, MIN_MEMORY))
    compute = Compute(plan, inputs, budget, lambda nbytes, name: None)
    adapting = Compute(plan, exact, budget, lambda nbytes, name: None)
    chosen = _choose(outputs, count)
    try:
        if chosen and plan.scope == "model":
            notes += _survey(plan, compute)
        for output in chosen:
            with use_backend("ref"):
                memory = _Memory()
                (adapting if output.action == "adapt" else compute).run(0, output, memory)
            shard = plan.shards[output.shard].name
            written = MappedFile(str(out / shard)).tensor(output.start, output.end, TORCH_DTYPE[output.dtype])
            wrong = _count_wrong(plan.method, output, inputs, written, torch.cat(memory.pieces))
            wrong += _count_inputs(output, inputs, exact) if output.action == "merge" else 0
            if wrong:
                failures.append(
                    f"{shard}: tensor {shown(output.name)}: {wrong} of {output.numel} elements are not "
                    "what the reference computes"
                )
            names.append(output.name)
    except (FileError, OSError) as error:
        notes.append(f"not recomputed, the inputs are not at hand: {error}")
    finally:
        inputs.close()
        exact.close()
    return failures, notes, names


def _survey(plan: Plan, compute: Compute) -> list[str]:
    """The model-wide thresholds, by the reference where that takes minutes at the most; else a note."""
    seen = sum(o.numel * len(o.tuned) for o in plan.segment())
    if seen <= SURVEYED:
        with use_backend("ref"):
            compute.survey()
        return []
    compute.survey()
    return [f"scope model: the kernels, not the reference, found the thresholds of {seen} elements"]


def _choose(outputs: Sequence[Output], count: int) -> list[Output]:
    """A fixed random choice of merged outputs; the smallest alone when all are too large."""
    merged = [o for o in outputs if o.action != "copy" and o.numel]
    random.Random(len(merged)).shuffle(merged)
    chosen: list[Output] = []
    for output in merged:
        if len(chosen) < count and sum(o.numel for o in chosen) + output.numel <= ELEMENTS:
            chosen.append(output)
    return chosen or sorted(merged, key=lambda o: o.numel)[: min(1, count)]


def _count_wrong(
    method: str, output: Output, inputs: Inputs, written: torch.Tensor, reference: torch.Tensor
) -> int:
    """How many elements are further from the reference than rounding explains."""
    wrong = 0
    if output.action == "adapt":
        for first, count in chunks(output.numel, STEP):
            source, piece = output.sources[0], slice(first, first + count)
            slack = _room(source, inputs, first, count)
            if source.dtype != output.dtype:  # rounded to the source's type before
                slack = slack + torch.finfo(TORCH_DTYPE[source.dtype]).eps * reference[piece].double().abs()
            wrong += _differ(written[piece], reference[piece], slack)
        return wrong
    factors = _factors(method, output)
    for first, count in chunks(output.numel, STEP):
        read = [inputs.elements(source, first, count).double() for source in output.sources]
        slack = _slack(read, factors, has_base=output.base is not None)
        wrong += _differ(written[first : first + count], reference[first : first + count], slack)
    return wrong


def _count_inputs(output: Output, inputs: Inputs, exact: Inputs) -> int:
    """How many elements of adapted inputs the kernels and the reference do not agree on.

    The method itself is checked on the kernels' inputs: a threshold or a vote turns on their last bit.
    """
    wrong = 0
    for source in output.sources:
        if isinstance(source, Adapted):
            for first, count in chunks(output.numel, STEP):
                room = _room(source, inputs, first, count)
                wrong += _differ(
                    inputs.elements(source, first, count), exact.elements(source, first, count), room
                )
    return wrong


def _room(source: Source, inputs: Inputs, first: int, count: int) -> torch.Tensor:
    if isinstance(source, Adapted):
        return adapted_slack(inputs.adapted, source, first, count)
    return torch.zeros(count, dtype=torch.float64, device="cpu")


def _differ(written: torch.Tensor, reference: torch.Tensor, slack: torch.Tensor) -> int:
    """How many elements differ by more than one unit in the last place and ``slack``."""
    w, r = written.double(), reference.double()
    info = torch.finfo(written.dtype)
    place = torch.maximum(r.abs(), torch.tensor(info.tiny, dtype=torch.float64, device="cpu")) * info.eps
    near = (w - r).abs() <= place + slack
    return int((~(near | (w == r) | (w.isnan() & r.isnan()))).sum())


def _slack(read: Sequence[torch.Tensor], factors: Sequence[float], *, has_base: bool) -> torch.Tensor:
    """What float32 sums in model order may differ from float64 ones: a few units of the sum of magnitudes.

    Every product and sum of n models adds at most one unit of relative error, so 2 n + 4 units of
    |base| + sum(|factor_i * delta_i|) cover numerator, division, lambda and the last sum.
    """
    base, tuned = (read[0], read[1:]) if has_base else (torch.zeros_like(read[0]), read)
    total = base.abs()
    for factor, tensor in zip(factors, tuned, strict=True):
        if factor:  # a model of weight 0 takes no part, whatever it holds
            total = total + factor * (tensor - base).abs()
    return (2 * len(tuned) + 4) * UNIT * total


def _factors(method: str, output: Output) -> list[float]:
    """Upper bounds of what a delta is multiplied by."""
    p = output.params
    weights = [abs(w) for w in p["weight"]]
    scale = abs(p.get("lambda", 1.0))
    if p["normalize"] is True:
        scale /= _least_divisor(p["weight"], elected=method in ("ties", "dare_ties"))
    factors = [w * scale for w in weights]
    if method.startswith("dare") and p["rescale"] is not None:
        # An L1 rescale is near 1 / density; a factor of 4 covers its spread.
        spread = 4.0 if p["rescale"] == "l1" else 1.0
        factors = [f * spread / max(d, UNIT) for f, d in zip(factors, p["density"], strict=True)]
    return factors


def _least_divisor(weights: Sequence[float], *, elected: bool) -> float:
    """The smallest divisor that may occur: the sum of all weights, or with an election of any of them."""
    if not elected:
        return abs(sum(weights)) or 1.0
    if all(w >= 0 for w in weights) or len(weights) > 12:
        return min((abs(w) for w in weights if w), default=1.0)
    groups = itertools.chain.from_iterable(
        itertools.combinations(weights, k + 1) for k in range(len(weights))
    )
    return min((abs(sum(group)) for group in groups if sum(group)), default=1.0)
