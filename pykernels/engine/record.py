"""OUT/pykernels.json: what was merged, by what, a checksum per tensor; ``verify`` and a resume read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from pykernels import __version__
from pykernels.engine.files import FileError, open_regular, shown
from pykernels.engine.shard import read_exactly
from pykernels.engine.strict_json import strict_json
from pykernels.engine.units import Plan
from pykernels.engine.writer import Written

RECORD = "pykernels.json"
FORMAT = 1
EMPTY = Written(xxhash.xxh3_128(b"").hexdigest(), 0)
_MAX_RECORD = 1_000_000_000


@dataclass(frozen=True)
class Record:
    """A record read back: the plan, and per tensor name what was written."""

    plan: Plan
    tensors: dict[str, Written]
    companions: dict[str, str]


def record_text(
    plan: Plan, written: Mapping[int, Written], companions: Mapping[str, str], backend: str
) -> str:
    """The record of a finished merge; ``written`` by output number (an output without bytes has no entry).

    ``companions``: xxh3-128 of the small files beside the weights. ``backend``: whose kernels merged.
    """
    tensors = {}
    for number, out in enumerate(plan.outputs):
        seen = written.get(number, EMPTY)
        tensors[out.name] = {
            "shard": plan.shards[out.shard].name, "dtype": out.dtype, "shape": out.shape,
            "xxh3_128": seen.xxh3_128, "nonfinite": seen.nonfinite,
        }  # fmt: skip
    content = {
        "format": FORMAT,
        "versions": {"pykernels": __version__, "torch": torch.__version__},
        "backend": backend,
        "isa": _isa() if backend == "cpu" else None,
        "seed": plan.seed,
        "recipe": plan.recipe,
        "tensors": tensors,
        "companions": dict(companions),
        "plan": plan,
    }
    return (
        json.dumps(content, ensure_ascii=False, default=vars) + "\n"
    )  # a plan is plain data all the way down


def _isa() -> str:
    from pykernels import _C

    return _C.isa()


def read_record(out: Path) -> Record:
    """Read OUT's record. Raises FileError when there is none or it is not one."""
    path = out / RECORD
    name = shown(path, 300)
    with open_regular(path) as handle:
        size = os.fstat(handle).st_size
        if size > _MAX_RECORD:
            raise FileError(f"{name}: {size} bytes, the limit is {_MAX_RECORD}")
        content = strict_json(read_exactly(name, handle, 0, size), name)
    try:
        if content["format"] != FORMAT:
            raise FileError(f"{name}: format {shown(content['format'])}, this version reads {FORMAT}")
        plan = Plan.from_json(json.dumps(content["plan"]))
        tensors = {k: Written(str(v["xxh3_128"]), int(v["nonfinite"])) for k, v in content["tensors"].items()}
        companions = {str(k): str(v) for k, v in content["companions"].items()}
    except FileError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(
            f"{name}: is not a record of a merge: {type(error).__name__}: {shown(error)}"
        ) from None
    return Record(plan, tensors, companions)


def file_digest(path: Path) -> str:
    """xxh3-128 of a small file. Raises FileError when it is no regular file."""
    digest = xxhash.xxh3_128()
    with open_regular(path) as handle:
        while part := os.read(handle, 1 << 20):
            digest.update(part)
    return digest.hexdigest()
