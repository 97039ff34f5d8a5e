"""A module's A and B beside each other: what holds of every pair, whatever becomes of it."""

from __future__ import annotations

from typing import NoReturn

from pykernels.adapters.config import AdapterConfig
from pykernels.adapters.keys import BIAS, MAGNITUDE, A, B, Parts
from pykernels.engine.shard import TensorInfo
from pykernels.engine.strict_json import FileError, shown


def refuse(info: TensorInfo, what: str) -> NoReturn:
    """FileError naming the tensor and its file."""
    raise FileError(f"{shown(info.file, 300)}: tensor {shown(info.name)}: {what}")


def check_pair(parts: Parts, config: AdapterConfig) -> None:
    """Both factors are there and hold something; a magnitude and a bias are where the config says so.

    Raises FileError naming the tensor.
    """
    some = next(iter(parts.tensors.values()))
    for part in (A, B):
        if part not in parts.tensors:
            refuse(some, f"has no lora_{part} beside it")
    a, b = parts.tensors[A], parts.tensors[B]
    if len(a.shape) < 2 or len(b.shape) < 2 or 0 in a.shape or 0 in b.shape:
        refuse(a, f"A and B must be matrices that hold something, got {list(a.shape)}, {list(b.shape)}")
    if (MAGNITUDE in parts.tensors) != config.use_dora:
        said = str(config.use_dora).lower()
        refuse(parts.tensors.get(MAGNITUDE, a), f"use_dora is {said}, and the magnitude's tensor says not")
    if (BIAS in parts.tensors) != config.lora_bias and not parts.embedding:
        said = str(config.lora_bias).lower()
        refuse(parts.tensors.get(BIAS, b), f"lora_bias is {said}, and the bias of B says not")
