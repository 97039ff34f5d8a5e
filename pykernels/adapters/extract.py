"""The difference of a fine-tune and its base as a PEFT adapter: the nearest of a rank, matrix by matrix.

Traffic: both checkpoints once, one tensor at a time in float32. The decompositions are those of compose_lora:
exact for small matrices, subspace iteration from a fixed start (Halko et al., 2011) for large ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from pykernels.adapters.conv1d import MODEL_TYPES, is_conv1d
from pykernels.adapters.write import Made, check_out, write_adapter
from pykernels.engine.files import (
    MERGEABLE,
    Checkpoint,
    FileError,
    TensorInfo,
    open_checkpoint,
    resolve_model,
    shown,
)
from pykernels.engine.layers import natural
from pykernels.engine.mapped import Inputs
from pykernels.engine.matching import EMBEDDINGS
from pykernels.engine.plan import read_config
from pykernels.ops.low_rank_svd import truncate

POSITIONS = (
    "wpe.weight",
    "embed_positions.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
)


@dataclass(frozen=True)
class Extracted:
    """What an extraction wrote. ``errors``: ||delta - B A|| / ||delta|| (Frobenius) by tensor.

    ``saved``: modules whose tensors are full copies, as they have no low-rank form. ``biases``: copied too.
    """

    out: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    nbytes: int


def extract(base: str, tuned: str, out: str | Path, *, rank: int, allow_download: bool = False) -> Extracted:
    """Write the adapter of ``rank`` (less where a matrix has less) that is nearest to ``tuned - base``.

    Matrices, embeddings and convolutions get factors in float32; unchanged tensors nothing. Vectors that
    changed are copied in full: the bias of a module with factors (``bias: lora_only``), and every tensor of
    other modules (``modules_to_save``). Changed tensors of other kinds (stacks of experts, integers) are
    refused by name.

    Raises:
        ValueError: a FileError naming the tensor, or a quantised model; a config.json that is none; a rank
            below 1; models of different tensors or shapes.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    paths = [resolve_model(name, allow_download=allow_download) for name in (base, tuned)]
    models = [open_checkpoint(path) for path in paths]
    check_out(Path(out), paths)
    configs = [read_config(path) for path in paths]
    for path, config in zip(paths, configs, strict=True):
        if "quantization_config" in config:
            raise FileError(
                f"{shown(path, 300)}: its config has a quantization_config; adapters are differences of "
                "float tensors, dequantise the models first"
            )
    _check_same(models[0], models[1])
    inputs = Inputs({**models[0].files, **models[1].files})
    try:
        found = _Extraction(models[0], models[1], inputs, str(configs[0].get("model_type", "")))
        for name in sorted(models[0].tensors, key=natural):
            found.take(name, rank)
        return found.write(Path(out), base)
    finally:
        inputs.close()


class _Extraction:
    def __init__(self, base: Checkpoint, tuned: Checkpoint, inputs: Inputs, model_type: str) -> None:
        self._base = base.tensors
        self._tuned = tuned.tensors
        self._inputs = inputs
        self._type = model_type
        self._made = Made()
        self._errors: dict[str, float] = {}
        self._vectors: list[str] = []

    def take(self, name: str, rank: int) -> None:
        """One tensor: nothing where it did not change."""
        base, tuned = self._base[name], self._tuned[name]
        one, other = (self._inputs.matrix(i) if i.shape else None for i in (base, tuned))
        if one is None or other is None or one.numel() == 0 or torch.equal(one, other):
            if one is None and self._differs(base, tuned):
                self._refuse(base, "a scalar changed, which no adapter holds")
            return
        for info in (base, tuned):
            if info.dtype not in MERGEABLE:
                self._refuse(info, f"{info.dtype} changed, which no adapter holds")
        if len(base.shape) == 1:
            self._vectors.append(name)
        elif not name.endswith(".weight") or (len(base.shape) == 3 and ".experts" in name):
            self._refuse(
                base, f"{list(base.shape)} changed, and only weights of modules have a low-rank form here"
            )
        else:
            wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
            self._factor(name, base.shape, (other.to(wide) - one.to(wide)).float(), rank)

    def _factor(self, name: str, shape: tuple[int, ...], delta: torch.Tensor, rank: int) -> None:
        module = name.removesuffix(".weight")
        embedding = len(shape) == 2 and any(f".{name}".endswith(f".{t}") for t in (*EMBEDDINGS, *POSITIONS))
        turned = embedding or (len(shape) == 2 and is_conv1d(self._type, module) is True)
        if not delta.isfinite().all():
            self._refuse(self._tuned[name], "differs from the base's by NaN or infinite elements")
        wanted = delta.t().contiguous() if turned else delta
        A, B = truncate(wanted, min(rank, *wanted.shape))
        off = torch.linalg.vector_norm(wanted - B @ A, dtype=torch.float64)
        self._errors[name] = float(off / torch.linalg.vector_norm(wanted, dtype=torch.float64))
        if len(shape) > 2:
            A, B = A.view(len(A), *shape[1:]), B.view(*B.shape, *(1 for _ in shape[2:]))
        self._made.add(module, A, B, embedding=embedding)

    def write(self, out: Path, base: str) -> Extracted:
        """What was taken so far, with full copies of what has no factors."""
        biases, saved = [], []
        for name in self._vectors:
            module, _, parameter = name.rpartition(".")
            if module in self._made.ranks:
                if parameter != "bias":
                    self._refuse(self._base[name], "changed beside a matrix of its module, and is no bias")
                biases.append(name)
            elif module not in saved:
                saved.append(module)
        if biases:  # PEFT reads all biases of the modules that have factors
            biases = [f"{m}.bias" for m in self._made.ranks if f"{m}.bias" in self._tuned]
        for name in biases:
            self._made.tensors[name.removesuffix("bias") + "base_layer.bias"] = self._copy(name)
        for name in self._tuned:
            if name.rpartition(".")[0] in saved:
                self._made.tensors[name] = self._copy(name)
        if not self._made.tensors:
            raise FileError(f"{shown(base)}: no tensor differs, so there is no adapter to write")
        if not self._made.ranks:
            self._refuse(
                self._base[self._vectors[0]],
                "only vectors changed, and PEFT loads no adapter without a matrix",
            )
        config = self._made.config(
            base_model_name_or_path=base,
            bias="lora_only" if biases else "none",
            fan_in_fan_out=self._type in MODEL_TYPES,
            modules_to_save=saved or None,
        )
        nbytes = write_adapter(out, self._made, config, self._inputs)
        return Extracted(out, dict(self._made.ranks), self._errors, tuple(saved), tuple(biases), nbytes)

    def _copy(self, name: str) -> torch.Tensor:
        info = self._tuned[name]
        return self._inputs.matrix(info).view(info.shape)

    def _differs(self, base: TensorInfo, tuned: TensorInfo) -> bool:
        raw = [self._inputs.bytes_of(info) for info in (base, tuned)]
        return not torch.equal(raw[0], raw[1])

    def _refuse(self, info: TensorInfo, why: str) -> NoReturn:
        raise FileError(f"{shown(info.file, 300)}: tensor {shown(info.name)}: {why}")


def _check_same(base: Checkpoint, tuned: Checkpoint) -> None:
    for one, other in ((base, tuned), (tuned, base)):
        if missing := next((name for name in one.tensors if name not in other.tensors), None):
            raise FileError(
                f"{shown(other.path, 300)}: lacks tensor {shown(missing)} of {shown(one.path, 300)}"
            )
    for name, info in base.tensors.items():
        its = tuned.tensors[name]
        if info.shape != its.shape:
            raise FileError(
                f"{shown(its.file, 300)}: tensor {shown(name)} must have shape {list(info.shape)}, "
                f"as in the base, got {list(its.shape)}"
            )
