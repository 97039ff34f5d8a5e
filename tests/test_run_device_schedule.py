"""Units, places and shares of merges on devices, from plans alone."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
import torch

from pykernels import grouping
from pykernels.engine import schedule as schedules
from pykernels.engine.loads import ALIGN, Load, place
from pykernels.engine.plan import Plan, make_plan
from pykernels.engine.recipe import read_recipe
from pykernels.engine.run import merge
from pykernels.engine.schedule import DeviceBudget, Unit, deal, model_survey, schedule
from pykernels.engine.station import Busy, Regions
from tests.checkpoints import SHAPES, recipe, write_model, write_models
from tests.stand_in import install

MIXED = (torch.bfloat16, torch.float32)


@pytest.fixture(scope="module", params=["one type", "mixed"])
def home(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A base and three fine-tunes, the first of another type where they are mixed."""
    path = tmp_path_factory.mktemp("models")
    write_models(path)
    if request.param == "mixed":
        write_models(path / "other", torch.float32)
        (path / "other" / "t0" / "model.safetensors").replace(path / "t0" / "model.safetensors")
    return path


def planned(home: Path, method: str, scope: str = "tensor") -> Plan:
    """The plan of a merge."""
    return make_plan(read_recipe(recipe(home, method, scope=scope)))


def loads_of(units: list[Unit]) -> list[Load]:
    """All loads that are merged."""
    return [load for unit in units for load in unit.loads]


@pytest.mark.parametrize("small", [10, 5000, 1 << 22])
@pytest.mark.parametrize("memory", [200_000, 3_000_000, 10**8])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_every_element_is_merged_once_and_everything_fits(
    home: Path, monkeypatch: pytest.MonkeyPatch, method: str, memory: int, small: int
) -> None:
    monkeypatch.setattr(grouping, "SMALL", small)
    plan = planned(home, method)
    budget = DeviceBudget.of(plan, 10**7, memory, 2)
    units = schedule(plan, budget)
    seen: dict[str, list[tuple[int, int]]] = {}
    for load in loads_of(units):
        assert load.nbytes <= budget.room
        for part in load.parts:
            seen.setdefault(part.out.name, []).append((part.first, part.count))
            assert part.first % 4096 == 0 and plan.outputs[part.number] is part.out
        if len(load.parts) > 1:
            assert load.nbytes <= budget.unit and load.nbytes - load.outs <= budget.piece
    for name, numel in ((n, torch.Size(s).numel()) for n, s in SHAPES.items()):
        at = 0
        for first, count in seen.get(name, []):
            assert first == at
            at += count
        assert at == numel
    assert any(unit.survey for unit in units) == (method == "ties" and memory == 200_000)
    firsts = [unit.loads[0].parts[0].number for unit in units]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("piece", [16, 100, 4096, 1 << 20])
def test_windows_cover_every_input_byte_once(home: Path, piece: int) -> None:
    plan = planned(home, "ties")
    for load in loads_of(schedule(plan, DeviceBudget.of(plan, 10**9, 10**6, 1))):
        lengths: dict[int, int] = {}
        last = 0
        for start, end, held in load.windows(piece):
            assert last <= start < end <= start + piece
            last = end
            for part in held:
                assert start <= part.at and part.at + part.nbytes <= end
                lengths[part.at] = part.nbytes
        wanted = {s.at: s.nbytes for s in load.slices()}
        at = 0
        for start in sorted(wanted):
            at = start
            while at < start + wanted[start]:
                at += lengths.pop(at)
            assert at == start + wanted[start]
        assert not lengths and sum(s.nbytes for s in load.sources) == sum(wanted.values())


def test_tensors_are_aligned_and_apart(home: Path) -> None:
    plan = planned(home, "ties")
    for load in loads_of(schedule(plan, DeviceBudget.of(plan, 10**9, 10**8, 1))):
        spans = []
        for part, at in zip(load.parts, load.places, strict=True):
            widths = [schedules.TORCH_DTYPE[s.dtype].itemsize for s in part.out.sources]
            spans += [(a, a + part.count * w) for ((_, a),), w in zip(at.sources, widths, strict=True)]
            spans += [(a, a + part.count * 4) for a in at.wide if a is not None]
            spans.append((at.out, at.out + part.count * schedules.TORCH_DTYPE[part.out.dtype].itemsize))
            assert at.out >= load.outs
        spans.sort()
        assert all(start % ALIGN == 0 for start, _ in spans) and spans[-1][1] <= load.nbytes
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_model_is_surveyed_in_full(home: Path) -> None:
    plan = planned(home, "ties", scope="model")
    for memory in (150_000, 10**8):
        unit = model_survey(plan, DeviceBudget.of(plan, 10**9, memory, 1))
        at = 0
        for part in (part for load in unit.survey for part in load.parts):
            assert part.at == at
            at += part.count
        assert at == sum(torch.Size(s).numel() for s in SHAPES.values()) and not unit.loads


def test_units_are_dealt_by_bytes(home: Path) -> None:
    units = schedule(plan := planned(home, "linear"), DeviceBudget.of(plan, 10**9, 200_000, 1))
    places = deal(units, 3)
    shares = [sum(u.nbytes for u, at in zip(units, places, strict=True) if at == i) for i in range(3)]
    assert places == deal(units, 3) and max(shares) - min(shares) <= max(u.nbytes for u in units)
    assert deal(units, 1) == [0] * len(units)


def test_too_little_memory(home: Path) -> None:
    plan = planned(home, "ties")
    with pytest.raises(ValueError, match=r"device_memory must be at least \d+ bytes .*, got 50000"):
        DeviceBudget.of(plan, 10**9, 50_000, 1)
    with pytest.raises(ValueError, match="memory must be at least 1000000 bytes, got 5"):
        DeviceBudget.of(plan, 5, 10**9, 1)


def test_what_the_message_asks_for_is_enough(home: Path) -> None:
    plan = planned(home, "ties")
    with pytest.raises(ValueError) as caught:
        DeviceBudget.of(plan, 10**9, 1, 1)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert DeviceBudget.of(plan, 10**9, least, 1).room < least
    with pytest.raises(ValueError, match="at least"):
        DeviceBudget.of(plan, 10**9, least - 4, 1)


@pytest.mark.parametrize("seed", range(5))
def test_regions_never_overlap(seed: int) -> None:
    draw, regions, taken = random.Random(seed), Regions(10_000), {}
    granted = 0
    for _ in range(2000):
        nbytes = draw.randrange(1, 4000)
        start = regions.take(nbytes)
        if start is None:
            regions.give_back(gone := draw.choice(list(taken)))
            del taken[gone]
        else:
            granted += 1
            assert start % ALIGN == 0 and start + nbytes <= 10_000
            assert all(start >= end or start + nbytes <= low for low, end in taken.items())
            taken[start] = start + nbytes
    assert granted > 500


def test_a_region_as_large_as_the_ring() -> None:
    regions = Regions(1000)
    assert regions.take(300) == 0 and regions.take(1000) is None
    regions.give_back(0)
    assert regions.take(1000) == 0


def test_the_busiest_part_is_the_limit() -> None:
    busy = Busy(reading=1.0, merging=3.0).worst(Busy(reading=2.0, writing=2.5))
    assert busy == Busy(reading=2.0, merging=3.0, writing=2.5) and busy.limit() == "merging"
    assert Busy(copying_up=1.0).limit() == "copying up"


def test_an_unmerged_load_has_no_outputs(home: Path) -> None:
    plan = planned(home, "ties")
    [load] = schedule(plan, DeviceBudget.of(plan, 10**9, 10**9, 1))[0].loads
    assert place(load.parts, merged=False).nbytes == load.outs < load.nbytes


def test_copies_and_merges_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty tensors, each 20 ms on its way up, in the merge and on its way down, but not one by one."""
    for name in ("t0", "t1"):
        state = {f"model.layers.{i}.w": torch.ones(64, 64) for i in range(20)}
        write_model(tmp_path / name, state)
    monkeypatch.setattr(grouping, "SMALL", 10)
    install(monkeypatch, late=0.02, fault=lambda stage: time.sleep(0.02 if stage == "merge" else 0))
    report = merge(recipe(tmp_path, "linear", tuned=2), tmp_path / "out", device="cuda:0")
    assert 20 * 0.02 < report.seconds < 0.75 * 3 * 20 * 0.02


@pytest.mark.parametrize("models", [1, 3, 8, 64])
def test_selections_fit_in_what_is_left_to_them(models: int) -> None:
    """The CUDA kernels' scratch, in the build that there is."""
    cuda = pytest.importorskip("pykernels._cuda")
    for numel in (1, 100, 4096, 1 << 16, 1 << 20, grouping.SMALL, grouping.SMALL + 1, 1 << 28):
        held, scratch = numel * 2 * (models + 2), cuda.kth_scratch(numel, models)
        assert scratch <= max(held, schedules.SCRATCH * models)
        assert numel <= grouping.SMALL or scratch <= held // 4
