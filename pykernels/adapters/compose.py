"""Several PEFT adapters made into one that PEFT loads, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

import torch
import xxhash

from pykernels.adapters.checkpoint import Adapter, open_adapter
from pykernels.adapters.keys import A, B, Parts
from pykernels.adapters.write import Made, check_out, write_adapter
from pykernels.engine.files import FileError, TensorInfo, shown
from pykernels.engine.mapped import Inputs
from pykernels.ops.compose_lora import DENSE, compose_lora, merged_delta
from pykernels.ops.lora import LoRA
from pykernels.ops.low_rank_svd import Reflections


@dataclass(frozen=True)
class Composed:
    """What a composition wrote. ``errors``: ||result - exact|| / ||exact|| (Frobenius) of every module.

    ``exact`` is what the method makes of the dense deltas; with "cat" only roundings part them.
    """

    out: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    nbytes: int


def compose(
    adapters: Sequence[str],
    out: str | Path,
    *,
    method: str = "cat",
    weights: Sequence[float] = (),
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    allow_download: bool = False,
) -> Composed:
    """Make PEFT adapters into one and write it into the directory ``out``, which must be new or empty.

    Args:
        adapters: directories or hub ids. A module that some lack is composed of those that have it.
        method: of :func:`pykernels.compose_lora`; ``rank`` and ``density`` too.
        weights: one per adapter, or none for 1 each.
        seed: of the masks of dare methods, together with the module's name.

    Raises:
        ValueError: FileError for an adapter that is more than low-rank changes (DoRA, biases, trained copies,
            tokens, target_parameters), or that does not fit the others; and what compose_lora refuses.
    """
    if weights and len(weights) != len(adapters):
        raise ValueError(f"weight: give one per adapter, {len(adapters)}, or none; got {len(weights)}")
    opened = [open_adapter(name, allow_download=allow_download) for name in adapters]
    check_out(Path(out), [a.path for a in opened])
    given = list(weights) or [1.0] * len(opened)
    inputs = Inputs({a.file: a.identity for a in opened})
    made, errors = Made(), {}
    try:
        copies = _copies(opened, inputs)
        for module, members in _modules(opened).items():
            composed, errors[module] = _compose(
                [_lora(opened[i], parts, inputs) for i, parts in members],
                [given[i] for i, _ in members],
                (method, rank, density, seed ^ xxhash.xxh3_64_intdigest(module.encode())),
            )
            first = members[0][1]
            shapes = [first.tensors[part].shape for part in (A, B)]
            r = len(composed.A)
            made.add(
                module,
                composed.A.reshape(r, *shapes[0][1:]),
                composed.B.reshape(shapes[1][0], r, *shapes[1][2:]),
                embedding=first.embedding,
            )
        made.tensors.update(copies)
        keys = {key: _agreed(opened, key) for key in ("base_model_name_or_path", "task_type")}
        flag = any(a.config.fan_in_fan_out for a in opened)
        nbytes = write_adapter(Path(out), made, made.config(fan_in_fan_out=flag, **keys), inputs)
    finally:
        inputs.close()
    return Composed(Path(out), dict(made.ranks), errors, nbytes)


def _compose(
    loras: list[LoRA], weights: list[float], how: tuple[str, int | None, float | None, int]
) -> tuple[LoRA, float]:
    """One module's adapter, and its error against the delta that it stands for."""
    method, rank, density, seed = how
    if rank is not None:
        rank = min(rank, len(loras[0].B), loras[0].A.shape[1])
    drawn = seed if method.startswith("dare") else None
    composed = compose_lora(loras, weights, method=method, rank=rank, density=density, seed=drawn)
    if method not in DENSE:
        return composed, _error_of_sum(composed, loras, weights)
    deltas = [lora.B @ (lora.A * lora.scaling) for lora in loras]
    return composed, _error(composed, merged_delta(method, deltas, weights, density or 0.0, seed))


def _error(composed: LoRA, exact: torch.Tensor) -> float:
    off = composed.scaling * (composed.B.double() @ composed.A.double()) - exact
    return _relative(off, exact)


def _error_of_sum(composed: LoRA, loras: list[LoRA], weights: list[float]) -> float:
    """Without a dense matrix, as an embedding's would be large: QR of all factors keeps norms."""
    A = torch.cat([lora.A.double() * (lora.scaling * w) for lora, w in zip(loras, weights, strict=True)])
    B = torch.cat([lora.B.double() for lora in loras], 1)
    less = torch.cat([A, composed.A.double() * -composed.scaling])
    return _relative(_core(less, torch.cat([B, composed.B.double()], 1)), _core(A, B))


def _core(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A small matrix of the norm of B @ A."""
    return Reflections(B).r @ Reflections(A.t()).r.t()


def _relative(off: torch.Tensor, exact: torch.Tensor) -> float:
    norm, wrong = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (exact, off))
    return wrong / norm if norm else wrong


def _modules(adapters: Sequence[Adapter]) -> Mapping[str, list[tuple[int, Parts]]]:
    """Modules in the first adapter's order, with the adapters that change them. Raises FileError."""
    found: dict[str, list[tuple[int, Parts]]] = {}
    for i, adapter in enumerate(adapters):
        if adapter.config.target_parameters:
            _refuse(adapter, next(iter(adapter.tensors.values())), "target_parameters are not composed")
        for parts in adapter.keys.modules:
            if extra := next((info for part, info in parts.tensors.items() if part not in (A, B)), None):
                _refuse(adapter, extra, "only low-rank changes are composed, no magnitudes, biases or tokens")
            if parts.tensors.keys() != {A, B}:
                _refuse(adapter, next(iter(parts.tensors.values())), "has no other factor beside it")
            others = found.setdefault(parts.module, [])
            if others:
                _check_alike(adapter, parts, adapters[others[0][0]], others[0][1])
            others.append((i, parts))
    return found


def _check_alike(adapter: Adapter, parts: Parts, first: Adapter, other: Parts) -> None:
    for part, axis in ((A, slice(1, None)), (B, slice(0, 1))):
        mine, its = parts.tensors[part], other.tensors[part]
        if mine.shape[axis] != its.shape[axis] or parts.embedding != other.embedding:
            _refuse(
                adapter, mine, f"{list(mine.shape)} does not fit {list(its.shape)} of {shown(first.name)}"
            )


def _copies(adapters: Sequence[Adapter], inputs: Inputs) -> dict[str, torch.Tensor]:
    """Copies of base layers, which PEFT saves beside changed embeddings: kept where all are the same."""
    kept: dict[str, tuple[TensorInfo, torch.Tensor]] = {}
    for adapter in adapters:
        changed = {parts.module for parts in adapter.keys.modules}
        for name, info in adapter.keys.copies.items():
            if ".base_layer." not in info.name or name.rpartition(".")[0] not in changed:
                _refuse(adapter, info, "a trained full copy, and copies are not composed")
            tensor = inputs.matrix(info).view(info.shape)
            before = kept.setdefault(name, (info, tensor))
            if before[1].dtype != tensor.dtype or not torch.equal(before[1], tensor):
                _refuse(adapter, info, f"differs from the copy of the base in {shown(before[0].file)}")
    return {name.replace(".weight", ".base_layer.weight"): tensor for name, (_, tensor) in kept.items()}


def _lora(adapter: Adapter, parts: Parts, inputs: Inputs) -> LoRA:
    """The change of one module in float32, [r, in] and [out, r]."""
    a, b = parts.tensors[A], parts.tensors[B]
    rank = adapter.config.rank(parts.module)
    if a.shape[0] != rank or prod(b.shape[1:]) != rank:
        _refuse(adapter, a, f"A {list(a.shape)} and B {list(b.shape)} must have rank {rank} of the config")
    factors = [_finite(adapter, info, inputs.matrix(info).float()) for info in (a, b)]
    return LoRA(factors[0], factors[1], adapter.config.scaling(parts.module, rank))


def _finite(adapter: Adapter, info: TensorInfo, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.isfinite().all():
        _refuse(adapter, info, "holds NaN or infinite elements")
    return tensor


def _agreed(adapters: Sequence[Adapter], key: str) -> str | None:
    """What all configs say, or nothing."""
    said = {adapter.config.said.get(key) for adapter in adapters}
    return said.pop() if len(said) == 1 else None


def _refuse(adapter: Adapter, info: TensorInfo, why: str) -> NoReturn:
    raise FileError(f"{shown(adapter.file, 300)}: tensor {shown(info.name)}: {why}")
