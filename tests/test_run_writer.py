"""The writer against a plain copy: any sizes, any ring, any mix of pieces gives the same file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import xxhash

from pykernels.engine import writer
from pykernels.engine.arena import HUGE, Arena
from pykernels.engine.writer import ShardWriter

HEADER = bytes(range(256)) * 16


@pytest.mark.parametrize("durable", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("near", [1 << 14, 32 << 20], ids=["early wraps", "late wraps"])
@pytest.mark.parametrize("seed", range(6))
def test_files_are_what_was_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, near: int, durable: bool
) -> None:
    monkeypatch.setattr(writer, "NEAR", near)
    monkeypatch.setattr(writer, "BATCH", 1 << 18)
    monkeypatch.setattr(writer, "SLICE", 1 << 12)
    draw = random.Random(seed)
    out = ShardWriter(Arena(HUGE), durable=durable)
    number, wanted, digests = 0, [], {}
    for shard in range(3):
        sizes = [draw.choice([1, 7, 4095, 4096, 50_001, draw.randrange(1, 900_000)]) for _ in range(12)]
        content = bytearray(HEADER)
        out.begin(tmp_path / str(shard), len(HEADER) + sum(sizes), HEADER)
        for size in sizes:
            data = draw.randbytes(size)
            for start in range(0, size, 300_000):
                part = data[start : start + 300_000]
                target = out.reserve(len(part), torch.uint8, number, last=start + len(part) == size)
                target.copy_(torch.frombuffer(bytearray(part), dtype=torch.uint8))
            digests[number] = xxhash.xxh3_128(data).hexdigest()
            content += data
            number += 1
        out.end()
        wanted.append(content)
    out.close()
    assert [(tmp_path / str(shard)).read_bytes() for shard in range(3)] == wanted
    assert {n: w.xxh3_128 for n, w in out.written.items()} == digests


def test_elements_of_any_alignment_are_counted(tmp_path: Path) -> None:
    out = ShardWriter(Arena(HUGE))
    out.begin(tmp_path / "f", 3 + 4 * 5000, b"")
    out.reserve(3, torch.uint8, 0, last=True).zero_()
    values = out.reserve(4 * 5000, torch.float32, 1, last=True)
    values.fill_(float("inf"))
    values[17] = 1.0
    assert values.data_ptr() % 4 == 3
    out.end()
    out.close()
    assert out.written[1].nonfinite == 4999 and (tmp_path / "f").stat().st_size == 20_003


def test_more_than_the_ring_is_refused() -> None:
    out = ShardWriter(Arena(1))
    with pytest.raises(ValueError, match="do not fit in a ring of 2097152"):
        out.reserve(HUGE, torch.uint8, 0)
    out.close()
