"""What a plan is made of: plain data, the same in memory and as JSON, so any executor can run a part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from pykernels.adapters.change import ADD, Change
from pykernels.engine.files import FileIdentity, header_bytes
from pykernels.methods import METHODS, Params

ROW_HEAD = ("tensor", "shape", "from", "to", "shard", "parameters")
"""Titles of the columns of ``Plan.rows``."""


@dataclass(frozen=True)
class Source:
    """Where one input lies: bytes ``start`` to ``end`` of ``file``; ``name`` may be an alias."""

    model: int
    file: str
    dtype: str
    start: int
    end: int
    name: str

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Adapted(Source):
    """A tensor of ``shape`` whose bytes adapters change when it is read; it keeps its dtype.

    ``rounding``: of their sums, as in :func:`pykernels.merge_lora`.
    """

    shape: tuple[int, ...]
    changes: tuple[Change, ...]
    rounding: str

    @property
    def rows(self) -> int:
        """Of the matrix that changes see: the experts' one after another, a vector's elements."""
        return prod(self.shape[: max(1, len(self.shape) - 1 if self.is_stack else 1)])

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return prod(self.shape) // max(1, self.rows)

    @property
    def is_stack(self) -> bool:
        """Whether it holds a matrix per expert."""
        return any(c.experts and c.expert is None for c in self.changes) and len(self.shape) == 3

    @property
    def whole(self) -> bool:
        """Whether rows depend on each other: norms of columns, or PEFT's own products of whole matrices."""
        adds = [c for c in self.changes if c.kind == ADD]
        return any(len(c.tensors) > 2 and c.transposed for c in adds) or (
            self.rounding == "peft" and bool(adds)
        )

    @property
    def added(self) -> int:
        """Bytes of all that is read beside its own."""
        return sum(c.nbytes for c in self.changes)


@dataclass(frozen=True)
class Output:
    """One output tensor, fixed to the byte: ``start`` to ``end`` of file ``shards[shard]``.

    action "merge": ``base`` and ``tuned`` go through the method with ``params``; tuned has one source per
    ``params["weight"]`` entry. action "copy" (not a float tensor): every source holds the same bytes, or the
    merge must not start. action "adapt": the one source, as adapters change it, in dtype ``dtype``. ``flat``
    (scope "model" only) is the index of its first element in the model-wide segment; a tensor with
    ``alias_of`` shares that output's place there and is not counted again.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    end: int
    action: str
    base: Source | None
    tuned: tuple[Source, ...]
    params: Params
    flat: int | None = None
    alias_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every input, the base first."""
        return (self.base, *self.tuned) if self.base else self.tuned


@dataclass(frozen=True)
class Shard:
    """One output file: its final name, its size with header, and its tensors in the order of their data."""

    name: str
    nbytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ModelRef:
    """An input model: name in the recipe, directory, and the identities of its tensors' files.

    ``adapters``: the directories of those merged into it. ``modules``: per adapter how many modules of which
    kind it changes ("linear", "embedding, DoRA", "saved" for a full copy).
    """

    name: str
    path: str
    identities: dict[str, FileIdentity]
    adapters: tuple[str, ...] = ()
    modules: tuple[dict[str, int], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything about a merge before its first byte is read; ``outputs`` in file order: shard, then offset.

    ``recipe`` is the recipe with the seed in force; ``base`` and ``config_from`` are indices into ``models``
    (base None: the method reads none). ``config``: keys of config.json that the output needs otherwise.
    ``same``: pairs that must hold equal bytes before anything is written. ``twins``: a tied head's changes,
    and those of its embedding that must be their transposes. ``dropped``: input tensors without an output.
    ``total_read`` counts every source once, ``total_write`` the shards with their headers.
    """

    recipe: dict[str, Any]
    method: str
    scope: str
    seed: int
    models: tuple[ModelRef, ...]
    base: int | None
    config_from: int
    outputs: tuple[Output, ...]
    shards: tuple[Shard, ...]
    metadata: dict[str, str]
    same: tuple[tuple[Source, Source], ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    total_read: int
    total_write: int
    config: Mapping[str, Any] = field(default_factory=dict)
    twins: tuple[tuple[Change, Change], ...] = ()

    @property
    def total_size(self) -> int:
        """Bytes of all output tensors without headers: what the index calls total_size."""
        return sum(o.nbytes for o in self.outputs)

    def header(self, shard: int) -> bytes:
        """The first bytes of a shard's file, up to its first tensor."""
        held = [(o.name, o.dtype, o.shape, o.nbytes) for o in self.outputs if o.shard == shard]
        return header_bytes(held, self.metadata)

    def segment(self) -> list[Output]:
        """The outputs that a model-wide statistic sees, by ``flat`` (scope "model")."""
        seen = [o for o in self.outputs if o.flat is not None and o.alias_of is None]
        return sorted(seen, key=lambda o: (o.flat, o.name))

    def to_json(self, indent: int | None = None) -> str:
        """JSON text; ``from_json`` gives an equal plan."""
        return json.dumps(asdict(self), indent=indent, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read back what ``to_json`` wrote."""
        d = json.loads(text)
        models = tuple(_model(m) for m in d["models"])
        outputs = tuple(_output(o) for o in d["outputs"])
        shards = tuple(Shard(s["name"], s["nbytes"], tuple(s["tensors"])) for s in d["shards"])
        same = tuple((_source(a), _source(b)) for a, b in d["same"])
        twins = tuple((Change.of(a), Change.of(b)) for a, b in d.get("twins", ()))
        plain = {"dropped": tuple(d["dropped"]), "notes": tuple(d["notes"]), "twins": twins}
        return Plan(**{**d, **plain, "models": models, "outputs": outputs, "shards": shards, "same": same})

    def rows(self) -> list[tuple[str, ...]]:
        """One row of text per output, under ``ROW_HEAD``."""
        fixed = {name for name, default in METHODS[self.method].parameters.items() if default is None}
        return [_row(o, self.shards[o.shard].name, fixed) for o in self.outputs]


def _model(d: dict[str, Any]) -> ModelRef:
    identities = {k: FileIdentity(**v) for k, v in d["identities"].items()}
    adapters, modules = tuple(d.get("adapters", ())), tuple(d.get("modules", ()))
    return ModelRef(d["name"], d["path"], identities, adapters, modules)


def _source(d: dict[str, Any]) -> Source:
    if "changes" not in d:
        return Source(**d)
    return Adapted(**{**d, "shape": tuple(d["shape"]), "changes": tuple(map(Change.of, d["changes"]))})


def _output(d: dict[str, Any]) -> Output:
    base = _source(d["base"]) if d["base"] else None
    tuned = tuple(_source(s) for s in d["tuned"])
    return Output(**{**d, "shape": tuple(d["shape"]), "base": base, "tuned": tuned})


def _row(o: Output, shard: str, fixed: set[str]) -> tuple[str, ...]:
    shape = " x ".join(map(str, o.shape)) or "scalar"
    inputs = " ".join(dict.fromkeys(s.dtype for s in o.sources))
    text = {"copy": "copied", "adapt": ""}.get(o.action) or _parameters(o.params, fixed)
    text = ", ".join(filter(None, [text, *(_changes(s) for s in o.sources if isinstance(s, Adapted))]))
    return o.name, shape, inputs, o.dtype, shard, text


def _changes(source: Adapted) -> str:
    """ "+ r 16 + r 8" for two adapters, "+ copy" for a tensor that one replaces."""
    words = [f"r {c.rank}" if c.kind == ADD else c.kind for c in source.changes]
    return "".join(f"+ {word} " for word in words).rstrip()


def _parameters(params: Params, fixed: set[str]) -> str:
    """``fixed``: parameters that have one value only, which says nothing."""
    parts = []
    for key, value in params.items():
        if isinstance(value, list):
            parts.append(f"{key} {_numbers(value)}")
        elif key not in {"seed", "name", "int8_mask", *fixed}:
            parts.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(sorted(parts, key=lambda p: not p.startswith(("weight", "density"))))


def _numbers(values: Sequence[float]) -> str:
    texts = [f"{v:.4g}" for v in values]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)
