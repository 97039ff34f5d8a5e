"""What must hold before the first byte is written: room and a place for the output, equal bytes where due."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pykernels.engine.files import shown
from pykernels.engine.mapped import Inputs, check_identity
from pykernels.engine.units import Plan, Source

HIDDEN = ".pykernels-"
"""Beginning of the names of the folders that a merge works in; leftovers of killed runs carry it too."""
MARGIN = 64 << 20
STEP = 8 << 20


class OutputError(ValueError):
    """The output cannot be written where it was asked for, or the inputs forbid it; the text says why."""


def check_place(plan: Plan, out: Path, *, overwrite: bool) -> None:
    """OUT must be new or empty (unless ``overwrite``), no input's directory, with room. Else OutputError."""
    real = Path(os.path.realpath(out))
    for model in plan.models:
        holders = {os.path.realpath(model.path)}
        holders |= {str(Path(os.path.realpath(file)).parent) for file in model.identities}
        if str(real) in holders:
            raise OutputError(
                f"{shown(out, 300)}: is the directory of the input {shown(model.name)}; give another one"
            )
    if os.path.lexists(out):
        if not out.is_dir():
            raise OutputError(f"{shown(out, 300)}: exists and is not a directory")
        held = sorted(p.name for p in out.iterdir() if not p.name.startswith(HIDDEN))
        if held and not overwrite:
            raise OutputError(
                f"{shown(out, 300)}: is not empty (holds {shown(', '.join(held[:5]))}); "
                "overwrite (--overwrite) removes the weights in it"
            )
    check_room(plan, out)


def check_room(plan: Plan, out: Path) -> None:
    """The file system must have room for all shards and a margin. Raises OutputError with both figures."""
    place = next(p for p in (out, *out.absolute().parents) if p.is_dir())
    status = os.statvfs(place)
    free, need = status.f_bavail * status.f_frsize, plan.total_write + plan.total_write // 100 + MARGIN
    if free < need:
        raise OutputError(
            f"{shown(out, 300)}: needs {need} bytes ({plan.total_write} of weights and a margin), "
            f"{free} are free"
        )


def check_equal(plan: Plan, inputs: Inputs) -> None:
    """Tensors that are copied must be equal in all models. Raises OutputError naming tensor and models."""
    for out in plan.outputs:
        if out.action == "copy":
            for source in out.sources[1:]:
                if not _equal(inputs, out.sources[0], source):
                    raise OutputError(
                        f"tensor {shown(out.name)} ({out.dtype}) is copied, not averaged, and differs "
                        f"between {_model(plan, out.sources[0])} and {_model(plan, source)}"
                    )
    for one, other in plan.same:
        if not _equal(inputs, one, other):
            raise OutputError(
                f"tensor {shown(one.name)} of {_model(plan, one)} and tensor {shown(other.name)} of "
                f"{_model(plan, other)} must be equal (one is read for the other), and they differ"
            )


def _model(plan: Plan, source: Source) -> str:
    return shown(plan.models[source.model].name)


def _equal(inputs: Inputs, one: Source, other: Source) -> bool:
    if one.nbytes != other.nbytes:
        return False
    for start in range(0, one.nbytes, STEP):
        count = min(STEP, one.nbytes - start)
        if not torch.equal(inputs.bytes(one, start, count), inputs.bytes(other, start, count)):
            return False
    inputs.drop(one)
    inputs.drop(other)
    return True


def check_unchanged(plan: Plan) -> None:
    """Inputs must still be the files that the plan was made of. Raises FileError naming one that is not."""
    for model in plan.models:
        for path, identity in model.identities.items():
            check_identity(path, Path(path).stat(), identity)
