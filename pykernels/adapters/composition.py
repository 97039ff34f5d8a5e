"""Module after module of several adapters made into one, in memory, with the error of each.

Traffic: every factor is read once; the methods of sums never form a dense matrix, the others one per module
and adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
import xxhash

from pykernels.adapters.keys import BIAS, MAGNITUDE, A, B
from pykernels.adapters.members import Member, Target, depth
from pykernels.adapters.pairs import refuse
from pykernels.adapters.write import Made
from pykernels.engine.files import TensorInfo, shown
from pykernels.engine.mapped import Inputs
from pykernels.ops.compose_lora import DENSE, compose_lora, merged_delta
from pykernels.ops.lora import LoRA
from pykernels.ops.low_rank_svd import Reflections


class Composition:
    """Composes target by target into ``made``; ``errors`` of each."""

    def __init__(
        self,
        targets: Sequence[Target],
        inputs: Inputs,
        weights: Sequence[float],
        how: tuple[str, int | None, float | None, int],
    ) -> None:
        self.made = Made()
        self.errors: dict[str, float] = {}
        self._targets = targets
        self._inputs = inputs
        self._weights = weights
        self._how = how
        self._biased = any(BIAS in m.tensors for t in targets for m in t.members)

    def take(self, target: Target) -> None:
        """One module or stacked parameter."""
        first = target.members[0]
        loras = [self._loras(member) for member in target.members]
        weights = [self._weights[member.number] for member in target.members]
        found: list[LoRA] = []
        off = norm = 0.0
        for expert, ours in enumerate(zip(*loras, strict=True)):
            name = f"{target.name}.{expert}" if target.parameter else target.name
            try:
                composed, wrong, whole = _compose(list(ours), weights, (*self._how[:3], self._seed(name)))
            except ValueError as error:
                raise ValueError(f"{shown(name)}: {error}") from error
            found.append(composed)
            off, norm = off + wrong**2, norm + whole**2
        self.errors[target.name] = sqrt(off / norm) if norm else sqrt(off)
        if target.parameter:
            A_, B_ = torch.stack([x.A for x in found]), torch.stack([x.B for x in found], -1)
            self.made.add_parameter(target.module, target.parameter, A_, B_, depth(target, self._targets))
            return
        [composed] = found
        shapes, r = [first.tensors[part].shape for part in (A, B)], len(composed.A)
        self.made.add(
            target.module,
            composed.A.reshape(r, *shapes[0][1:]),
            composed.B.reshape(shapes[1][0], r, *shapes[1][2:]),
            embedding=first.embedding,
        )
        self._beside(target, weights)

    def _beside(self, target: Target, weights: Sequence[float]) -> None:
        """The bias of B, and the magnitude, of a module."""
        first = target.members[0]
        if self._biased and not first.embedding:
            self.made.tensors[f"{target.module}.lora_B.bias"] = self._bias(target, weights)
        if MAGNITUDE in first.tensors:
            info = first.tensors[MAGNITUDE]
            norms = self._read(info).view(info.shape).clone()
            self.made.tensors[f"{target.module}.lora_magnitude_vector"] = norms

    def _bias(self, target: Target, weights: Sequence[float]) -> torch.Tensor:
        """Zeros where no adapter has one: the config's lora_bias is for all modules."""
        method, _, density, _ = self._how
        share = [(m, w) for m, w in zip(target.members, weights, strict=True) if BIAS in m.tensors]
        if not share:
            return torch.zeros(target.members[0].shapes[1], dtype=torch.float32, device="cpu")
        deltas = [m.scaling * self._read(m.tensors[BIAS]).double().view(1, -1) for m, _ in share]
        given = [w for _, w in share]
        if method in DENSE:
            seed = self._seed(f"{target.name}.bias")
            return merged_delta(method, [d.float() for d in deltas], given, density or 0.0, seed).view(-1)
        return (
            sum((w * d for w, d in zip(given, deltas, strict=True)), torch.zeros((), device="cpu"))
            .view(-1)
            .float()
        )

    def _loras(self, member: Member) -> list[LoRA]:
        """The change in float32, [r, in] and [out, r]; one per expert."""
        a, b = (self._read(member.tensors[part]) for part in (A, B))
        if not member.experts:
            return [LoRA(a, b, member.scaling)]
        A_, B_ = a.view(member.experts, member.rank, -1), b.view(len(b), member.rank, member.experts)
        return [LoRA(A_[e], B_[..., e].contiguous(), member.scaling) for e in range(member.experts)]

    def _read(self, info: TensorInfo) -> torch.Tensor:
        tensor = self._inputs.matrix(info).float()
        if not tensor.isfinite().all():
            refuse(info, "holds NaN or infinite elements")
        return tensor

    def _seed(self, name: str) -> int:
        return self._how[3] ^ xxhash.xxh3_64_intdigest(name.encode())


def _compose(
    loras: list[LoRA], weights: list[float], how: tuple[str, int | None, float | None, int]
) -> tuple[LoRA, float, float]:
    """One matrix's adapter, the norm of its error against the delta that it stands for, and that delta's."""
    method, rank, density, seed = how
    if rank is not None:
        rank = min(rank, len(loras[0].B), loras[0].A.shape[1])
    drawn = seed if method.startswith("dare") else None
    composed = compose_lora(loras, weights, method=method, rank=rank, density=density, seed=drawn)
    if method not in DENSE:
        return composed, *_error_of_sum(composed, loras, weights)
    deltas = [lora.B @ (lora.A * lora.scaling) for lora in loras]
    exact = merged_delta(method, deltas, weights, density or 0.0, seed)
    return composed, _norm(composed.B.double() @ composed.A.double() - exact), _norm(exact)


def _error_of_sum(composed: LoRA, loras: list[LoRA], weights: list[float]) -> tuple[float, float]:
    """Without a dense matrix, as an embedding's would be large: QR of the B's keeps norms."""
    A = torch.cat([lora.A.double() * (lora.scaling * w) for lora, w in zip(loras, weights, strict=True)])
    B = torch.cat([lora.B.double() for lora in loras], 1)
    got = composed.A.double() * composed.scaling
    if torch.equal(composed.B.double(), B):
        left, apart = Reflections(B).r, A - got
    else:
        left, apart = Reflections(torch.cat([B, composed.B.double()], 1)).r, torch.cat([A, -got])
    return _norm(left @ apart), _norm(left[:, : B.shape[1]] @ A)


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
