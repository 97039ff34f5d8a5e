"""One adapter against one base: what happens to which tensor, with every rule of PEFT's format checked.

The tensors drive it: the config gives ranks, scalings and flags, and a tensor that changes nothing is an
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from pykernels.adapters import experts
from pykernels.adapters.change import ADD, REPLACE, ROWS, VECTOR, Change
from pykernels.adapters.checkpoint import Adapter
from pykernels.adapters.config import LARGEST
from pykernels.adapters.conv1d import is_conv1d
from pykernels.adapters.keys import BIAS, MAGNITUDE, TOKENS, A, B, Parts
from pykernels.adapters.pairs import check_pair, refuse
from pykernels.engine.files import MERGEABLE
from pykernels.engine.shard import TensorInfo
from pykernels.engine.strict_json import shown


@dataclass(frozen=True)
class Base:
    """What an adapter must know of its base. ``tied``: names of heads that are another stored tensor."""

    name: str
    tensors: Mapping[str, TensorInfo]
    model_type: str
    tied: Mapping[str, str]


@dataclass
class Resolved:
    """``changes`` by the base's tensor, in their order. ``copies``: names of those with a trained full copy.

    ``untied``: a trained copy of a head that the base does not store. ``same``: pairs that must be equal.
    """

    changes: dict[str, list[Change]] = field(default_factory=dict)
    copies: set[str] = field(default_factory=set)
    untied: dict[str, TensorInfo] = field(default_factory=dict)
    same: list[tuple[TensorInfo, TensorInfo]] = field(default_factory=list)
    modules: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, *changes: Change) -> None:
        """Append to the steps of a tensor."""
        self.changes.setdefault(name, []).extend(changes)

    def count(self, kind: str) -> None:
        """One more module of a kind."""
        self.modules[kind] = self.modules.get(kind, 0) + 1


def resolve(adapter: Adapter, number: int, weight: float, base: Base) -> Resolved:
    """Find the tensors that ``adapter`` changes. ``weight`` multiplies its scaling.

    Raises FileError naming the file, the tensor, the rule and the value.
    """
    return _Resolver(adapter, number, weight, base).run()


class _Resolver:
    def __init__(self, adapter: Adapter, number: int, weight: float, base: Base) -> None:
        self._adapter = adapter
        self._config = adapter.config
        self._number = number
        self._weight = weight
        self._base = base
        self._found = Resolved()
        self._tails: dict[str, list[str]] = {}
        self._stored_as: set[bool] = set()
        self._by_flag: list[TensorInfo] = []

    def run(self) -> Resolved:
        """Copies first: a base layer's copy is what the rest is added to."""
        low_rank = {parts.module for parts in self._adapter.keys.modules if A in parts.tensors}
        for name, info in self._adapter.keys.copies.items():
            self._copy(name, info, low_rank)
        nested: dict[str, list[Parts]] = {}
        for parts in self._adapter.keys.modules:
            if TOKENS in parts.tensors:
                self._tokens(parts)
            if parts.tensors.keys() == {TOKENS}:
                continue
            check_pair(parts, self._config)
            if parts.embedding or self._is_layer(parts.module):
                self._low_rank(parts)
            else:
                nested.setdefault(parts.module, []).append(parts)
        for levels in nested.values():
            self._parameters(levels)
        self._check_flag()
        return self._found

    def _is_layer(self, module: str) -> bool:
        """Whether PEFT takes the module as a layer, not its weight as a parameter (a router of a mixture)."""
        name = f"{module}.weight"
        targeted = "weight" in experts.parameters_of(module, self._config.target_parameters)
        return self._named(name) is not None and not (targeted and name in self._base.tensors)

    def _check_flag(self) -> None:
        """PEFT goes by the kind of a layer and corrects the flag, which then holds for the last one only."""
        said = self._config.fan_in_fan_out
        if self._by_flag and (not said) in self._stored_as:
            refuse(
                self._by_flag[0],
                f"fan_in_fan_out is {str(said).lower()}, other layers of the base lie the other way round, "
                "and nothing tells how this square one lies",
            )

    def _named(self, name: str) -> TensorInfo | None:
        """The base's tensor of a name, its tied twin, or the only one that differs in leading parts alone."""
        tensors = self._base.tensors
        if name in tensors:
            return tensors[name]
        if name in self._base.tied:
            return tensors[self._base.tied[name]]
        if not self._tails:
            for known in tensors:
                self._tails.setdefault(_tail(known), []).append(known)
        near = [
            known
            for known in self._tails.get(_tail(name), [])
            if known.endswith(f".{name}") or name.endswith(f".{known}")
        ]
        if len(near) != 1:
            return None
        note = f"{shown(self._adapter.name)}: names begin otherwise: {shown(name)} is {shown(near[0])}"
        if not any(
            text.startswith(f"{shown(self._adapter.name)}: names begin") for text in self._found.notes
        ):
            self._found.notes.append(note)
        return tensors[near[0]]

    def _wanted(self, name: str, info: TensorInfo) -> TensorInfo:
        found = self._named(name)
        if found is None:
            refuse(info, f"changes {shown(name)}, which {shown(self._base.name)} does not hold")
        if found.dtype not in MERGEABLE:
            why = (
                f"the base's {shown(found.name)} is {found.dtype}, and only {', '.join(MERGEABLE)} are merged"
            )
            refuse(info, f"{why}: dequantise the base first")
        return found

    def _copy(self, name: str, info: TensorInfo, low_rank: set[str]) -> None:
        """A full tensor: of a base layer, then it is no more than the base; else a trained one."""
        module = name.rpartition(".")[0]
        of_base = ".base_layer." in info.name and module in low_rank and name.endswith(".weight")
        if not of_base and self._weight != 1.0:
            refuse(info, f"a full copy replaces the base's tensor, and a weight of {self._weight} cannot")
        if not of_base and name not in self._base.tensors and name in self._base.tied:
            twin = self._base.tensors[self._base.tied[name]]
            self._check_shape(info, twin.shape, name)
            self._found.untied[name] = info
            self._found.count("saved")
            return
        found = self._wanted(name, info)
        self._check_shape(info, found.shape, found.name)
        for old in self._found.changes.get(found.name, []):
            self._found.same.append((old.tensors[0], info))
            return
        if not of_base:
            self._found.copies.add(found.name)
            self._found.count("saved")
        if info.dtype != found.dtype:
            self._found.notes.append(
                f"{shown(self._adapter.name)}: {shown(info.name)} ({info.dtype}) is rounded to the base's "
                f"{found.dtype}"
            )
        self._found.add(found.name, Change(REPLACE, self._number, (info,)))

    def _check_shape(self, info: TensorInfo, shape: tuple[int, ...], name: str) -> None:
        if info.shape != shape:
            refuse(
                info,
                f"must have the shape {list(shape)} of the base's {shown(name)}, got {list(info.shape)}; "
                "after a change of the vocabulary the base must be resized first",
            )

    def _tokens(self, parts: Parts) -> None:
        info = parts.tensors[TOKENS]
        found = self._wanted(f"{parts.module}.weight", info)
        rows = self._config.rows(parts.module)
        if rows is None:
            refuse(info, "trainable_token_indices of the config does not name its module")
        if self._weight != 1.0:
            refuse(info, f"rows are overwritten, and a weight of {self._weight} cannot be used")
        if info.shape != (len(rows), *found.shape[1:]):
            want = [len(rows), *found.shape[1:]]
            refuse(info, f"must have shape {want}, a row per trainable token, got {list(info.shape)}")
        if rows and max(rows) >= found.shape[0]:
            refuse(info, f"overwrites row {max(rows)} of {found.shape[0]}")
        self._found.count("tokens")
        self._found.add(found.name, Change(ROWS, self._number, (info,), index=rows))

    def _rank(self, parts: Parts, rank: int) -> float:
        """The scaling of a module of this rank, which must be the config's."""
        said = self._config.rank(parts.module)
        if rank != said:
            refuse(parts.tensors[A], f"has rank {rank}, r and rank_pattern of the config give {said}")
        return self._scaled(parts.tensors[A], self._config.scaling(parts.module, rank))

    def _scaled(self, info: TensorInfo, scaling: float) -> float:
        """The scaling with the weight of the adapter, which float32 must hold."""
        if not abs(scaling * self._weight) <= LARGEST:
            refuse(info, f"is scaled by {scaling:g} and a weight of {self._weight:g}: not in float32")
        return scaling * self._weight

    def _low_rank(self, parts: Parts) -> None:
        a, b = parts.tensors[A], parts.tensors[B]
        found = self._wanted(f"{parts.module}.weight", a)
        scaling = self._rank(parts, a.shape[0])
        groups = a.shape[0] / b.shape[1] if not parts.embedding and len(b.shape) > 2 else 1
        if groups != 1:
            refuse(b, f"belongs to a convolution of {groups:g} groups, which PEFT cannot merge either")
        conv = len(found.shape) > 2
        if conv and a.shape[1:] != found.shape[1:]:
            refuse(
                a,
                f"A must have shape {[a.shape[0], *found.shape[1:]]}, as the convolution {shown(found.name)} "
                f"has {list(found.shape)}, got {list(a.shape)}",
            )
        columns, rows = prod(a.shape[1:]), b.shape[0]
        flat = (found.shape[0], prod(found.shape[1:]))
        transposed = parts.embedding or (not conv and flat == (columns, rows) and self._turned(parts, flat))
        stored = (columns, rows) if transposed else (rows, columns)
        if len(found.shape) < 2 or flat != stored or prod(b.shape[1:]) != a.shape[0]:
            refuse(
                a,
                f"A {list(a.shape)} and B {list(b.shape)} make a change of {list(stored)}, the base's "
                f"{shown(found.name)} is {list(found.shape)}",
            )
        if not conv and not parts.embedding and rows != columns:
            self._stored_as.add(transposed)
        tensors = [a, b]
        if MAGNITUDE in parts.tensors:
            tensors.append(self._magnitude(parts.tensors[MAGNITUDE], rows))
        kind = "embedding" if parts.embedding else "conv" if conv else "linear"
        self._found.count(f"{kind}, DoRA" if MAGNITUDE in parts.tensors else kind)
        rounded = parts.embedding and MAGNITUDE not in parts.tensors
        self._found.add(
            found.name,
            Change(ADD, self._number, tuple(tensors), scaling, transposed=transposed, rounded=rounded),
        )
        if BIAS in parts.tensors:
            self._bias(parts, scaling)

    def _turned(self, parts: Parts, flat: tuple[int, int]) -> bool:
        """Whether a layer whose matrix is the transpose of B A's shape, or square, stores [in, out]."""
        if flat[0] != flat[1]:
            return True
        known = is_conv1d(self._base.model_type, parts.module)
        if known is None:
            self._by_flag.append(parts.tensors[A])
        return self._config.fan_in_fan_out if known is None else known

    def _magnitude(self, info: TensorInfo, rows: int) -> TensorInfo:
        if prod(info.shape) != rows:
            refuse(info, f"must hold a magnitude per output, {rows}, got {list(info.shape)}")
        return info

    def _bias(self, parts: Parts, scaling: float) -> None:
        info = parts.tensors[BIAS]
        found = self._named(f"{parts.module}.bias")
        if found is None:
            refuse(info, f"is added to {shown(parts.module + '.bias')}, which the base does not hold")
        self._check_shape(info, found.shape, found.name)
        self._found.add(found.name, Change(VECTOR, self._number, (info,), scaling))

    def _parameters(self, levels: list[Parts]) -> None:
        first = levels[0].tensors[A]
        if not experts.parameters_of(levels[0].module, self._config.target_parameters):
            self._wanted(f"{levels[0].module}.weight", first)
        for parts in levels:
            for part in (MAGNITUDE, BIAS):
                if part in parts.tensors:
                    refuse(parts.tensors[part], "target_parameters know neither DoRA nor a bias of B")
            a, b = parts.tensors[A], parts.tensors[B]
            if len(a.shape) != 2 or b.shape[1:] != a.shape[:1]:
                refuse(a, f"A {list(a.shape)} and B {list(b.shape)} must hold the same ranks of all experts")
        placed = experts.fit(levels, self._config, self._base.tensors, self._base.model_type)
        if isinstance(placed, str):
            refuse(first, placed)
        for parts, changes in zip(levels, placed, strict=True):
            self._found.count("parameter")
            for name, change in changes:
                self._wanted(name, parts.tensors[A])
                scaling = self._scaled(parts.tensors[A], change.scaling)
                self._found.add(name, replace(change, adapter=self._number, scaling=scaling))


def _tail(name: str) -> str:
    return ".".join(name.rsplit(".", 3)[-3:])
