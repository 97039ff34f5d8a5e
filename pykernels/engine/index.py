"""The index of a sharded model: which shard holds which tensor, and which names a shard may have."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pykernels.engine.shard import inside, open_regular, read_exactly
from pykernels.engine.strict_json import FileError, shown, strict_json

MAX_INDEX = 100_000_000


def read_index(path: Path, index: Path) -> tuple[dict[str, str], object]:
    """``weight_map`` (tensor -> shard, checked) and ``metadata.total_size`` as written. Raises FileError."""
    name = shown(index, 300)
    if not inside(path, index):
        raise FileError(f"{name}: leads out of the model directory, to {shown(os.path.realpath(index))}")
    with open_regular(index) as handle:
        size = os.fstat(handle).st_size
        if size > MAX_INDEX:
            raise FileError(f"{name}: {size} bytes, the limit for an index is {MAX_INDEX}")
        raw = read_exactly(name, handle, 0, size)
    content = strict_json(raw, f"{name}: index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(
            f"{name}: weight_map must be an object that names a shard per tensor and is not empty"
        )
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise FileError(
                f"{name}: weight_map[{shown(tensor)}] must be the name of a shard, got {shown(shard)}"
            )
    for shard in dict.fromkeys(weight_map.values()):
        _check_shard_name(name, path, shard)
    _check_numbering(name, set(weight_map.values()))
    extra = content.get("metadata")
    return weight_map, extra.get("total_size") if isinstance(extra, dict) else None


def _check_shard_name(index: str, path: Path, shard: str) -> None:
    where = f"{index}: shard name {shown(shard)}"
    if "://" in shard:
        raise FileError(f"{where}: is a URL; shards are files of the model directory")
    if "\\" in shard or "\0" in shard:
        raise FileError(f"{where}: must not hold a backslash or NUL")
    if shard.startswith("/"):
        raise FileError(f"{where}: is an absolute path; it must stay inside the model directory")
    if not shard.endswith(".safetensors"):
        raise FileError(f"{where}: must end in .safetensors (no other format is read through an index)")
    parts = shard.split("/")
    if any(part in ("", ".", "..", ".safetensors") for part in parts):
        raise FileError(f"{where}: must be a plain path that stays inside the model directory")
    if len(os.fsencode(parts[-1])) > 255 or len(shard) > 4000:
        raise FileError(f"{where}: is too long for a file name")
    if not inside(path, path / shard):
        raise FileError(
            f"{where}: leads out of the model directory, to {shown(os.path.realpath(path / shard), 300)}"
        )


_NUMBERED = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors")


def _check_numbering(index: str, shards: set[str]) -> None:
    series: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, shards)):
        series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in series.items():
        if len(numbers) < count:
            lost = next(n for n in range(1, count + 1) if n not in numbers)
            raise FileError(
                f"{index}: shard {lost} of {count} of {shown(stem)} is missing: "
                f"the index names {len(numbers)} of {count} shards"
            )
