"""mergekit's YAML to a checked recipe: what to merge, how, and every parameter's value for every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from pykernels.engine import strict_yaml
from pykernels.engine.settings import MISSING, check, evaluate, known, reader, shown
from pykernels.methods import METHODS, REQUIRED, Method, Params

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""Output types by their recipe name, with the safetensors code."""

MAX_MODELS = 64
MAX_ADAPTERS = 64
MAX_SEED = 2**64 - 1
_UNSUPPORTED = ("slices", "modules", "tokenizer", "chat_template")
_EITHER_PLACE = ("scope", "seed")  # top level is their place; under parameters they mean the same


class RecipeError(ValueError):
    """A recipe that cannot be run; the text names the file, the key, the value and what is known."""


class AdapterEntry(BaseModel):
    """One entry of a model's ``adapters``: a directory or hub id; ``weight`` multiplies its scaling."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    adapter: str = Field(min_length=1)
    weight: float = Field(default=1.0, allow_inf_nan=False)


class Reference(NamedTuple):
    """A model of a merge: name in messages, directory or hub id, and the (adapter, weight) merged into it."""

    name: str
    model: str
    adapters: tuple[tuple[str, float], ...]

    @staticmethod
    def of(text: str) -> Reference:
        """mergekit's ``model+adapter``; several are merged in their order. A directory is a model."""
        parts = text.split("+")
        whole = next((n for n in range(len(parts), 1, -1) if Path("+".join(parts[:n])).is_dir()), 1)
        return Reference(text, "+".join(parts[:whole]), tuple((name, 1.0) for name in parts[whole:]))


class ModelEntry(BaseModel):
    """One entry of ``models``: a directory or hub id, its own parameters, adapters merged into it first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: str = Field(min_length=1)
    adapters: list[AdapterEntry] | None = Field(default=None, max_length=MAX_ADAPTERS)
    parameters: dict[str, Any] = {}

    @property
    def reference(self) -> Reference:
        """What is read for it."""
        if not self.adapters:
            return Reference.of(self.model)
        added = tuple((a.adapter, a.weight) for a in self.adapters)
        told = "".join(f"+{name}" + (f"*{weight:g}" if weight != 1 else "") for name, weight in added)
        return Reference(self.model + told, self.model, added)


class Recipe(BaseModel):
    """A recipe as written, checked in full: every scalar of every parameter has the right type and range."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    merge_method: str
    base_model: str | None = Field(default=None, min_length=1)
    models: list[ModelEntry] = Field(min_length=1, max_length=MAX_MODELS)
    parameters: dict[str, Any] = {}
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    scope: Literal["tensor", "model"] = "tensor"
    rounding: Literal["once", "peft"] | None = None
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    _label: str = PrivateAttr(default="recipe")

    @property
    def label(self) -> str:
        """What messages call this recipe: its file's name where it has one."""
        return self._label

    @property
    def method(self) -> Method:
        """The row of the method table."""
        return METHODS[self.merge_method]

    @property
    def members(self) -> tuple[int, ...]:
        """Indices into ``models`` of those merged; a base has no delta and is left out, as in mergekit."""
        skip = self.base_model if self.method.needs_base else None
        return tuple(i for i, m in enumerate(self.models) if m.reference.name != skip)

    @property
    def references(self) -> list[tuple[str, Reference]]:
        """Every model with its place in the recipe; the base comes last where it is not among ``models``."""
        found = [(f"models[{i}].model", m.reference) for i, m in enumerate(self.models)]
        if self.base_model is not None and self.base_model not in [r.name for _, r in found]:
            found.append(("base_model", Reference.of(self.base_model)))
        return found

    @property
    def output_dtype(self) -> str | None:
        """safetensors code of the output type, or None: the type that the tensor has in the base."""
        name = self.out_dtype or self.dtype
        return None if name is None else DTYPES[name.removeprefix("torch.")]

    def with_seed(self, seed: int | None) -> Recipe:
        """The same recipe with another seed; None keeps its own."""
        return self if seed is None else read_recipe({**self.as_dict(), "seed": seed}, self._label)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data in the recipe's own keys; ``read_recipe`` takes it back."""
        return self.model_dump(mode="json", exclude_none=True)

    def resolve(self, tensor: str, layer: int | None, num_layers: int) -> Params:
        """The parameters of one tensor; ``layer`` is None outside the layers, where gradients start.

        Raises RecipeError when a required parameter has no value for this tensor.
        """
        t = 0.0 if layer is None else 1.0 if num_layers < 2 else min(1.0, layer / (num_layers - 1))
        p: Params = {"seed": self.seed, "name": tensor}
        for name, default in self.method.parameters.items():
            p[name] = self._value(name, default, tensor, t, None)
        for name, default in self.method.model_parameters.items():
            p[name] = [self._value(name, default, tensor, t, i) for i in self.members]
        return p

    def _value(self, name: str, default: Any, tensor: str, t: float, model: int | None) -> Any:
        read = reader(self.method, name)
        scopes = [self.parameters] if model is None else [self.models[model].parameters, self.parameters]
        for scope in scopes:
            if name in scope and (value := evaluate(scope[name], tensor, t, read)) is not MISSING:
                return value
        if default is REQUIRED:
            where = f"models[{model}].parameters.{name} ({shown(self.models[model or 0].model)})"
            raise RecipeError(
                f"{self._label}: {where}: {self.merge_method} needs one for tensor {shown(tensor)}, "
                "and neither the model's nor the top-level parameters give it"
            )
        return default


def adapter_recipe(
    base: str, adapters: Sequence[str], weights: Sequence[float] = (), rounding: str = "once"
) -> Recipe:
    """The recipe that merges PEFT adapters into one model; a weight per adapter, or none for 1 each.

    Raises RecipeError.
    """
    if weights and len(weights) != len(adapters):
        raise RecipeError(f"weight: give one per adapter, {len(adapters)}, or none; got {len(weights)}")
    given = [float(weight) for weight in weights] or [1.0] * len(adapters)
    entries = [{"adapter": a, "weight": w} for a, w in zip(adapters, given, strict=True)]
    entry = {"model": base, "adapters": entries}
    return read_recipe({"merge_method": "passthrough", "models": [entry], "rounding": rounding}, "lora merge")


def read_recipe(source: str | Path | Mapping[str, Any] | Recipe, label: str | None = None) -> Recipe:
    """Read and check a recipe: a path, YAML text (with a line break or ``: ``), a mapping, or a Recipe.

    Raises RecipeError. ``label`` is what messages call the recipe; default the file's name.
    """
    if isinstance(source, Recipe):
        return source
    data: Any = source
    if isinstance(source, Path) or (isinstance(source, str) and "\n" not in source and ": " not in source):
        label = label or str(source)
        source = _read_text(Path(source), label)
    label = label or "recipe"
    if isinstance(source, str):
        try:
            data = strict_yaml.load(source)
        except ValueError as e:
            raise RecipeError(f"{label}: {e}") from None
    if not isinstance(data, Mapping):
        raise RecipeError(f"{label}: a recipe is a mapping of keys to values, got {shown(data)}")
    try:
        recipe = _build(dict(data))
        recipe._label = label
        return recipe
    except ValidationError as e:
        first = e.errors()[0]
        raise RecipeError(f"{label}: {_place(first['loc'])}: {_words(first)}") from None
    except ValueError as e:
        raise RecipeError(f"{label}: {e}") from None


def _read_text(path: Path, label: str) -> str:
    try:
        if path.is_file():
            if path.stat().st_size > strict_yaml.MAX_BYTES:
                raise RecipeError(
                    f"{label}: longer than {strict_yaml.MAX_BYTES} bytes, which no recipe needs"
                )
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise RecipeError(f"{label}: not UTF-8 text at byte {e.start}") from None
    except OSError as e:
        raise RecipeError(f"{label}: cannot be read: {e.strerror}") from None
    raise RecipeError(f"{label}: no such recipe file")


def _build(data: dict[str, Any]) -> Recipe:
    """Check the keys, then the types, then every value. Raises ValueError without the label."""
    for key in _UNSUPPORTED:
        if key in data:
            raise ValueError(
                f"{key}: not supported yet; write whole models under models, tokenizers come from the base"
            )
    _check_keys(data, Recipe.model_fields.keys() | _hoisted(), "")
    data = {k: v for k, v in data.items() if v is not None}
    if data.get("tokenizer_source", "base") != "base":
        raise ValueError(
            f"tokenizer_source: only base is supported yet, got {shown(data['tokenizer_source'])}"
        )
    _method(data.get("merge_method"))
    models = data.get("models")
    for i, entry in enumerate(models if isinstance(models, list | tuple) else ()):
        if not isinstance(entry, Mapping):
            raise ValueError(f"models[{i}]: must be a mapping with the key model, got {shown(entry)}")
        _check_keys(entry, ModelEntry.model_fields.keys(), f"models[{i}].")
    if isinstance(models, list | tuple):
        data["models"] = [{k: v for k, v in e.items() if v is not None} for e in models]
    recipe = Recipe.model_validate(_one_place(data))
    _check_models(recipe)
    _check_parameters(recipe)
    return recipe


def _check_keys(got: Mapping[Any, Any], allowed: Any, where: str) -> None:
    for key in got:
        if key not in allowed:
            raise ValueError(f"{where}{key}: unknown key; {known(str(key), allowed)}")


def _hoisted() -> set[str]:
    """Parameters of ours that may also stand at the top level."""
    return {"tie", "elect"}


def _one_place(data: dict[str, Any]) -> dict[str, Any]:
    """Accept either place: ``tie`` and ``elect`` go under parameters, ``scope`` and ``seed`` to the top."""
    given = data.get("parameters", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"parameters: must be a mapping, got {shown(given)}")
    top, parameters = dict(data), dict(given)
    for names, source, target in ((_hoisted(), top, parameters), (_EITHER_PLACE, parameters, top)):
        for name in names:
            if name in source and name in target:
                raise ValueError(f"{name}: stands at the top level and under parameters; keep one")
            if name in source:
                target[name] = source.pop(name)
    return {**top, "parameters": parameters}


def _method(name: Any) -> Method:
    if not isinstance(name, str):
        raise ValueError(
            f"merge_method: must be the name of a method, got {shown(name)}; {known('', METHODS)}"
        )
    if name not in METHODS:
        raise ValueError(f"merge_method: unknown method {shown(name)}; {known(name, METHODS)}")
    return METHODS[name]


def _check_models(recipe: Recipe) -> None:
    for where, reference in recipe.references:
        if not all((reference.model, *(name for name, _ in reference.adapters))):
            raise ValueError(f"{where}: {shown(reference.name)}: a + stands between a model and its adapters")
    first: dict[str, int] = {}
    for i, m in enumerate(recipe.models):
        name = m.reference.name
        if first.setdefault(name, i) != i:
            raise ValueError(
                f"models[{i}].model: {shown(name)} is listed twice, first as models[{first[name]}]"
            )
    if recipe.rounding is not None and not any(r.adapters for _, r in recipe.references):
        raise ValueError("rounding: is of adapters, and no model has any")
    limit = recipe.method.max_models
    if limit is not None and len(recipe.members) > limit:
        raise ValueError(f"models: {recipe.merge_method} takes {limit} model, got {len(recipe.members)}")
    if recipe.method.needs_base and recipe.base_model is None:
        raise ValueError(f"base_model: {recipe.merge_method} merges differences to a base and needs one")
    if not recipe.members:
        raise ValueError(f"models: nothing to merge besides the base {shown(recipe.base_model)}")
    for key in ("dtype", "out_dtype"):
        name = getattr(recipe, key)
        if name is not None and name.removeprefix("torch.") not in DTYPES:
            raise ValueError(f"{key}: unknown type {shown(name)}; {known(name, DTYPES)}")


def _check_parameters(recipe: Recipe) -> None:
    method = recipe.method
    both = {**method.model_parameters, **method.parameters}
    places = [("parameters", recipe.parameters, True)]
    places += [(f"models[{i}].parameters", m.parameters, False) for i, m in enumerate(recipe.models)]
    for where, settings, top in places:
        for name, setting in settings.items():
            if name not in both:
                raise ValueError(f"{where}.{name}: no parameter of {method.name}; {known(name, both)}")
            if not top and name not in method.model_parameters:
                raise ValueError(
                    f"{where}.{name}: holds for the whole merge; move it to the top-level parameters"
                )
            check(setting, f"{where}.{name}", reader(method, name))
    if recipe.scope == "model" and "tie" not in method.parameters:
        with_tie = [m.name for m in METHODS.values() if "tie" in m.parameters]
        raise ValueError(
            f"scope: model is for methods that trim by magnitude; {known(method.name, with_tie)}"
        )


_WORDS = {
    "missing": "is missing",
    "string_type": "must be text",
    "int_type": "must be an integer",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "string_too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
}
"""The checker's kinds of faults in this package's words."""


def _words(error: Any) -> str:
    context = error.get("ctx", {})
    said: str = _WORDS.get(error["type"], error["msg"]).format_map(context)
    if error["type"] == "missing":
        return said  # the input is the whole recipe then
    if error["type"] in ("too_short", "too_long"):
        return f"{said}, got {context['actual_length']}"
    return f"{said}, got {shown(error['input'])}"


def _place(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in loc).lstrip(".") or "recipe"
