"""Adapters written by hand in PEFT's format, for tests that need none of PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints import write_model

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (101, 64),
    "model.layers.0.q_proj.weight": (67, 131),
    "model.layers.0.q_proj.bias": (67,),
    "model.layers.1.q_proj.weight": (33, 64),
    "model.layers.1.experts.up_proj": (3, 50, 40),
    "model.norm.weight": (64,),
}
"""Rows longer and shorter than a block of 4096 elements is cut into, and a stack [experts, in, out]."""


def write_base(path: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> None:
    """A model of SHAPES whose head is its own."""
    random = torch.Generator().manual_seed(5)
    state = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}
    state["model.steps"] = torch.arange(3)
    write_model(path, state, **{"tie_word_embeddings": False, **config})


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter of ``tensors`` (keys without PEFT's prefix); ``config`` over CONFIG. Returns the path."""
    path.mkdir(parents=True)
    held = {PREFIX + key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return path


def factors(module: str, rows: int, columns: int, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random A and B of a module."""
    random = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=random),
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=random),
    }


def write_mixed(path: Path, seed: int = 0) -> Path:
    """An adapter that adds to rows, and with the embedding to columns, of the stored matrices."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        **factors("model.layers.0.q_proj", 67, 131, seed=seed),
        **factors("model.layers.1.q_proj", 33, 64, seed=seed + 1),
        "model.embed_tokens.lora_embedding_A": torch.randn(4, 101, generator=random),
        "model.embed_tokens.lora_embedding_B": torch.randn(64, 4, generator=random),
    }
    return write_adapter(path, tensors)


def write_experts(path: Path, seed: int = 0) -> Path:
    """An adapter of the stack of experts."""
    tensors = factors("model.layers.1.experts", 40, 50, rank=4 * 3, seed=seed)
    return write_adapter(path, tensors, target_modules=[], target_parameters=["experts.up_proj"])
