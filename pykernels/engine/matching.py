"""Which tensors of which models make each output: names, aliases, shapes, dtypes, from headers alone.

The layout is the base's (without a base the first model's): its tensors are the outputs, in natural order
of their names. Whatever does not fit is an error that names tensor and models; nothing is cropped, cast or
left out silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pykernels.adapters.change import Change
from pykernels.engine.files import MERGEABLE, Checkpoint, TensorInfo, shown
from pykernels.engine.layers import natural
from pykernels.engine.units import Adapted, Source

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
_MOST_PROBLEMS = 8


class PlanError(ValueError):
    """Models that cannot be merged as the recipe asks; the text names tensors, models, shapes or dtypes."""


@dataclass(frozen=True)
class Model:
    """An opened input model. ``config`` is its config.json, empty where there is none.

    ``changes``: what adapters do to its tensors, by name, with ``rounding``. ``adapters`` and ``modules``: of
    a :class:`ModelRef`. ``untied``: they brought it a head of its own. ``said``: what a user should know of
    them.
    """

    index: int
    name: str
    checkpoint: Checkpoint
    config: dict[str, Any]
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    rounding: str = "once"
    adapters: tuple[str, ...] = ()
    modules: tuple[dict[str, int], ...] = ()
    same: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    twins: tuple[tuple[Change, Change], ...] = ()
    untied: bool = False
    said: tuple[str, ...] = ()

    def source(self, info: TensorInfo) -> Source:
        """One of its tensors as an input."""
        place = (self.index, info.file, info.dtype, info.start, info.end, info.name)
        if changes := self.changes.get(info.name):
            return Adapted(*place, shape=info.shape, changes=changes, rounding=self.rounding)
        return Source(*place)

    @property
    def ties(self) -> bool:
        """Whether its config ties the output head to the embedding: so unless it says no."""
        nested = self.config.get("text_config")
        inner = nested if isinstance(nested, dict) else {}
        default = bool(self.config)
        tied = self.config.get("tie_word_embeddings", inner.get("tie_word_embeddings", default))
        return tied is True


@dataclass(frozen=True)
class Matched:
    """One output before it has parameters and a place; ``alias_of`` is the output with the same tensor."""

    name: str
    shape: tuple[int, ...]
    action: str
    base: Source | None
    tuned: tuple[Source, ...]
    alias_of: str | None


@dataclass
class Match:
    """What ``match`` found."""

    outputs: list[Matched] = field(default_factory=list)
    same: list[tuple[Source, Source]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match(layout: Model, base: Model | None, tuned: Sequence[Model]) -> Match:
    """Find the sources of every tensor of ``layout``. Raises PlanError with everything that does not fit."""
    found = Match()
    readers = [base, *tuned] if base else list(tuned)
    _drop(found, [layout, *readers])
    heads = _tied_heads(found, layout, readers)
    for name in sorted(layout.checkpoint.tensors.keys() - set(found.dropped), key=natural):
        sources = _sources(found, layout.checkpoint.tensors[name], layout, readers)
        if sources is not None:
            action = "merge" if sources[0].dtype in MERGEABLE else "copy"
            first = sources[0] if base else None
            rest = tuple(sources[1:] if base else sources)
            shape = layout.checkpoint.tensors[name].shape
            found.outputs.append(Matched(name, shape, action, first, rest, heads.get(name)))
    for model in readers:
        _extra(found, layout, model)
    if found.problems:
        lines = [f"- {p}" for p in found.problems[:_MOST_PROBLEMS]]
        more = len(found.problems) - _MOST_PROBLEMS
        lines += [f"- and {more} more"] if more > 0 else []
        raise PlanError("\n".join(["the models do not fit together:", *lines]))
    return found


def _is_recomputed(info: TensorInfo) -> bool:
    """Buffers that loaders compute: rotary frequencies, and GPT-2's causal mask and its constant."""
    tail, shape = f".{info.name}", info.shape
    causal_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return (
        tail.endswith(".inv_freq")
        or (tail.endswith(".attn.bias") and causal_mask)
        or (tail.endswith(".attn.masked_bias") and shape == ())
    )


def _drop(found: Match, models: Sequence[Model]) -> None:
    names = {i.name for m in models for i in m.checkpoint.tensors.values() if _is_recomputed(i)}
    found.dropped += sorted(names, key=natural)
    if names:
        found.notes.append(f"dropped, loaders compute them: {_some([shown(n) for n in found.dropped])}")


def _role(name: str) -> tuple[str, ...] | None:
    """The names that may alias this one, or None: a head its embedding, an embedding its head."""
    for own, other in ((HEADS, EMBEDDINGS), (EMBEDDINGS, HEADS)):
        if any(f".{name}".endswith(f".{tail}") for tail in own):
            return other
    return None


def _alias(model: Model, name: str, shape: tuple[int, ...]) -> TensorInfo | None:
    """The tensor of ``model`` that its config ties to ``name``; None unless there is exactly one."""
    tails = _role(name) if model.ties else None
    fits = [
        info
        for info in model.checkpoint.tensors.values()
        if tails and info.shape == shape and any(f".{info.name}".endswith(f".{tail}") for tail in tails)
    ]
    return fits[0] if len(fits) == 1 else None


def _tied_heads(found: Match, layout: Model, readers: Sequence[Model]) -> dict[str, str]:
    """Heads that the layout stores although it ties them: they share the embedding's masks."""
    heads = {}
    for info in layout.checkpoint.tensors.values():
        embedding = _alias(layout, info.name, info.shape) if _role(info.name) == EMBEDDINGS else None
        if embedding is None:
            continue
        apart = [shown(m.name) for m in readers if not m.ties]
        if apart:
            found.notes.append(
                f"{shown(layout.name)} ties {shown(info.name)} to {shown(embedding.name)}, {_some(apart)} "
                "does not: both are merged, and the output's config may need tie_word_embeddings: false"
            )
        else:
            heads[info.name] = embedding.name
    return heads


def _sources(found: Match, want: TensorInfo, layout: Model, readers: Sequence[Model]) -> list[Source] | None:
    """The tensor in every model that is read, or None after noting what is wrong."""
    name, infos, missing, aliased = want.name, [], [], {}
    for model in readers:
        info = model.checkpoint.tensors.get(name)
        if info is None and (info := _alias(model, name, want.shape)) is not None:
            aliased[shown(model.name)] = info.name
        if info is None:
            missing.append(shown(model.name))
        else:
            infos.append((model, info))
    if missing:
        found.problems.append(
            f"tensor {shown(name)} of {shown(layout.name)} is missing in {', '.join(missing)}"
        )
    elif any(info.shape != want.shape for _, info in infos):
        seen = {shown(m.name): list(i.shape) for m, i in infos} | {shown(layout.name): list(want.shape)}
        found.problems.append(f"tensor {shown(name)} has different shapes: {_each(seen)}")
    elif len({info.dtype for _, info in infos}) > 1 and any(info.dtype not in MERGEABLE for _, info in infos):
        types = {shown(m.name): i.dtype for m, i in infos}
        found.problems.append(
            f"tensor {shown(name)} can be neither averaged nor copied, its types differ: {_each(types)} "
            f"(averaged are {', '.join(MERGEABLE)})"
        )
    else:
        if aliased:
            found.notes.append(f"tensor {shown(name)}: tied, read from {_each(aliased)}")
        return [m.source(i) for m, i in infos]
    return None


def _extra(found: Match, layout: Model, model: Model) -> None:
    """Tensors without a place in the layout: a stored copy of a tied tensor is fine, all else an error."""
    read = {s.name for o in found.outputs for s in (o.base, *o.tuned) if s and s.model == model.index}
    known = layout.checkpoint.tensors.keys() | set(found.dropped) | read
    for name in sorted(model.checkpoint.tensors.keys() - known, key=natural):
        info = model.checkpoint.tensors[name]
        twin = _alias(model, name, info.shape)
        if twin is None or twin.name not in layout.checkpoint.tensors:
            found.problems.append(
                f"tensor {shown(name)} of {shown(model.name)} is missing in {shown(layout.name)}"
            )
            continue
        pair = [model.source(i) for i in (info, twin)]
        if info.dtype != twin.dtype:
            found.problems.append(
                f"{shown(model.name)} ties {shown(name)} to {shown(twin.name)}, but their types differ: "
                f"{info.dtype} and {twin.dtype}"
            )
            continue
        found.same.append((pair[0], pair[1]))
        found.dropped.append(name)
        found.notes.append(
            f"tensor {shown(name)} of {shown(model.name)}: dropped, tied to {shown(twin.name)}"
        )


def _each(values: dict[str, Any]) -> str:
    return ", ".join(f"{value} in {name}" for name, value in values.items())


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
