"""The exact k-th magnitude on the device: which kernels run, in which order, on what scratch memory.

A tensor that one program holds takes one launch. A larger one: a sample gives a band around the k-th key, one
pass over the tensors counts what lies above it and stores what lies inside, three rounds of a radix selection
over what was stored narrow the band to one key, and the tie rule "index" finds the last equal to keep. Exact
counts prove the band; where it misses, the rounds read the tensors instead. The host waits for nothing, so a
CUDA graph can hold it.

Traffic: (n + 1) * numel * sizeof(T), and about a twentieth more for what is stored and read again. Scratch
memory: TILE / CAPACITY, an eighth, of 4 bytes an element and model.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pykernels.kernels import rounds, sample
from pykernels.kernels.launch import INTERPRETED, READS, TILE, Job, Launch, alignment

SMALL = 16384
"""Elements up to which one program holds a model's keys."""
SAMPLE = 32768
"""Elements of a larger tensor's sample."""
CAPACITY = TILE // 8
"""Keys inside the band that are stored per tile; of a tile that has more, the tensors are read again."""
DEVIATIONS = 4
"""Half the band's width, in standard deviations of a rank in the sample: it misses once in 16,000 times."""
STEP = 4096
"""Tiles whose counts are read at a time to locate the last equal."""
WARPS, SCANNING, WIDE = 8, 16, 32
"""Warps of a program that reads a tile, of one that also scans it, and of one that holds a sample."""
COPIES = 1 if INTERPRETED else 8


def small(job: Job) -> bool:
    """Whether one program holds the whole tensor."""
    return job.numel <= SMALL


def unit(jobs: list[Job]) -> int:
    """The multiple of tiles that every job must take: a program of a round reads a group of them."""
    return 1 if small(jobs[0]) else int(rounds.GROUP.value)


def ranks(k: list[int], numel: int) -> list[int]:
    """k per model, then the ranks in the sample, from the largest, at the band's upper and lower end."""
    high, low = [], []
    for count in k:
        rank = count / numel * SAMPLE
        margin = DEVIATIONS * math.sqrt(rank * max(0.0, 1 - rank / SAMPLE)) + 1
        high.append(math.floor(rank - margin))
        low.append(math.ceil(rank + margin))
    return [*k, *high, *low]


def room(jobs: list[Job]) -> tuple[torch.Tensor, torch.Tensor]:
    """(key, last) [jobs, n], int64, for the cuts of a launch."""
    both = torch.empty(2, len(jobs), len(jobs[0].tuned), dtype=torch.int64, device=jobs[0].tuned[0].device)
    return both[0], both[1]


def select(launch: Launch, key: torch.Tensor, last: torch.Tensor, keep: bool = False) -> None:
    """Write the cuts of all jobs; with ``keep``, the tie rule "keep", all equals are kept."""
    job = launch.jobs[0]
    like: dict[str, Any] = {
        "BASED": job.base is not None,
        "IN": READS[job.tuned[0].dtype],
        "ALIGN": min(1, alignment(job)),
    }
    searches = len(launch.jobs) * launch.models
    if small(job):
        launch.run(sample._select_small, searches, key, last, KEEP=keep, **like, SMALL=SMALL, num_warps=WIDE)
        return
    copies = COPIES if len(launch.jobs) == 1 else 1
    groups = launch.tiles // int(rounds.GROUP.value) * launch.models
    states = launch.zeros(searches, int(sample.STATE.value))
    bins = launch.zeros(searches, copies, int(rounds.BINS.value), dtype=torch.int32)
    counts = launch.empty(launch.tiles, launch.models, dtype=torch.int32)
    buffer = launch.empty(launch.tiles, launch.models, CAPACITY, dtype=torch.int32)
    launch.run(sample._sample, searches, states, **like, SAMPLE=SAMPLE, num_warps=WIDE)
    like.update(TILE=TILE, CAPACITY=CAPACITY)
    launch.run(rounds._collect, launch.tiles, states, counts, buffer, **like, num_warps=SCANNING)
    for _ in range(3):
        launch.run(rounds._count, groups, states, counts, buffer, bins, copies, **like, num_warps=WARPS)
        launch.run(rounds._narrow, searches, states, bins, copies)
    if not keep:
        launch.run(rounds._equals, groups, states, counts, buffer, **like, num_warps=WARPS)
    del like["CAPACITY"]
    launch.run(
        rounds._locate, searches, states, counts, key, last, KEEP=keep, **like, STEP=STEP, num_warps=WARPS
    )
