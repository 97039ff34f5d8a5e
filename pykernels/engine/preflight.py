"""What must hold before the first byte is written: room and a place for the output, equal bytes where due."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pykernels.adapters.change import Change
from pykernels.engine.files import TORCH_DTYPE, shown
from pykernels.engine.mapped import Inputs, check_files
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
        holders = {os.path.realpath(path) for path in (model.path, *model.adapters)}
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
                "overwrite (--overwrite) replaces the checkpoint in it"
            )
    check_room(out, plan.total_write)


def check_room(out: Path, nbytes: int) -> None:
    """The file system must have room for the weights and a margin. Raises OutputError with both figures."""
    place = next(p for p in (out, *out.absolute().parents) if p.is_dir())
    status = os.statvfs(place)
    free, need = status.f_bavail * status.f_frsize, nbytes + nbytes // 100 + MARGIN
    if free < need:
        raise OutputError(
            f"{shown(out, 300)}: needs {need} bytes ({nbytes} of weights and a margin), {free} are free"
        )


def check_equal(plan: Plan, inputs: Inputs) -> None:
    """Tensors that are copied must be equal in all models. Raises OutputError naming tensor and models."""
    for out in plan.outputs:
        if out.action == "copy":
            for source in out.sources[1:]:
                if found := _difference(inputs, out.sources[0], source):
                    raise OutputError(
                        f"tensor {shown(out.name)} ({out.dtype}) is copied, not averaged, and differs "
                        f"between {_model(plan, out.sources[0])} and {_model(plan, source)}: {found}"
                    )
    for head, embedding in plan.twins:
        _check_twin(inputs, head, embedding)
    for one, other in plan.same:
        if found := _difference(inputs, one, other):
            raise OutputError(
                f"tensor {shown(one.name)} of {_model(plan, one)} and tensor {shown(other.name)} of "
                f"{_model(plan, other)} must be equal (one is read for the other), and they differ: {found}"
            )


def _check_twin(inputs: Inputs, head: Change, embedding: Change) -> None:
    """A tied adapter's head has A = B.T and B = A.T of the embedding, for one change is made for both."""
    for one, other in zip(head.tensors[:2], embedding.tensors[1::-1], strict=True):
        a, b = inputs.matrix(one), inputs.matrix(other)
        if a.shape != b.t().shape or not torch.equal(a, b.t()):
            raise OutputError(
                f"{shown(one.file, 300)}: tensor {shown(one.name)} must be the transpose of "
                f"{shown(other.name)}, as ensure_weight_tying has it for tied embeddings, and is not"
            )


def _model(plan: Plan, source: Source) -> str:
    """The model that a tensor is of, or the adapter that came with it."""
    model = plan.models[source.model]
    return shown(next((a for a in model.adapters if str(Path(source.file).parent) == a), model.name))


def _difference(inputs: Inputs, one: Source, other: Source) -> str:
    """The first element that differs, with both values; nothing where all bytes are equal."""
    if one.nbytes != other.nbytes:
        return f"{one.nbytes} and {other.nbytes} bytes"
    for start in range(0, one.nbytes, STEP):
        count = min(STEP, one.nbytes - start)
        a, b = inputs.bytes(one, start, count), inputs.bytes(other, start, count)
        if not torch.equal(a, b):
            at = start + int((a != b).nonzero()[0])
            width = TORCH_DTYPE.get(one.dtype, torch.uint8).itemsize
            values = [_value(inputs, source, at // width) for source in (one, other)]
            return f"element {at // width} is {values[0]} and {values[1]}"
    inputs.drop(one)
    inputs.drop(other)
    return ""


def _value(inputs: Inputs, source: Source, index: int) -> object:
    dtype = TORCH_DTYPE.get(source.dtype, torch.uint8)
    read = inputs.bytes(source, index * dtype.itemsize, dtype.itemsize)
    return read.clone().view(dtype).item()  # a file's bytes lie at any address, a typed view may not


def check_unchanged(plan: Plan) -> None:
    """Inputs must still be the files that the plan was made of. Raises FileError naming one that is not."""
    for model in plan.models:
        check_files(model.identities)
