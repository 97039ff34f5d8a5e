"""The small files beside the weights: config, tokenizer, chat template copied; model card, index written."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from pykernels.engine.files import TORCH_DTYPE, FileError, inside, open_regular, shown
from pykernels.engine.recipe import Reference
from pykernels.engine.units import Plan

CARD = "README.md"
INDEX = "model.safetensors.index.json"
COPIED = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "chat_template.*", "preprocessor_config.json",
)  # fmt: skip
NEVER = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".py")
"""Endings of weights and code, which no pattern may bring along."""


def write_companions(plan: Plan, folder: Path) -> list[str]:
    """Copy and write everything but weights, index and record into ``folder``. Returns the files' names.

    Raises FileError for a file that leads out of the model's directory or is not what it should be.
    """
    model = Path(plan.models[plan.config_from].path)
    names = []
    for source in sorted(model.iterdir()):
        if any(fnmatch.fnmatch(source.name, p) for p in COPIED) and source.suffix not in NEVER:
            if source.is_dir():
                continue
            if not inside(model, source):
                raise FileError(f"{shown(source, 300)}: leads out of the model directory, it is not copied")
            _copy(source, folder / source.name, plan)
            names.append(source.name)
    (folder / CARD).write_text(model_card(plan), encoding="utf-8")
    return [*names, CARD]


def _copy(source: Path, target: Path, plan: Plan) -> None:
    with open_regular(source) as handle, os.fdopen(os.dup(handle), "rb") as stream:
        if source.name == "config.json":
            try:
                config = json.load(stream)
            except (ValueError, RecursionError) as error:
                raise FileError(f"{shown(source, 300)}: is not valid JSON: {error}") from None
            if not isinstance(config, dict):
                raise FileError(f"{shown(source, 300)}: must hold an object")
            target.write_text(
                json.dumps(with_dtype(config, plan), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        else:
            with target.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)


def with_dtype(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """``config`` with the type that most merged bytes have; nested configs where they name one."""
    held: Counter[str] = Counter()
    for out in plan.outputs:
        if out.action != "copy":
            held[out.dtype] += out.nbytes
    for key, value in plan.config.items():
        config = _overridden(config, key, value)
    if not held:
        return config
    name = str(TORCH_DTYPE[held.most_common(1)[0][0]]).removeprefix("torch.")
    return {**_renamed(config, name), "torch_dtype": name}


def _overridden(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """``config`` with a key at its top, and in nested configs that have it."""
    nested = {
        name: _overridden(inner, key, value)
        for name, inner in config.items()
        if isinstance(inner, dict) and key in inner
    }
    return {**config, **nested, key: value}


def _renamed(config: dict[str, Any], name: str) -> dict[str, Any]:
    result = {}
    for key, value in config.items():
        if key in ("torch_dtype", "dtype") and isinstance(value, str | None):
            value = name
        result[key] = _renamed(value, name) if isinstance(value, dict) else value
    return result


def model_card(plan: Plan) -> str:
    """README.md of the output: what was merged, how, and the recipe to do it again."""
    from pykernels import __version__
    from pykernels.methods import METHODS

    names = [model.name for model in plan.models]
    head = {"library_name": "transformers", "tags": ["merge", "pykernels"]}
    bases = [Reference.of(name).model for name in names]
    if hub := [name for name in dict.fromkeys(bases) if not Path(name).is_dir()]:
        head["base_model"] = hub
    listed = "\n".join(
        f"- `{model.name}`{f', with {len(model.adapters)} adapter(s) merged' if model.adapters else ''}"
        for model in plan.models
    )
    recipe = yaml.safe_dump(plan.recipe, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# Merged model\n\n"
        f"Made with pykernels {__version__} by `{plan.method}` ({METHODS[plan.method].paper}), "
        f"seed {plan.seed}.\n\n"
        f"Models:\n\n{listed}\n\nRecipe:\n\n```yaml\n{recipe}```\n"
    )


def index_text(plan: Plan) -> str:
    """The index of a sharded output."""
    weight_map = {out.name: plan.shards[out.shard].name for out in sorted(plan.outputs, key=lambda o: o.name)}
    content = {"metadata": {"total_size": plan.total_size}, "weight_map": weight_map}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
