"""Checkpoints on disk: which files make a model and the rules that they must meet together.

Everything that headers and index show is found here, before a tensor is read or an output byte is written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from pykernels.engine.header import header_bytes
from pykernels.engine.index import read_index
from pykernels.engine.shard import FileIdentity, TensorInfo, inside, open_regular, read_shard
from pykernels.engine.strict_json import FileError, shown

__all__ = [
    "MERGEABLE", "TORCH_DTYPE", "Checkpoint", "FileError", "FileIdentity", "TensorInfo", "header_bytes",
    "inside", "open_checkpoint", "open_regular", "read_shard", "resolve_model", "shown",
]  # fmt: skip

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MERGEABLE = ("F64", "F32", "F16", "BF16")
"""dtypes that a merge may average."""

TORCH_DTYPE: dict[str, torch.dtype] = {
    # BOOL is read as bytes: a file may hold 2 or 255, which is no bool to a compiler.
    "BOOL": torch.uint8, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose headers are valid. ``files`` has an identity for every path in ``tensors``."""

    path: Path
    tensors: dict[str, TensorInfo]
    files: dict[str, FileIdentity]
    metadata: dict[str, str]
    warnings: list[str]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a model directory: ``model.safetensors``, or an index and its shards.

    Raises FileError, naming file, tensor and sizes: for malformed headers, shards outside the directory,
    tensors that are listed twice or nowhere, gaps in the numbering.
    """
    path = Path(path)
    if not path.is_dir():
        advice = "; give the directory that holds it" if path.is_file() else ""
        raise FileError(f"{shown(path)}: not a model directory{advice}")
    index, single = path / INDEX, path / SINGLE
    if os.path.lexists(index):
        return _open_sharded(path, index)
    if os.path.lexists(single):
        return _open_single(path, single)
    raise FileError(f"{shown(path)}: holds neither {SINGLE} nor {INDEX}{_what_else(path)}")


def _what_else(path: Path) -> str:
    others = sorted(
        p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf")
    )
    if not others:
        return ""
    if any(not name.endswith((".safetensors", ".gguf")) for name in others):
        return (
            f", only {shown(', '.join(others))}: pickled weights are never loaded; "
            "convert them with save_pretrained(..., safe_serialization=True) where you trust them"
        )
    return f", only {shown(', '.join(others))}"


def _open_single(path: Path, single: Path) -> Checkpoint:
    if not inside(path, single):
        raise FileError(
            f"{shown(single)}: leads out of the model directory, to {shown(os.path.realpath(single))}"
        )
    tensors, metadata, identity = read_shard(single)
    warnings = [_nul(info) for info in tensors.values() if "\0" in info.name]
    return Checkpoint(path, tensors, {str(single): identity}, metadata, warnings)


def _nul(info: TensorInfo) -> str:
    return f"{info.file}: the name of tensor {shown(info.name)} holds a NUL character"


def _open_sharded(path: Path, index: Path) -> Checkpoint:
    weight_map, total_size = read_index(path, index)
    warnings: list[str] = []
    files: dict[str, FileIdentity] = {}
    on_disk: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(weight_map.values()):
        tensors, extra, identity = read_shard(path / shard)
        if twice := next(iter(tensors.keys() & on_disk.keys()), None):
            raise FileError(
                f"{shown(index)}: tensor {shown(twice)} is in two shards, "
                f"{shown(on_disk[twice].file)} and {shown(path / shard)}"
            )
        on_disk.update(tensors)
        metadata.update(extra)
        files[str(path / shard)] = identity
    chosen = {}
    for name, shard in weight_map.items():
        info = on_disk.get(name)
        if info is None or info.file != str(path / shard):
            where = f"; it is in {shown(info.file)}" if info else ""
            raise FileError(f"{shown(index)}: tensor {shown(name)} is not in its shard {shown(shard)}{where}")
        chosen[name] = info
    warnings += [_nul(info) for info in chosen.values() if "\0" in info.name]
    warnings += _left_out(path, index, on_disk, chosen)
    size = sum(info.end - info.start for info in chosen.values())
    if total_size is not None and total_size != size:
        warnings.append(
            f"{shown(index)}: total_size is {shown(total_size)}, the listed tensors take {size} bytes"
        )
    return Checkpoint(path, chosen, files, metadata, warnings)


def _left_out(
    path: Path, index: Path, on_disk: dict[str, TensorInfo], chosen: dict[str, TensorInfo]
) -> list[str]:
    warnings = []
    if unlisted := [info for name, info in on_disk.items() if name not in chosen]:
        names = ", ".join(f"{shown(info.name)} in {shown(info.file)}" for info in unlisted[:3])
        warnings.append(
            f"{shown(index)}: {len(unlisted)} tensors on disk are not listed and not read: {names}"
        )
    if os.path.lexists(path / SINGLE) and str(path / SINGLE) not in {info.file for info in chosen.values()}:
        warnings.append(f"{shown(path)}: holds both {INDEX} and {SINGLE}; the index is read, {SINGLE} is not")
    return warnings


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_WANTED = ["*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "vocab.*", "merges.txt"]


def resolve_model(name: str, *, allow_download: bool = False) -> Path:
    """The directory of a model: ``name`` itself, or a hub id ("org/name[@revision]") in the local cache.

    The path is absolute: a record of a merge is read from other working directories too. Nothing is
    downloaded unless ``allow_download``. Raises FileError when there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise FileError(f"{shown(name)}: a model is a directory, this is a file")
    if not _HUB_ID.fullmatch(name):
        raise FileError(f"{shown(name)}: no such directory, and not a hub id such as org/name")
    from huggingface_hub import snapshot_download  # takes 0.1 s to import, and directories need none of it

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                local_files_only=not allow_download,
                allow_patterns=_WANTED,
            )
        )
    except (
        Exception
    ) as error:  # the hub's own errors, the network's and the file system's all mean the same here
        advice = "" if allow_download else "; allow the download (--allow-download) or give a directory"
        raise FileError(
            f"{shown(name)}: no such directory, and not found in the local Hugging Face cache{advice} "
            f"({type(error).__name__})"
        ) from error
