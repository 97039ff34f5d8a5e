"""Several PEFT adapters made into one that PEFT loads, module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykernels.adapters.checkpoint import Adapter, open_adapter
from pykernels.adapters.composition import Composition
from pykernels.adapters.copies import Kept, keep
from pykernels.adapters.keys import BIAS, MAGNITUDE
from pykernels.adapters.members import Target, check_method, gather
from pykernels.adapters.write import check_out, write_adapter
from pykernels.engine.mapped import Inputs


@dataclass(frozen=True)
class Composed:
    """What a composition wrote. ``errors``: ||result - exact|| / ||exact|| (Frobenius) of every module.

    ``exact`` is what the method makes of the dense deltas; with "cat" only roundings part them.
    """

    out: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    nbytes: int


def compose(
    adapters: Sequence[str],
    out: str | Path,
    *,
    method: str = "cat",
    weights: Sequence[float] = (),
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    allow_download: bool = False,
) -> Composed:
    """Make PEFT adapters into one and write it into the directory ``out``, which must be new or empty.

    Beside low-rank changes: experts of stacked parameters are composed one by one; the biases of lora_bias
    as deltas of their own, exactly with "cat" and "svd". Full copies and token rows go into "cat" and "svd"
    where all that have them agree and their weights are 1 or sum to 1. The magnitudes of DoRA go into a "cat"
    in which no module has a second change.

    Args:
        adapters: directories or hub ids. A module that some lack is composed of those that have it.
        method: of :func:`pykernels.compose_lora`; ``rank`` and ``density`` too.
        weights: one per adapter, or none for 1 each.
        seed: of the masks of dare methods, together with the module's name.

    Raises:
        ValueError: FileError for an adapter that the method has no exact meaning for, or that does not fit
            the others; and what compose_lora refuses.
    """
    if weights and len(weights) != len(adapters):
        raise ValueError(f"weight: give one per adapter, {len(adapters)}, or none; got {len(weights)}")
    opened = [open_adapter(name, allow_download=allow_download) for name in adapters]
    check_out(Path(out), [a.path for a in opened])
    given = list(weights) or [1.0] * len(opened)
    targets = gather(opened)
    check_method(targets, method)
    inputs = Inputs({a.file: a.identity for a in opened})
    composition = Composition(targets, inputs, given, (method, rank, density, seed))
    try:
        modules = {target.module for target in targets if not target.parameter}
        kept = keep(opened, given, method, modules, inputs)
        for target in targets:
            composition.take(target)
        made = composition.made
        made.tensors.update(kept.tensors)
        nbytes = write_adapter(Path(out), made, made.config(**_settings(opened, targets, kept)), inputs)
    finally:
        inputs.close()
    return Composed(Path(out), dict(made.ranks), composition.errors, nbytes)


def _settings(adapters: Sequence[Adapter], targets: Sequence[Target], kept: Kept) -> dict[str, Any]:
    """Keys of the config beside ranks."""
    agreed = {}
    for key in ("base_model_name_or_path", "task_type"):
        said = {adapter.config.said.get(key) for adapter in adapters}
        agreed[key] = said.pop() if len(said) == 1 else None
    parts = {part for target in targets for member in target.members for part in member.tensors}
    return {
        **agreed,
        "fan_in_fan_out": any(a.config.fan_in_fan_out for a in adapters),
        "use_dora": MAGNITUDE in parts,
        "lora_bias": BIAS in parts,
        "bias": kept.bias,
        "modules_to_save": kept.saved or None,
        "trainable_token_indices": kept.rows or None,
    }
