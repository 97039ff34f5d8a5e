"""Adapters of stacked parameters (PEFT's target_parameters): which of them, and where a base keeps it.

PEFT nests one wrapper per parameter and does not write the parameter's name: the one that its module defines
first lies deepest under ``base_layer``. A base may hold the parameter as one tensor [experts, ...], or, as
checkpoints of Mixtral and Qwen do, a matrix per expert, whose rows are parts of the parameter's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

from pykernels.adapters.change import ADD, Change
from pykernels.adapters.config import AdapterConfig
from pykernels.adapters.keys import A, B, Parts
from pykernels.engine.shard import TensorInfo

DEFINED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""In the order in which the modules of transformers 5 define them."""
SPLIT: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Matrices of one expert that a parameter is made of, from its first row on."""
MOVED = tuple((f"mlp.{part}", f"block_sparse_moe.{part}") for part in ("experts", "gate"))
"""Paths in transformers 5, and in the checkpoints that it reads."""
IN_FIRST = ("gpt_oss", "aria", "openai_privacy_filter")
"""Model types that store [experts, in, out]; it only matters where in and out are equal."""

MOST = 6
"""Parameters of one module: every order of them is tried."""

Changes = list[tuple[str, Change]]


def parameters_of(module: str, targets: Sequence[str]) -> list[str]:
    """The parameters of a module that ``target_parameters`` names, without its path."""
    found = []
    for target in targets:
        path, _, parameter = target.rpartition(".")
        if not path or f".{module}".endswith(f".{path}"):
            found.append(parameter)
    return list(dict.fromkeys(found))


def fit(
    levels: Sequence[Parts], config: AdapterConfig, base: Mapping[str, TensorInfo], model_type: str
) -> list[Changes] | str:
    """The changes that each of a module's ``levels`` makes (``adapter`` unset), or what is wrong.

    Shapes decide; between equal ones the order in which modules define parameters.
    """
    names = parameters_of(levels[0].module, config.target_parameters)
    if len(names) > MOST:
        return f"{len(names)} of target_parameters are of its module, and at most {MOST} are told apart"
    order = sorted(range(len(levels)), key=lambda i: -levels[i].depth)
    fits: list[tuple[tuple[str, ...], list[Changes]]] = []
    for chosen in permutations(names, len(levels)):
        placed: list[Changes] = [[] for _ in levels]
        for parameter, i in zip(chosen, order, strict=True):
            placed[i] = _changes(parameter, levels[i], config, base, model_type)
        if all(placed):
            fits.append((chosen, placed))
    if len(fits) > 1:
        known = [f for f in fits if set(f[0]) <= set(DEFINED)]
        fits = [f for f in known if list(f[0]) == sorted(f[0], key=DEFINED.index)]
    if len(fits) != 1:
        told = ", ".join(names) or "none"
        return f"ranks and shapes do not tell which of target_parameters it belongs to (candidates: {told})"
    return fits[0][1]


def _changes(
    parameter: str, parts: Parts, config: AdapterConfig, base: Mapping[str, TensorInfo], model_type: str
) -> Changes:
    """What this adapter makes of ``parameter``; nothing where shapes do not fit."""
    a, b = parts.tensors[A], parts.tensors[B]
    rank = config.rank(f"{parts.module}.{parameter}")
    experts, columns, rows = a.shape[0] // rank, a.shape[1], b.shape[0]
    if experts * rank != a.shape[0]:
        return []
    scaling = config.scaling(f"{parts.module}.{parameter}", rank)
    change = Change(ADD, 0, (a, b), scaling, rounded=True, experts=experts)
    names = [f"{home}.{parameter}" for home in _homes(parts.module)]
    info = next((base[name] for name in names if name in base), None)
    if info is None:
        return _split(parameter, parts.module, change, (experts, rows, columns), base)
    out_first = info.shape == (experts, rows, columns) or (experts == 1 and info.shape == (rows, columns))
    in_first = info.shape == (experts, columns, rows)
    if in_first and (not out_first or model_type in IN_FIRST):
        return [(info.name, replace(change, transposed=True))]
    if len(info.shape) == 2:
        change = replace(change, experts=0)
    return [(info.name, change)] if out_first else []


def _homes(module: str) -> list[str]:
    """Where a base may keep a module."""
    return [module, *(module.removesuffix(a) + b for a, b in MOVED if f".{module}".endswith(f".{a}"))]


def _split(
    parameter: str,
    module: str,
    change: Change,
    shape: tuple[int, int, int],
    base: Mapping[str, TensorInfo],
) -> Changes:
    experts, rows, columns = shape
    for home in _homes(module):
        for parts in SPLIT.get(parameter, ()):
            if experts * len(parts) > len(base):  # whatever a header claims, no more than that is looked at
                continue
            names = [[f"{home}.{e}.{part}.weight" for part in parts] for e in range(experts)]
            infos = [[base.get(name) for name in row] for row in names]
            found: Changes = []
            for e, row in enumerate(infos):
                offset = 0
                for info in row:
                    if info is None or len(info.shape) != 2 or info.shape[1] != columns:
                        break
                    found.append((info.name, replace(change, expert=e, offset=offset)))
                    offset += info.shape[0]
                if offset != rows:
                    break
            else:
                if f"{home}.{experts}.{parts[0]}.weight" not in base:
                    return found
    return []
