"""A PEFT adapter written: both files in a hidden folder first; the config, which loads it, appears last."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pykernels.adapters.checkpoint import WEIGHTS
from pykernels.adapters.config import CONFIG
from pykernels.engine.header import header_bytes
from pykernels.engine.strict_json import FileError, shown

PREFIX = "base_model.model."
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_HIDDEN = ".pykernels-adapter"


@dataclass
class Made:
    """An adapter to write: low-rank changes by module with scaling 1, and full copies by key.

    ``ranks`` of the modules; ``tensors`` by their keys in the file, without ``base_model.model.``.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def add(self, module: str, A: torch.Tensor, B: torch.Tensor, *, embedding: bool = False) -> None:
        """A change ``B @ A`` [out, in] of a module, for a convolution with A's and B's own shapes."""
        self.ranks[module] = A.shape[0]
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        self.tensors[f"{module}.{a}"] = A.contiguous()
        self.tensors[f"{module}.{b}"] = B.contiguous()

    def config(self, **keys: Any) -> dict[str, Any]:
        """adapter_config.json with scaling 1 everywhere; ``keys`` go in as they are."""
        rank = Counter(self.ranks.values()).most_common(1)[0][0] if self.ranks else 1
        # "^", as PEFT takes "fc" for the end of "layer.fc" too
        other = {f"^{re.escape(module)}": r for module, r in sorted(self.ranks.items()) if r != rank}
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "task_type": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": other,
            "alpha_pattern": other,
            "use_rslora": False,
            "use_dora": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": sorted(self.ranks),
            "modules_to_save": None,
            **keys,
        }


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """OUT must be new or an empty directory, and none of the inputs. Raises FileError."""
    if any(out.resolve() == path.resolve() for path in inputs):
        raise FileError(f"{shown(out, 300)}: is an input; give another directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{shown(out, 300)}: exists and is no empty directory; give another one")


def write_adapter(out: Path, made: Made, config: Mapping[str, Any]) -> int:
    """Write the adapter ``made``; returns the bytes of its weights. Raises OSError; nothing is left then."""
    named = {PREFIX + key: tensor for key, tensor in sorted(made.tensors.items())}
    held = [
        (name, _CODES[t.dtype], tuple(t.shape), t.numel() * t.dtype.itemsize) for name, t in named.items()
    ]
    fresh = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    hidden = out / _HIDDEN
    try:
        hidden.mkdir()
        with (hidden / WEIGHTS).open("wb") as file:
            file.write(header_bytes(held, {"format": "pt"}))
            for tensor in named.values():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (hidden / CONFIG).write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            (hidden / name).replace(out / name)
    except BaseException:
        for name in (WEIGHTS, CONFIG):
            (out / name).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if fresh and not any(out.iterdir()):
            out.rmdir()
    return sum(nbytes for *_, nbytes in held)
