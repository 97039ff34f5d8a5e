"""A recipe and the headers of its models to a plan: every output tensor, its sources, parameters and bytes.

No tensor is read here. What the headers can show to be wrong is found here, before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pykernels.engine.attach import attach
from pykernels.engine.differences import differences
from pykernels.engine.files import FileError, inside, open_checkpoint, open_regular, resolve_model, shown
from pykernels.engine.header import BITS
from pykernels.engine.layers import layer_of, stacks
from pykernels.engine.layout import lay_out
from pykernels.engine.matching import Matched, Model, PlanError, match
from pykernels.engine.recipe import Recipe, Reference
from pykernels.engine.settings import known
from pykernels.engine.units import ROW_HEAD, Adapted, ModelRef, Output, Plan, Shard, Source
from pykernels.methods import Params

__all__ = ["ROW_HEAD", "ModelRef", "Output", "Plan", "PlanError", "Shard", "Source", "make_plan"]

SHARD_SIZE = 5_000_000_000
PASSTHROUGH = "passthrough"
_MAX_CONFIG = 10_000_000


def make_plan(
    recipe: Recipe, *, shard_size: int = SHARD_SIZE, seed: int | None = None, allow_download: bool = False
) -> Plan:
    """Plan a merge from headers alone. ``shard_size`` in bytes; ``seed`` None keeps the recipe's.

    Raises PlanError (models that do not fit), RecipeError (a parameter without a value), FileError (a file).
    """
    if shard_size <= 0:
        raise PlanError(f"shard size must be at least 1 byte, got {shard_size}")
    recipe = recipe.with_seed(seed)
    models, layout, base = _open_models(recipe, allow_download)
    found = match(layout, base, [models[i] for i in recipe.members])
    depth = stacks(layout.checkpoint.tensors, layout.config)
    outputs = [_output(recipe, m, depth) for m in found.outputs]
    _check_weights(recipe, outputs)
    if recipe.scope == "model":
        outputs = _segment(recipe, outputs, models)
    metadata = {"format": "pt"}
    placed, shards = lay_out(outputs, shard_size, metadata)
    warnings = [w for m in models for w in (*m.checkpoint.warnings, *m.said)]
    return Plan(
        recipe=recipe.as_dict(), method=recipe.merge_method, scope=recipe.scope, seed=recipe.seed,
        models=tuple(map(_reference, models)), base=base.index if base else None, config_from=layout.index,
        outputs=placed, shards=shards, metadata=metadata, same=(*found.same, *_equal(models)),
        dropped=tuple(found.dropped), notes=(*warnings, *found.notes, *differences(recipe, placed)),
        total_read=sum(_read_bytes(s) for o in placed for s in o.sources),
        total_write=sum(s.nbytes for s in shards),
        twins=tuple(pair for m in models for pair in m.twins),
        config={"tie_word_embeddings": False} if layout.untied else {},
    )  # fmt: skip


def _reference(model: Model) -> ModelRef:
    path, files = str(model.checkpoint.path), dict(model.checkpoint.files)
    return ModelRef(model.name, path, files, model.adapters, model.modules)


def _equal(models: Sequence[Model]) -> list[tuple[Source, Source]]:
    """Tensors that several files of adapters hold, and that must be the same."""
    bare = (replace(m, changes={}) for m in models)
    return [(m.source(one), m.source(other)) for m in bare for one, other in m.same]


def _read_bytes(source: Source) -> int:
    return source.nbytes + (source.added if isinstance(source, Adapted) else 0)


def _open_models(recipe: Recipe, allow_download: bool) -> tuple[list[Model], Model, Model | None]:
    """All models, the one that gives layout and config, and the one that deltas are taken from."""
    models: list[Model] = []
    places: dict[object, str] = {}
    for where, reference in recipe.references:
        told = f"{recipe.label}: {where}"
        model = _open(told, len(models), reference, recipe.rounding or "once", allow_download)
        weights = tuple(weight for _, weight in reference.adapters)
        real = tuple(map(os.path.realpath, (str(model.checkpoint.path), *model.adapters)))
        if (other := places.setdefault((real, weights), model.name)) != model.name:
            raise PlanError(
                f"{told}: {shown(model.name)} is the same directory as {shown(other)}; "
                "name a model in one way"
            )
        models.append(model)
    layout = next((m for m in models if m.name == recipe.base_model), models[0])
    return models, layout, layout if recipe.method.needs_base else None


def _open(where: str, index: int, reference: Reference, rounding: str, allow_download: bool) -> Model:
    name = reference.model
    try:
        path = resolve_model(name, allow_download=allow_download)
    except FileError as e:
        beside = _models_beside(Path(name))
        raise PlanError(f"{where}: {e}" + (f"; {known(name, beside)}" if beside else "")) from None
    model = Model(index, reference.name, open_checkpoint(path), read_config(path))
    if not reference.adapters:
        return model
    return attach(model, reference.adapters, rounding=rounding, allow_download=allow_download)


def _models_beside(path: Path) -> list[str]:
    """The model directories next to one that is not there."""
    try:
        return [str(p) for p in sorted(path.parent.iterdir()) if any(p.glob("model*.safetensors*"))][:20]
    except OSError:
        return []


def read_config(model: Path) -> dict[str, Any]:
    """A model's config.json, empty where there is none. Raises PlanError where it is no JSON object."""
    path = model / "config.json"
    if not os.path.lexists(path):
        return {}
    if not inside(model, path):
        raise PlanError(f"{shown(path)}: leads out of the model directory")
    with open_regular(path) as handle:
        raw = os.pread(handle, _MAX_CONFIG + 1, 0)
    try:
        config = json.loads(raw) if len(raw) <= _MAX_CONFIG else None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise PlanError(f"{shown(path)}: must be a JSON object of at most {_MAX_CONFIG} bytes")
    return config


def _output(recipe: Recipe, found: Matched, depth: dict[str, int]) -> Output:
    """An output with its parameters; ``start`` and ``end`` hold its length until it is laid out."""
    first = found.base or found.tuned[0]
    params: Params = {}
    dtype, action = first.dtype, found.action
    if action == "merge" and recipe.merge_method == PASSTHROUGH:
        dtype = recipe.output_dtype or dtype
        action = "adapt" if isinstance(first, Adapted) or dtype != first.dtype else "copy"
    elif action == "merge":
        stack, layer = layer_of(found.name) or ("", None)
        params = recipe.resolve(found.name, layer, depth.get(stack, 0))
        # Tied tensors must stay equal, so they draw the same masks.
        params["name"] = found.alias_of or found.name
        dtype = recipe.output_dtype or dtype
    elements = first.nbytes * 8 // BITS[first.dtype]
    return Output(
        name=found.name, dtype=dtype, shape=found.shape, shard=0, start=0, end=elements * BITS[dtype] // 8,
        action=action, base=found.base, tuned=found.tuned, params=params, alias_of=found.alias_of,
    )  # fmt: skip


def _check_weights(recipe: Recipe, outputs: Sequence[Output]) -> None:
    for out in outputs:
        if out.base is None and out.action == "merge" and not any(out.params["weight"]):
            raise PlanError(
                f"{recipe.label}: tensor {shown(out.name)}: every weight is 0, so {recipe.merge_method} has "
                "nothing to merge"
            )


def _segment(recipe: Recipe, outputs: Sequence[Output], models: Sequence[Model]) -> list[Output]:
    """Place every merged tensor in the model-wide segment: by name, tied tensors once."""
    merged = sorted((o for o in outputs if o.action == "merge"), key=lambda o: o.name)
    first = merged[0] if merged else None
    flat: dict[str, int] = {}
    at = 0
    for out in merged:
        for key in ("density", "tie"):
            if first is not None and out.params[key] != first.params[key]:
                raise PlanError(_unequal(recipe, key, first, out, models))
        if out.alias_of is None:
            flat[out.name] = at
            at += out.numel
    return [
        Output(**{**vars(o), "flat": flat[o.alias_of or o.name]}) if o.action == "merge" else o
        for o in outputs
    ]


def _unequal(recipe: Recipe, key: str, a: Output, b: Output, models: Sequence[Model]) -> str:
    one, two = a.params[key], b.params[key]
    who = ""
    if isinstance(one, list):
        i = next(i for i, (x, y) in enumerate(zip(one, two, strict=True)) if x != y)
        one, two = one[i], two[i]
        who = f" of {shown(models[recipe.members[i]].name)}"
    return (
        f"{recipe.label}: scope model needs one {key} for all tensors of a model, but the {key}{who} is "
        f"{one} for {shown(a.name)} and {two} for {shown(b.name)}"
    )
