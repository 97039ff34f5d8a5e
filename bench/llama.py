"""Checkpoints in the layout of a Llama model, made for measuring: real shapes and names, random weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Layout:
    """Sizes of the model; the defaults give 0.57 GB in bfloat16.

    ``key_value``: rows of the key and value projections, as many as ``hidden`` unless heads share them.
    """

    hidden: int = 2048
    layers: int = 3
    intermediate: int = 5632
    vocabulary: int = 32000
    key_value: int | None = None

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Tensor names and shapes, embeddings untied."""
        h, i, kv = self.hidden, self.intermediate, self.key_value or self.hidden
        yield "model.embed_tokens.weight", (self.vocabulary, h)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            for p, rows in zip("qkvo", (h, kv, kv, h), strict=True):
                yield f"{at}.self_attn.{p}_proj.weight", (rows, h)
            yield from ((f"{at}.mlp.{p}_proj.weight", (i, h)) for p in ("gate", "up"))
            yield f"{at}.mlp.down_proj.weight", (h, i)
            yield from ((f"{at}.{p}_layernorm.weight", (h,)) for p in ("input", "post_attention"))
        yield "model.norm.weight", (h,)
        yield "lm_head.weight", (self.vocabulary, h)

    @property
    def nbytes(self) -> int:
        """Bytes of one model's tensors in bfloat16."""
        return 2 * sum(math.prod(shape) for _, shape in self.shapes())

    def config(self) -> dict[str, object]:
        """What config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": (self.key_value or self.hidden) // 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


LLAMA_8B = Layout(hidden=4096, layers=32, intermediate=14336, vocabulary=128256, key_value=1024)
"""8.03 G parameters: Llama 3's shapes at 8B."""


def write(folder: Path, layout: Layout, *, tuned: int = 3, seed: int = 0) -> list[Path]:
    """Write ``base`` and ``tuned0``.. under ``folder``; deltas are Student-t with 4 degrees, rms 1e-3.

    Folders that are complete already are kept. Returns the paths, the base first.
    """
    paths = [folder / name for name in ("base", *(f"tuned{i}" for i in range(tuned)))]
    for model, path in enumerate(paths):
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: _tensor(shape, base_seed=seed * 1000 + at, tuned=model)
            for at, (name, shape) in enumerate(layout.shapes())
        }
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(layout.config(), indent=2))
    os.sync()  # or the write-back of gigabytes goes on under whatever is timed next
    return paths


def _tensor(shape: tuple[int, ...], *, base_seed: int, tuned: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(base_seed)
    base = torch.randn(shape, generator=random).mul_(0.02).bfloat16()
    if tuned == 0:
        return base
    random.manual_seed(base_seed + 10_000_019 * tuned)
    chi = torch.rand(shape, generator=random).log_().add_(torch.rand(shape, generator=random).log_())
    delta = torch.randn(shape, generator=random).div_(chi.mul_(-0.5).clamp_(min=1e-6).sqrt_())
    return delta.mul_(1e-3 / math.sqrt(2)).add_(base).bfloat16()
