"""A recipe and the headers of its models to a plan: every output tensor, its sources, parameters and bytes.

No tensor is read here. What the headers can show to be wrong is found here, before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykernels.engine.differences import differences
from pykernels.engine.files import FileError, inside, open_checkpoint, open_regular, resolve_model, shown
from pykernels.engine.header import BITS
from pykernels.engine.layers import layer_of, stacks
from pykernels.engine.layout import lay_out
from pykernels.engine.matching import Matched, Model, PlanError, match
from pykernels.engine.recipe import Recipe
from pykernels.engine.settings import known
from pykernels.engine.units import ROW_HEAD, ModelRef, Output, Plan, Shard, Source
from pykernels.methods import Params

__all__ = ["ROW_HEAD", "ModelRef", "Output", "Plan", "PlanError", "Shard", "Source", "make_plan"]

SHARD_SIZE = 5_000_000_000
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
    warnings = [w for m in models for w in m.checkpoint.warnings]
    refs = (ModelRef(m.name, str(m.checkpoint.path), dict(m.checkpoint.files)) for m in models)
    return Plan(
        recipe=recipe.as_dict(), method=recipe.merge_method, scope=recipe.scope, seed=recipe.seed,
        models=tuple(refs), base=base.index if base else None, config_from=layout.index,
        outputs=placed, shards=shards, metadata=metadata, same=tuple(found.same),
        dropped=tuple(found.dropped), notes=(*warnings, *found.notes, *differences(recipe, placed)),
        total_read=sum(s.nbytes for o in placed for s in o.sources),
        total_write=sum(s.nbytes for s in shards),
    )  # fmt: skip


def _open_models(recipe: Recipe, allow_download: bool) -> tuple[list[Model], Model, Model | None]:
    """All models, the one that gives layout and config, and the one that deltas are taken from."""
    places = [(f"models[{i}].model", m.model) for i, m in enumerate(recipe.models)]
    names = [name for _, name in places]
    if recipe.base_model is not None and recipe.base_model not in names:
        places.append(("base_model", recipe.base_model))
    models: list[Model] = []
    for where, name in places:
        models.append(_open(f"{recipe.label}: {where}", len(models), name, allow_download))
        real = os.path.realpath(models[-1].checkpoint.path)
        for other in models[:-1]:
            if os.path.realpath(other.checkpoint.path) == real:
                raise PlanError(
                    f"{recipe.label}: {where}: {shown(name)} is the same directory as {shown(other.name)}; "
                    "name a model in one way"
                )
    layout = next((m for m in models if m.name == recipe.base_model), models[0])
    return models, layout, layout if recipe.method.needs_base else None


def _open(where: str, index: int, name: str, allow_download: bool) -> Model:
    try:
        path = resolve_model(name, allow_download=allow_download)
    except FileError as e:
        beside = _models_beside(Path(name))
        raise PlanError(f"{where}: {e}" + (f"; {known(name, beside)}" if beside else "")) from None
    return Model(index, name, open_checkpoint(path), _read_config(path))


def _models_beside(path: Path) -> list[str]:
    """The model directories next to one that is not there."""
    try:
        return [str(p) for p in sorted(path.parent.iterdir()) if any(p.glob("model*.safetensors*"))][:20]
    except OSError:
        return []


def _read_config(model: Path) -> dict[str, Any]:
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
    dtype = first.dtype
    if found.action == "merge":
        stack, layer = layer_of(found.name) or ("", None)
        params = recipe.resolve(found.name, layer, depth.get(stack, 0))
        # Tied tensors must stay equal, so they draw the same masks.
        params["name"] = found.alias_of or found.name
        dtype = recipe.output_dtype or dtype
    elements = first.nbytes * 8 // BITS[first.dtype]
    return Output(
        name=found.name, dtype=dtype, shape=found.shape, shard=0, start=0, end=elements * BITS[dtype] // 8,
        action=found.action, base=found.base, tuned=found.tuned, params=params, alias_of=found.alias_of,
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
