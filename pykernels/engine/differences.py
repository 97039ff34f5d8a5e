"""Where a recipe gives other numbers here than in mergekit 0.1.5, or than meant: sentences for the plan."""

from __future__ import annotations

from collections.abc import Sequence

from pykernels.engine.recipe import Recipe
from pykernels.engine.settings import filters, shown
from pykernels.engine.units import Output

_NARROW = ("F16", "BF16")
_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def differences(recipe: Recipe, outputs: Sequence[Output]) -> list[str]:
    """Notes on all that mergekit computes differently, on tied tensors that part, and on idle filters."""
    merged = [o for o in outputs if o.action == "merge"]
    notes = [*_arithmetic(recipe, merged), *_rules(recipe, merged), *_dare(recipe, merged), *_untied(merged)]
    if recipe.base_model is not None and not recipe.method.needs_base:
        listed = recipe.base_model in [m.model for m in recipe.models]
        if not listed:
            notes.append(
                f"base_model {shown(recipe.base_model)} gives config and tokenizer only, as it is not listed "
                "under models; mergekit would merge it too"
            )
    elif recipe.base_model is not None and len(recipe.members) < len(recipe.models):
        notes.append(
            f"{shown(recipe.base_model)} is the base and has no delta to itself: its entry in models changes "
            "nothing, as in mergekit"
        )
    if recipe.tokenizer_source is not None:
        giver = recipe.base_model or recipe.models[0].model
        notes.append(
            f"tokenizer_source base: tokenizer, config and chat template are those of {shown(giver)}"
        )
    return notes + [
        f"filter {shown(text)} matches no tensor" for text in _filters(recipe) if not _matches(text, outputs)
    ]


def _arithmetic(recipe: Recipe, merged: Sequence[Output]) -> list[str]:
    inputs = {s.dtype for o in merged for s in o.sources}
    notes = []
    said = recipe.dtype and recipe.dtype.removeprefix("torch.")
    work = {_promoted(o) for o in merged} if said is None else {c for c, n in _NAMES.items() if n == said}
    narrow = [_NAMES[d] for d in _NARROW if d in work]
    if recipe.method.needs_base and narrow:
        notes.append(
            "arithmetic is float32 with one rounding at the end; mergekit computes in "
            f"{' and '.join(narrow)}, rounds after every step, and rounds the weights too"
        )
    elif said in ("float16", "bfloat16") and any(d not in work for d in inputs):
        notes.append(f"dtype {said} is the type written; mergekit rounds the inputs to it before it merges")
    mixed = [o for o in merged if recipe.output_dtype is None and o.dtype != _promoted(o)]
    if mixed:
        first = mixed[0]
        notes.append(
            f"input types differ in {len(mixed)} tensors: {shown(first.name)} is written as "
            f"{_NAMES[first.dtype]}, mergekit writes {_NAMES[_promoted(first)]}; dtype decides"
        )
    return notes


def _promoted(out: Output) -> str:
    """The one type that holds all input types, as torch promotes them."""
    seen = {s.dtype for s in out.sources}
    return next(iter(seen)) if len(seen) == 1 else "F64" if "F64" in seen else "F32"


def _rules(recipe: Recipe, merged: Sequence[Output]) -> list[str]:
    notes = []
    trimmed = [o for o in merged if any(0 < d < 1 for d in o.params.get("density", ()))]
    ties = {o.params["tie"] for o in trimmed if "tie" in o.params}
    if "index" in ties:
        notes.append(
            "tie index: of equal magnitudes at the threshold the first in the tensor are kept; mergekit "
            "keeps as many, in an order that is not defined"
        )
    if "keep" in ties:
        notes.append("tie keep: all magnitudes equal to the threshold are kept; mergekit keeps exactly k")
    if any(o.params.get("elect") == "plain" for o in merged):
        notes.append("elect plain: signs are elected by the deltas; mergekit elects by the weighted deltas")
    if any(o.params.get("normalize") == "count" for o in merged):
        notes.append("normalize count: divides by the number of agreeing models; mergekit by their weights")
    if recipe.scope == "model":
        notes.append("scope model: one threshold over all tensors of a model; mergekit has one per tensor")
    zero = [
        o for o in merged if "elect" not in o.params and o.params.get("normalize") is True and not _sum(o)
    ]
    if zero:
        notes.append(
            f"weights add up to 0 in {len(zero)} tensors ({shown(zero[0].name)}): the sum is then not divided"
        )
    return notes


def _sum(out: Output) -> float:
    return float(sum(out.params["weight"]))


def _dare(recipe: Recipe, merged: Sequence[Output]) -> list[str]:
    dropped = [o for o in merged if any(0 < d < 1 for d in o.params.get("density", ()))]
    if not recipe.merge_method.startswith("dare") or not dropped:
        return []
    notes = [
        f"masks are drawn from seed {recipe.seed} and the tensor's name, with densities in steps of 1/65536; "
        "mergekit's depend on its task order and torch's generator"
    ]
    if any(o.params["rescale"] == "density" for o in dropped):
        notes.append("rescale density (or true): divides by the density; mergekit's is rescale: l1")
    return notes


def _untied(merged: Sequence[Output]) -> list[str]:
    params = {o.name: o.params for o in merged}
    return [
        f"{shown(o.name)} and {shown(o.alias_of)} are tied but get different parameters: the result is not"
        for o in merged
        if o.alias_of is not None and o.params != params[o.alias_of]
    ]


def _filters(recipe: Recipe) -> list[str]:
    scopes = [recipe.parameters, *(m.parameters for m in recipe.models)]
    return list(dict.fromkeys(f for scope in scopes for setting in scope.values() for f in filters(setting)))


def _matches(text: str, outputs: Sequence[Output]) -> bool:
    return any(text in o.name for o in outputs)
