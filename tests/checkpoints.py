"""Small models on disk and the merges of them: what the tests of the engine share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"normalize": True}},
    "task_arithmetic": {"parameters": {"lambda": 0.7}},
    "ties": {"density": 0.3, "parameters": {"lambda": 0.9}},
    "dare_linear": {"density": 0.5, "seed": 11},
    "dare_ties": {"density": 0.6, "parameters": {"rescale": "l1", "normalize": True}, "seed": 12},
}
"""Parameters that take every method through each of its passes."""

WEIGHTS = (0.5, 0.3, 0.4)
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (301, 64),
    "model.layers.0.mlp.down_proj.weight": (257, 311),
    "model.layers.0.input_layernorm.weight": (77,),
    "model.layers.1.mlp.down_proj.weight": (129, 33),
    "model.layers.1.empty": (0, 3),
    "model.norm.weight": (1,),
}


def write_models(home: Path, dtype: torch.dtype = torch.bfloat16, tuned: int = 3) -> None:
    """``home/base`` and ``home/t0`` ... of SHAPES, with integer and boolean tensors that are equal in all."""
    generator = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for i in range(tuned + 1):
        state = {
            name: (tensor + (0.02 * torch.randn(tensor.shape, generator=generator) if i else 0)).to(dtype)
            for name, tensor in base.items()
        }
        state["model.position_ids"] = torch.arange(5)
        state["model.flags"] = torch.tensor([True, False, True])
        write_model(home / (f"t{i - 1}" if i else "base"), state)


def write_model(path: Path, state: dict[str, torch.Tensor], **config: Any) -> None:
    """One model directory with the small files that come with a real one."""
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32", **config}))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "notes.txt").write_text("not copied")


def recipe(home: Path, method: str, *, tuned: int = 3, **keys: Any) -> dict[str, Any]:
    """A recipe over ``write_models``' directories; ``keys`` go to its top level."""
    row = METHODS[method]
    models = []
    for i in range(tuned):
        parameters = {"weight": WEIGHTS[i % 3]}
        if "density" in row:
            parameters["density"] = row["density"]
        models.append({"model": str(home / f"t{i}"), "parameters": parameters})
    made = {"merge_method": method, "models": models, "parameters": row.get("parameters", {})}
    if method != "linear":
        made["base_model"] = str(home / "base")
    if "seed" in row:
        made["seed"] = row["seed"]
    return {**made, **keys}


def load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a merged directory, read by the format's own reader."""
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        state |= load_file(shard)
    return state


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, in which NaN equals NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k]))
        for k in a
    )
