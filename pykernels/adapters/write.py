"""A PEFT adapter written: both files in a hidden folder first; the config, which loads it, appears last.

Traffic: every tensor is read once from memory and written once; both files and their folder are on the disk
before the first final name appears.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pykernels.adapters.checkpoint import WEIGHTS
from pykernels.adapters.config import CONFIG
from pykernels.engine.commit import sync, workplace
from pykernels.engine.header import header_bytes
from pykernels.engine.mapped import Inputs
from pykernels.engine.preflight import HIDDEN, check_room
from pykernels.engine.strict_json import FileError, shown

PREFIX = "base_model.model."
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FOLDER = "adapter"
"""Mark of the hidden folder that an adapter is made in."""


@dataclass
class Made:
    """An adapter to write: low-rank changes by module with scaling 1, and full copies by key.

    ``ranks`` of the modules and of ``parameters``, which are stacked ones of modules; ``tensors`` by their
    keys in the file, without ``base_model.model.``.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    def add(self, module: str, A: torch.Tensor, B: torch.Tensor, *, embedding: bool = False) -> None:
        """A change ``B @ A`` [out, in] of a module, for a convolution with A's and B's own shapes."""
        self.ranks[module] = A.shape[0]
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        self.tensors[f"{module}.{a}"] = A.contiguous()
        self.tensors[f"{module}.{b}"] = B.contiguous()

    def add_parameter(
        self, module: str, parameter: str, A: torch.Tensor, B: torch.Tensor, depth: int
    ) -> None:
        """Changes of the experts of a stacked parameter, A [experts, r, in] and B [out, r, experts]."""
        name = f"{module}.{parameter}"
        self.ranks[name] = A.shape[1]
        self.parameters.append(name)
        path = module + ".base_layer" * depth
        self.tensors[f"{path}.lora_A.weight"] = A.flatten(0, 1).contiguous()
        self.tensors[f"{path}.lora_B.weight"] = B.flatten(1, 2).contiguous()

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
            "target_modules": sorted(self.ranks.keys() - set(self.parameters)),
            "target_parameters": sorted(self.parameters) or None,
            "modules_to_save": None,
            **keys,
        }


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """OUT must be new or an empty directory, and none of the inputs. Raises FileError.

    What a killed run left in its hidden folder does not count; the next run takes it away.
    """
    if any(out.resolve() == path.resolve() for path in inputs):
        raise FileError(f"{shown(out, 300)}: is an input; give another directory")
    if os.path.lexists(out) and (
        not out.is_dir() or any(not path.name.startswith(HIDDEN) for path in out.iterdir())
    ):
        raise FileError(f"{shown(out, 300)}: exists and is no empty directory; give another one")


def write_adapter(out: Path, made: Made, config: Mapping[str, Any], inputs: Inputs) -> int:
    """Write the adapter ``made`` of ``inputs``; returns the bytes of its weights.

    Returns when everything is on the disk.

    Raises:
        ValueError: OutputError where the file system lacks room, before anything is written, or while another
            run writes into ``out``; FileError when an input changed meanwhile.
        OSError: writing failed; it names the file. Neither file has its final name then.
    """
    named = {PREFIX + key: tensor for key, tensor in sorted(made.tensors.items())}
    held = [
        (name, _CODES[t.dtype], tuple(t.shape), t.numel() * t.dtype.itemsize) for name, t in named.items()
    ]
    nbytes = sum(size for *_, size in held)
    header = header_bytes(held, {"format": "pt"})
    text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    check_room(out, nbytes + len(header) + len(text))
    with workplace(out, _FOLDER) as folder:
        _write(folder / WEIGHTS, (header, *(_bytes(tensor) for tensor in named.values())))
        _write(folder / CONFIG, (text,))
        inputs.check()
        _publish(folder, out)
    return nbytes


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """A new file of these bytes, on the disk. Raises OSError naming it and where it ended."""
    position = 0
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for part in parts:
                start = 0
                while start < len(part):
                    start += os.write(handle, part[start:])
                position += len(part)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} after byte {position}", str(path)) from error


def _publish(folder: Path, out: Path) -> None:
    """Both files get their final names, the config last; none has one if this fails."""
    sync(folder)
    try:
        (folder / WEIGHTS).replace(out / WEIGHTS)
        sync(out)
        (folder / CONFIG).replace(out / CONFIG)
        sync(out)
        sync(out.absolute().parent)
    except BaseException:
        for name in (CONFIG, WEIGHTS):
            (out / name).unlink(missing_ok=True)
        raise
