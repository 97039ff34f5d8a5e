"""Model directories of small tensors for the tests of plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pykernels.engine.plan import Output, Plan, PlanError, make_plan
from pykernels.engine.recipe import read_recipe

Shapes = Mapping[str, tuple[int, ...]]
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA: Shapes = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.mlp.weight": (4, 4),
    "model.layers.1.mlp.weight": (4, 4),
    "model.layers.2.mlp.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}
NO_HEAD: Shapes = {k: v for k, v in LLAMA.items() if k != "lm_head.weight"}


class Zoo:
    """Model directories of small tensors, and plans over them."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def add(
        self, name: str, shapes: Shapes, config: dict[str, object] | None = None, **dtypes: torch.dtype
    ) -> None:
        """Write a model; ``dtypes``: one for all as ``default``, or by the last but one part of a name."""
        path = self.home / name
        path.mkdir()
        default = dtypes.get("default", torch.bfloat16)
        tensors = {k: torch.zeros(v, dtype=dtypes.get(k.split(".")[-2], default)) for k, v in shapes.items()}
        save_file(tensors, path / "model.safetensors")
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))

    def recipe(self, method: str, base: str | None, tuned: list[str], **keys: object) -> dict[str, object]:
        """A recipe over models of the zoo with weight 1 unless ``parameters`` are given."""
        top = {"base_model": str(self.home / base)} if base else {}
        models = [{"model": str(self.home / t)} for t in tuned]
        return {"merge_method": method, **top, "models": models, "parameters": {"weight": 1}, **keys}

    def plan(
        self, method: str = "ties", base: str | None = "base", tuned: str = "a b", **keys: object
    ) -> Plan:
        """Plan a merge; ``shard_size`` and ``seed`` go to make_plan, the other keys into the recipe."""
        options = {k: keys.pop(k) for k in ("shard_size", "seed") if k in keys}
        recipe = read_recipe(self.recipe(method, base, tuned.split(), **keys))
        return make_plan(recipe, **options)  # type: ignore[arg-type]

    def refused(self, *args: str, **keys: object) -> str:
        """The text of the refusal, with the zoo's own path taken out."""
        with pytest.raises(PlanError) as caught:
            self.plan(*args, **keys)
        return str(caught.value).replace(f"{self.home}/", "")

    def notes(self, *args: str, **keys: object) -> str:
        """All notes of a plan, one a line."""
        return "\n".join(self.plan(*args, **keys).notes).replace(f"{self.home}/", "")


def by_name(plan: Plan) -> dict[str, Output]:
    return {o.name: o for o in plan.outputs}
