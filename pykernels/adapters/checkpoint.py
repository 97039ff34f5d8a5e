"""An adapter's directory: config and header of its weights, through the engine's own strict readers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pykernels.adapters.config import AdapterConfig, read_config
from pykernels.adapters.keys import Keys, sort_keys
from pykernels.engine.files import resolve_model
from pykernels.engine.shard import FileIdentity, TensorInfo, inside, read_shard
from pykernels.engine.strict_json import FileError, shown

WEIGHTS = "adapter_model.safetensors"
LEGACY = "adapter_model.bin"
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter whose config and header are valid; ``name`` is what the user called it."""

    name: str
    path: Path
    config: AdapterConfig
    tensors: dict[str, TensorInfo]
    keys: Keys
    identity: FileIdentity

    @property
    def file(self) -> str:
        """Path of its weights."""
        return str(self.path / WEIGHTS)


def open_adapter(name: str, *, allow_download: bool = False) -> Adapter:
    """Read config and header of an adapter: a directory, or a hub id as in :func:`resolve_model`.

    Pickled weights (adapter_model.bin) are refused: a merge reads byte ranges of files, and a pickle is a
    program that ends in one big object, whatever loads it. Raises FileError, naming file and tensor.
    """
    path = resolve_model(name, allow_download=allow_download)
    config = read_config(path)
    weights = path / WEIGHTS
    if not os.path.lexists(weights):
        raise FileError(f"{shown(path, 300)}: holds no {WEIGHTS}{_instead(path)}")
    if not inside(path, weights):
        raise FileError(f"{shown(weights, 300)}: leads out of the adapter's directory")
    tensors, _, identity = read_shard(weights)
    for info in tensors.values():
        if info.dtype not in FLOATS:
            raise FileError(
                f"{shown(weights, 300)}: tensor {shown(info.name)}: {info.dtype} is no type of an adapter "
                f"({', '.join(FLOATS)})"
            )
    if not tensors:
        raise FileError(f"{shown(weights, 300)}: holds no tensors")
    return Adapter(name, path, config, tensors, sort_keys(tensors.values()), identity)


def _instead(path: Path) -> str:
    if (path / LEGACY).exists():
        return (
            f", only {LEGACY}: pickled weights are never loaded; load it in PEFT where you trust it, and "
            "save_pretrained writes safetensors"
        )
    return "; adapters that are not the default are in a folder of their name"
