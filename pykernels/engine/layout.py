"""Where every output byte goes: shards in Hugging Face naming, the order in a shard, exact offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pykernels.engine.files import header_bytes
from pykernels.engine.header import BITS
from pykernels.engine.units import Output, Shard


def lay_out(
    outputs: Sequence[Output], shard_size: int, metadata: dict[str, str]
) -> tuple[tuple[Output, ...], tuple[Shard, ...]]:
    """Give every output its shard and byte range, and return them in file order with the shards.

    ``outputs`` come in the order in which shards fill; their ``start`` and ``end`` only tell their length.
    A shard holds at most ``shard_size`` bytes of tensors, or a single larger one.
    """
    groups: list[list[Output]] = [[]]
    filled = 0
    for out in outputs:
        if groups[-1] and filled + out.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(out)
        filled += out.nbytes
    placed: list[Output] = []
    shards: list[Shard] = []
    for i, group in enumerate(groups):
        # Wider types first, as the format's own writer does: then every tensor is aligned to its elements.
        group.sort(key=lambda o: -BITS[o.dtype])
        at = len(header_bytes([(o.name, o.dtype, o.shape, o.nbytes) for o in group], metadata))
        for out in group:
            placed.append(replace(out, shard=i, start=at, end=at + out.nbytes))
            at += out.nbytes
        shards.append(Shard(_shard_name(i, len(groups)), at, tuple(o.name for o in group)))
    return tuple(placed), tuple(shards)


def _shard_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
