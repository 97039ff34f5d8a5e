"""What a recipe may write for one parameter, and its value for one tensor: number, gradient, filters.

The forms are mergekit's. ``read`` turns one written scalar into the parameter's value and raises ValueError,
so a setting is checked in full when the recipe is read and cannot fail later.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pykernels.methods import REQUIRED, Method

MISSING: Any = object()
"""No rule of a setting applies to the tensor: the next scope decides."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "tie": ("index", "keep"),
    "elect": ("weighted", "plain"),
    "rescale": ("density", "l1"),
    "normalize": ("count",),
}
"""The words that a parameter accepts; ``rescale`` and ``normalize`` accept true and false as well."""

RANGES: Mapping[str, tuple[float, float]] = {"density": (0.0, 1.0)}
_FLOAT32_MAX = 3.4028234663852886e38

Read = Callable[[Any], Any]


def reader(method: Method, name: str) -> Read:
    """The function that reads one written scalar of parameter ``name`` of ``method``."""
    default = {**method.model_parameters, **method.parameters}[name]
    words = CHOICES.get(name, ())
    if name == "normalize" and "elect" not in method.parameters:
        words = ()  # "count" counts those who agree, and without an election nobody does
    if name == "rescale" and default is None:
        return _no_rescale
    if name == "rescale":
        return lambda raw: raw if raw in words else ("density" if _flag(raw, words) else None)
    if isinstance(default, bool):
        return lambda raw: raw if isinstance(raw, str) and raw in words else _flag(raw, words)
    if words:
        return lambda raw: _word(raw, words)
    if default is REQUIRED or isinstance(default, float):
        low, high = RANGES.get(name, (-_FLOAT32_MAX, _FLOAT32_MAX))
        return lambda raw: _number(raw, low, high)
    raise TypeError(f"parameter {name} of {method.name} has a default of an unknown kind: {default!r}")


def check(setting: Any, where: str, read: Read) -> None:
    """Check every scalar of a setting as written; raises ValueError naming the place inside it."""
    for place, scalar in _scalars(setting, where):
        try:
            read(scalar)
        except ValueError as e:
            raise ValueError(f"{place}: {e}") from None


def evaluate(setting: Any, tensor: str, t: float, read: Read) -> Any:
    """The value for one tensor, or MISSING. ``t`` runs from 0 at the first layer to 1 at the last."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return read(setting)
    if isinstance(setting[0], Mapping):
        for rule in setting:
            wanted = rule.get("filter")
            if wanted is None or wanted == "*" or wanted in tensor:
                return evaluate(rule["value"], tensor, t, read)
        return MISSING
    values = [read(v) for v in setting]
    at = t * (len(values) - 1)
    if not all(isinstance(v, float) for v in values):
        return values[int(at)]
    i = int(at)
    j = min(len(values) - 1, i + 1)
    return (1 - (at - i)) * values[i] + (at - i) * values[j]


def filters(setting: Any) -> Iterator[str]:
    """The substrings that a setting filters tensor names by."""
    for rule in (
        [setting] if isinstance(setting, Mapping) else setting if isinstance(setting, list | tuple) else []
    ):
        if isinstance(rule, Mapping) and rule.get("filter") not in (None, "*"):
            yield rule["filter"]


def known(got: str, names: Iterable[str]) -> str:
    """``did you mean x? Known: x, y``: the end of every message about an unknown name."""
    listed = sorted(names)
    close = difflib.get_close_matches(got, listed, 1)
    return (f"did you mean {close[0]}? " if close else "") + f"Known: {', '.join(listed) or 'none'}"


def shown(value: Any) -> str:
    """A value from a file as it may be printed: escaped, and cut when it is long."""
    text = (
        repr(value)
        if isinstance(value, str | int | float | bool | None | list | tuple | dict)
        else str(type(value))
    )
    return text if len(text) <= 120 else text[:117] + "..."


def _scalars(setting: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(setting, Mapping):
        yield from _rule(setting, where)
    elif isinstance(setting, list | tuple):
        if not setting:
            raise ValueError(f"{where}: an empty list says nothing")
        rules = [isinstance(e, Mapping) for e in setting]
        if any(rules) and not all(rules):
            raise ValueError(f"{where}: a list holds either values over the layers or filters, not both")
        for i, e in enumerate(setting):
            if rules[i]:
                yield from _rule(e, f"{where}[{i}]")
            else:
                yield f"{where}[{i}]", e
    else:
        yield where, setting


def _rule(rule: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key in rule:
        if key not in ("filter", "value"):
            raise ValueError(f"{where}: unknown key {shown(key)}; {known(str(key), ('filter', 'value'))}")
    if "value" not in rule:
        raise ValueError(f"{where}: a filter needs a value")
    if not isinstance(rule.get("filter"), str | None):
        raise ValueError(f"{where}.filter: must be text, got {shown(rule['filter'])}")
    value = rule["value"]
    if isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and any(isinstance(e, Mapping) for e in value)
    ):
        raise ValueError(f"{where}.value: a filter may hold a value or a gradient, not another filter")
    yield from _scalars(value, f"{where}.value")


def _flag(raw: Any, words: tuple[str, ...]) -> bool:
    if isinstance(raw, bool | int | float) and raw in (0, 1):
        return bool(raw)
    raise ValueError(f"must be {' or '.join(('true', 'false', *words))}, got {shown(raw)}")


def _no_rescale(raw: Any) -> None:
    if not isinstance(raw, bool | int | float) or raw != 0:
        raise ValueError(f"must be false, as only the dare methods rescale here, got {shown(raw)}")


def _word(raw: Any, words: tuple[str, ...]) -> str:
    if isinstance(raw, str) and raw in words:
        return raw
    raise ValueError(f"must be {' or '.join(words)}, got {shown(raw)}")


def _number(raw: Any, low: float, high: float) -> float:
    # YAML 1.1 reads 1e-3 as text; mergekit takes it as the number, and so do we.
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError(f"must be a number, got {shown(raw)}")
    try:
        value = float(raw)
    except (ValueError, OverflowError):
        raise ValueError(f"must be a number, got {shown(raw)}") from None
    if not math.isfinite(value) or not low <= value <= high:
        span = f"between {low:g} and {high:g}" if high != _FLOAT32_MAX else "finite in float32"
        raise ValueError(f"must be {span}, got {shown(raw)}")
    return value
