"""What each of several adapters does to which module, before any of it is composed.

Without a base nothing tells a stacked parameter (PEFT's target_parameters) from others but the config and the
order in which modules define them; where that is not enough, the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from pykernels.adapters.checkpoint import Adapter
from pykernels.adapters.experts import DEFINED, parameters_of
from pykernels.adapters.keys import BIAS, MAGNITUDE, TOKENS, A, B, Parts
from pykernels.adapters.pairs import check_pair, refuse
from pykernels.engine.shard import TensorInfo
from pykernels.engine.strict_json import shown


@dataclass(frozen=True)
class Member:
    """One adapter's change: ``scaling`` times B @ A, of ``experts`` matrices where that is not 0."""

    adapter: Adapter
    number: int
    tensors: dict[str, TensorInfo]
    rank: int
    scaling: float
    experts: int
    embedding: bool

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A but for its rank, and of B's outputs."""
        return self.tensors[A].shape[1:], self.tensors[B].shape[:1]


@dataclass
class Target:
    """A module, or with ``parameter`` a stacked parameter of it, and the changes of it."""

    module: str
    parameter: str = ""
    members: list[Member] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its path, by which configs give it a rank."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module


def gather(adapters: Sequence[Adapter]) -> list[Target]:
    """Every changed module, the first adapter's first. Raises FileError naming a tensor that does not fit."""
    found: dict[tuple[str, str], Target] = {}
    for number, adapter in enumerate(adapters):
        for module, levels in _levels(adapter).items():
            for parameter, parts in _named(adapter, module, levels):
                check_pair(parts, adapter.config)
                target = found.setdefault((module, parameter), Target(module, parameter))
                target.members.append(_member(adapter, number, target, parts))
                _check_alike(target)
    _check_nested(list(found.values()))
    return list(found.values())


def depth(target: Target, targets: Sequence[Target]) -> int:
    """How many base_layer its keys lie under: the parameter that its module defines first lies deepest."""
    names = [other.parameter for other in targets if other.module == target.module]
    return sum(DEFINED.index(n) > DEFINED.index(target.parameter) for n in names) if len(names) > 1 else 0


def _levels(adapter: Adapter) -> dict[str, list[Parts]]:
    """Low-rank parts by module, the deepest first."""
    found: dict[str, list[Parts]] = {}
    for parts in adapter.keys.modules:
        if parts.tensors.keys() != {TOKENS}:
            found.setdefault(parts.module, []).append(parts)
    return {module: sorted(levels, key=lambda p: -p.depth) for module, levels in found.items()}


def _named(adapter: Adapter, module: str, levels: Sequence[Parts]) -> list[tuple[str, Parts]]:
    """The levels of a module with the parameters that they are of, "" where it is the module's weight."""
    some = next(iter(levels[0].tensors.values()))
    targets = adapter.config.target_parameters
    if bare := next((name for name in targets if "." not in name), None):
        refuse(some, f"target_parameters name {shown(bare)} without its module, so it may be of any")
    names = parameters_of(module, targets)
    if not names:
        if len(levels) > 1 or levels[0].depth:
            refuse(some, "lies under a base_layer, and target_parameters name no parameter of its module")
        return [("", levels[0])]
    if len(names) != len(levels):
        refuse(some, f"target_parameters name {len(names)} parameters of its module, it has {len(levels)}")
    return list(zip(_ordered(names, some), levels, strict=True))


def _ordered(names: Sequence[str], some: TensorInfo) -> list[str]:
    """As modules define them."""
    if len(names) > 1 and (strange := next((n for n in names if n not in DEFINED), None)):
        refuse(
            some, f"whether its module defines {shown(strange)} before {shown(names[0])} is not known here"
        )
    return sorted(names, key=DEFINED.index) if len(names) > 1 else list(names)


def _member(adapter: Adapter, number: int, target: Target, parts: Parts) -> Member:
    a, b = parts.tensors[A], parts.tensors[B]
    rank = adapter.config.rank(target.name)
    experts = a.shape[0] // rank if target.parameter else 0
    if target.parameter and len(a.shape) + len(b.shape) != 4:
        refuse(a, f"A {list(a.shape)} and B {list(b.shape)} must hold the same ranks of all experts")
    if a.shape[0] != rank * max(1, experts) or prod(b.shape[1:]) != a.shape[0]:
        refuse(a, f"A {list(a.shape)} and B {list(b.shape)} must have rank {rank} of the config")
    scaling = adapter.config.scaling(target.name, rank)
    return Member(adapter, number, parts.tensors, rank, scaling, experts, parts.embedding)


def _check_alike(target: Target) -> None:
    first, last = target.members[0], target.members[-1]
    for part, mine, its in zip((A, B), last.shapes, first.shapes, strict=True):
        if mine != its or (last.embedding, last.experts) != (first.embedding, first.experts):
            wanted, got = first.tensors[part].shape, last.tensors[part].shape
            refuse(
                last.tensors[part], f"{list(got)} does not fit {list(wanted)} of {shown(first.adapter.name)}"
            )
    bias = last.tensors.get(BIAS)
    if bias is not None and bias.shape != last.shapes[1]:
        refuse(bias, f"must have shape {list(last.shapes[1])}, got {list(bias.shape)}")
    norms = last.tensors.get(MAGNITUDE)
    if norms is not None and prod(norms.shape) != prod(last.shapes[1]):
        refuse(norms, f"must hold a magnitude per output, {last.shapes[1][0]}, got {list(norms.shape)}")


def _check_nested(targets: Sequence[Target]) -> None:
    """A module's weight and its parameters cannot have keys beside each other."""
    held: dict[str, list[Target]] = {}
    for target in targets:
        held.setdefault(target.module, []).append(target)
    for members in held.values():
        some = members[-1].members[0].tensors[A]
        if len(members) > 1 and not all(target.parameter for target in members):
            refuse(some, "one adapter changes a module's weight, another a parameter of the module")
        _ordered([target.parameter for target in members], some)


def check_method(targets: Sequence[Target], method: str) -> None:
    """Raise FileError for what the method has no exact meaning for, and what no adapter can hold together."""
    members = [member for target in targets for member in target.members]
    some = {
        part: m.tensors[part] for m in reversed(members) for part in (MAGNITUDE, BIAS) if part in m.tensors
    }
    stacked = next((t.members[0].tensors[A] for t in targets if t.parameter), None)
    if (norms := some.get(MAGNITUDE)) is not None:
        _check_dora(targets, norms, method)
    if method == "peft_linear" and BIAS in some:
        refuse(some[BIAS], "PEFT's linear leaves the bias of B out, which is no composition; cat adds it up")
    if stacked is not None:
        if method == "peft_linear":
            refuse(
                stacked, "PEFT's linear knows no target_parameters; the other methods compose every expert"
            )
        if BIAS in some or any(m.adapter.config.fan_in_fan_out for m in members):
            refuse(stacked, "PEFT loads target_parameters beside neither lora_bias nor fan_in_fan_out")


def _check_dora(targets: Sequence[Target], norms: TensorInfo, method: str) -> None:
    if method != "cat":
        why = "magnitudes of DoRA belong to the changed base's rows, and only cat keeps factors as they are"
        refuse(norms, why)
    for target in targets:
        for member in target.members:
            if MAGNITUDE not in member.tensors:
                why = "an adapter has DoRA in all its modules or in none, and others have it here"
                refuse(member.tensors[A], why)
        if len(target.members) > 1:
            why = (
                "DoRA divides by norms of the base's rows: the sum of its change and another is not low-rank"
            )
            refuse(target.members[-1].tensors[A], why)
