"""Layers as names show them: which tensor is in which layer, and how many layers there are, for gradients."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key: numbers in a name count as numbers, so layer 2 comes before layer 10."""
    digits = [part.lstrip("0") if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
    return [(len(part) if i % 2 else 0, part) for i, part in enumerate(digits)], name


def stacks(names: Iterable[str], config: dict[str, Any]) -> dict[str, int]:
    """Number of layers of every stack of layers: names by what stands before their first number.

    A config that knows another number than the names do is believed for the stack with the most tensors.
    """
    lengths: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for prefix, layer in filter(None, map(layer_of, names)):
        lengths[prefix] = max(lengths.get(prefix, 0), layer + 1)
        sizes[prefix] = sizes.get(prefix, 0) + 1
    said = _layers_in(config)
    if lengths and said is not None and said not in lengths.values():
        lengths[max(sizes, key=lambda p: sizes[p])] = said
    return lengths


def layer_of(name: str) -> tuple[str, int] | None:
    """Stack and index of a tensor's layer: ``model.layers.3.mlp.weight`` gives ("model.layers", 3)."""
    hit = re.match(r"(.*?)(?:^|\.)([0-9]{1,9})\.", name, re.DOTALL)
    return (hit[1], int(hit[2])) if hit else None


def _layers_in(config: dict[str, Any]) -> int | None:
    for part in (config, config.get("text_config")):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(part, dict) and type(part.get(key)) is int and part[key] > 0:
                return int(part[key])
    return None
