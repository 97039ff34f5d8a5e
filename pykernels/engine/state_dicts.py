"""Merging models that are in memory: methods, parameters and errors of a recipe, on mappings of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from pykernels import check
from pykernels.engine.passes import merge_whole
from pykernels.engine.settings import known, reader, shown
from pykernels.grouping import grouped
from pykernels.methods import METHODS, REQUIRED, Method, Params

MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
StateDict = Mapping[str, torch.Tensor]
OP = "merge_state_dicts"


def merge_state_dicts(
    base: StateDict | None,
    tuned: Sequence[StateDict],
    method: str = "ties",
    *,
    seed: int = 0,
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge state dicts by the methods that recipes name.

    Args:
        base: tensors by name; None for a method without a base (linear).
        tuned: the models to merge, with the names and shapes of the base.
        method: "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties" or "passthrough".
        seed: of the random masks, which depend on it, the tensor's name and the element only.
        parameters: the method's own, by their names in a recipe (``lambda_`` for lambda): per model a number
            or a sequence (weight, density), else one value (normalize, lambda_, tie, elect, rescale).

    Returns:
        New tensors by name, in the base's order (without a base the first model's), of its dtypes. Tensors
        that are not float16, bfloat16, float32 or float64 must be equal in all models and are copied. Tensors
        that are tied in every model (same storage) stay tied.

    Raises:
        ValueError, TypeError: unknown method or parameter, missing tensor, other shape; the text names it.
    """
    if method not in METHODS:
        raise ValueError(f"merge_state_dicts: unknown method {shown(method)}; {known(str(method), METHODS)}")
    row = METHODS[method]
    if row.needs_base != (base is not None):
        rule = (
            "needs a base"
            if row.needs_base
            else "has no base: pass None, and put it into tuned to merge it too"
        )
        raise ValueError(f"merge_state_dicts: {method} {rule}")
    _check_models(base, tuned)
    if row.max_models is not None and len(tuned) > row.max_models:
        raise ValueError(f"merge_state_dicts: {method} takes {row.max_models} model, got {len(tuned)}")
    check.seed(OP, seed)
    p = _parameters(row, len(tuned), parameters)
    models = [base, *tuned] if base is not None else list(tuned)
    titles = (["base"] if base is not None else []) + [f"tuned[{i}]" for i in range(len(tuned))]
    _check_names(models, titles)
    merged: dict[str, torch.Tensor] = {}
    tied: dict[Any, torch.Tensor] = {}
    with grouped():  # on a device small tensors share launches
        for name, first in models[0].items():
            tensors = [model[name] for model in models]
            _check_tensors(name, tensors, titles)
            place = tuple((t.data_ptr(), t.dtype) for t in tensors) + tuple(first.shape)
            if first.numel() and place in tied:
                merged[name] = tied[place]
            elif first.dtype in MERGEABLE:
                merged[name] = tied[place] = _merge(
                    row, {**p, "seed": seed, "name": name}, tensors, base is not None
                )
            else:
                merged[name] = tied[place] = _copied(name, tensors, titles)
    return merged


def _parameters(row: Method, count: int, given: Mapping[str, Any]) -> Params:
    given = {name.removesuffix("_"): value for name, value in given.items()}
    defaults = {**row.parameters, **row.model_parameters}
    for name in given:
        if name not in defaults:
            raise ValueError(
                f"merge_state_dicts: {row.name} has no parameter {name}; {known(name, defaults)}"
            )
    p: Params = {}
    for name, default in defaults.items():
        value = given.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"merge_state_dicts: {row.name} needs {name}: a number, or one per model")
        p[name] = default if value is default else _read(row, name, value, count)
        if name in row.model_parameters and value is default:
            p[name] = [default] * count
    return p


def _read(row: Method, name: str, value: Any, count: int) -> Any:
    """One parameter as the ops take it: numbers by their checks, words and flags by the recipe's."""
    if name in row.model_parameters:
        return (
            check.density(OP, value, count) if name == "density" else check.per_model(OP, name, value, count)
        )
    if isinstance(row.parameters[name], float):
        return check.number(OP, f"{name}_" if name == "lambda" else name, value)
    if name == "rescale" and value is None:
        return None  # as in the ops; a recipe says false
    try:
        return reader(row, name)(value)
    except ValueError as error:
        raise ValueError(f"{OP}: {name} {error}") from None


def _check_models(base: StateDict | None, tuned: Sequence[StateDict]) -> None:
    if isinstance(tuned, str | bytes) or not isinstance(tuned, Sequence):
        raise TypeError(f"{OP}: tuned must be a sequence of state dicts, got {type(tuned).__name__}")
    if not 1 <= len(tuned) <= check.MAX_MODELS:
        raise ValueError(f"{OP}: tuned must hold 1 to {check.MAX_MODELS} models, got {len(tuned)}")
    named = [("base", base)] if base is not None else []
    for title, model in (*named, *((f"tuned[{i}]", model) for i, model in enumerate(tuned))):
        if not isinstance(model, Mapping):
            raise TypeError(
                f"{OP}: {title} must be a mapping of names to tensors, got {type(model).__name__}"
            )


def _check_names(models: Sequence[StateDict], titles: Sequence[str]) -> None:
    for model, title in zip(models[1:], titles[1:], strict=True):
        if missing := [name for name in models[0] if name not in model]:
            raise ValueError(
                f"merge_state_dicts: {title} lacks {len(missing)} tensors of {titles[0]}: {shown(missing[0])}"
            )
        if extra := [name for name in model if name not in models[0]]:
            raise ValueError(
                f"merge_state_dicts: {title} has {len(extra)} tensors that {titles[0]} lacks: "
                f"{shown(extra[0])}"
            )


def _check_tensors(name: str, tensors: Sequence[torch.Tensor], titles: Sequence[str]) -> None:
    first = tensors[0]
    for tensor, title in zip(tensors, titles, strict=True):
        where = f"merge_state_dicts: tensor {shown(name)}: {title}"
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{where} must be a tensor, got {type(tensor).__name__}")
        if tensor.shape != first.shape:
            raise ValueError(f"{where} must have shape {list(first.shape)}, got {list(tensor.shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{where} must be on {first.device}, got {tensor.device}")
        if (tensor.dtype in MERGEABLE) != (first.dtype in MERGEABLE):
            raise ValueError(
                f"{where} is {tensor.dtype}, {titles[0]} is {first.dtype}: they cannot be averaged"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{where} must be contiguous, got strides {list(tensor.stride())}")


def _merge(row: Method, p: Params, tensors: Sequence[torch.Tensor], has_base: bool) -> torch.Tensor:
    common = reduce(torch.promote_types, (t.dtype for t in tensors))
    flat = [
        t.detach().view(-1).to(common) for t in tensors
    ]  # widening is exact, and no copy where dtypes agree
    out = torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
    if out.numel():
        merge_whole(row, p, out.view(-1), flat[0] if has_base else None, flat[1:] if has_base else flat)
    return out


def _copied(name: str, tensors: Sequence[torch.Tensor], titles: Sequence[str]) -> torch.Tensor:
    for tensor, title in zip(tensors[1:], titles[1:], strict=True):
        if tensor.dtype != tensors[0].dtype or not torch.equal(_bytes(tensor), _bytes(tensors[0])):
            raise ValueError(
                f"merge_state_dicts: tensor {shown(name)} ({tensors[0].dtype}) is copied, not averaged, and "
                f"differs between {titles[0]} and {title}"
            )
    return tensors[0].detach().clone()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
