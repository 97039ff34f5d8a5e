"""Tensors with adapters on devices: the bytes of the CPU's merge, within the memory, never half-written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import pykernels
from pykernels import backends, grouping
from pykernels.cli import main
from pykernels.engine.gathered import scratch
from pykernels.engine.loads import Part, most_bytes, place, scratch_of
from pykernels.engine.passes import is_adapted
from pykernels.engine.plan import Plan, make_plan
from pykernels.engine.recipe import Recipe, adapter_recipe, read_recipe
from pykernels.engine.run import Report, merge
from pykernels.engine.schedule import DeviceBudget, on_device, schedule
from pykernels.engine.verify import verify
from tests.adapter_files import factors, write_adapter, write_base, write_experts, write_mixed
from tests.checkpoints import write_model
from tests.stand_in import StandIn, install
from tests.test_run_device import KINDS, files, kept_within
from tests.test_run_device_faults import Broken, at_call, nothing_is_left

LOW = ("a", "b", "experts", "dora", "extras")
CASES = (*LOW[:4], "high", "extras")
COLUMNS = "norms of columns, float64 and rounding peft are its own"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of every dtype, and adapters of every kind of change."""
    path = tmp_path_factory.mktemp("adapters")
    for name, dtype in (("base", torch.bfloat16), ("f32", torch.float32), ("f16", torch.float16)):
        write_base(path / name, dtype)
    write_mixed(path / "a", seed=1)
    write_mixed(path / "b", seed=2)
    write_experts(path / "experts", seed=3)
    dora = factors("model.layers.0.q_proj", 67, 131, seed=4)
    dora["model.layers.0.q_proj.lora_magnitude_vector"] = torch.rand(67) + 1
    write_adapter(path / "dora", dora, use_dora=True)
    extras: dict[str, torch.Tensor] = {
        **{k: v.bfloat16() for k, v in factors("model.layers.0.q_proj", 67, 131, seed=5).items()},
        "model.layers.0.q_proj.lora_B.bias": torch.randn(67),
        "model.norm.weight": torch.randn(64),
        "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(3, 64),
    }
    rows = {"trainable_token_indices": {"embed_tokens": [2, 50, 100]}, "modules_to_save": ["norm"]}
    write_adapter(path / "extras", extras, lora_bias=True, **rows)
    high = factors("model.layers.1.q_proj", 33, 64, rank=70, seed=6)
    write_adapter(path / "high", {k: v.half() for k, v in high.items()}, r=70)
    write_adapter(path / "conv1d", factors("model.layers.1.q_proj", 64, 33, seed=7), fan_in_fan_out=True)
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.randn(4, 101),
        "model.embed_tokens.lora_embedding_B": torch.randn(64, 4),
        "model.embed_tokens.lora_magnitude_vector": torch.rand(64) + 1,
    }
    write_adapter(path / "columns", embedding, use_dora=True)
    return path


@pytest.fixture(params=KINDS)
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Stand-ins for cuda:0 and cuda:1; none for real devices."""
    monkeypatch.setattr(grouping, "SMALL", 2500)
    return [] if request.param == "cuda" else install(monkeypatch)


def adapters(home: Path, *names: str, base: str = "base", rounding: str = "once") -> Recipe:
    return adapter_recipe(str(home / base), [str(home / name) for name in names], (), rounding)


def both(made: Any, path: Path, **options: Any) -> Report:
    """A merge on devices, held against that on the CPU."""
    merge(made, path / "cpu", **{k: v for k, v in options.items() if k == "shard_size"})
    report = merge(made, path / "out", **{"device": "cuda:0", **options})
    assert files(path / "out") == files(path / "cpu")
    return report


BUDGETS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "parts": {"device_memory": "80KB", "memory": "1MB", "shard_size": "30KB"},
    "two devices": {"device": "cuda:0,cuda:1", "device_memory": "330KB", "memory": "1MB"},
}


@pytest.mark.parametrize(
    "base, budget", [*(("base", budget) for budget in BUDGETS), ("f32", "parts"), ("f16", "parts")]
)
def test_files_are_those_of_the_cpu(home, tmp_path, devices, base, budget):
    options = BUDGETS[budget]
    if not devices and torch.cuda.device_count() < 2:
        options = {**options, "device": "cuda:0"}
    names = LOW if budget == "parts" else CASES
    report = both(adapters(home, *names, base=base), tmp_path, **options)
    assert not [text for text in report.warnings if "merged on the CPU" in text]
    if devices:
        kept_within(devices, report, options)
        base_bytes = sum(o.nbytes for o in report.plan.outputs if on_device(o, True))
        assert base_bytes > 40_000 and sum(d.uploaded for d in devices) > base_bytes
    assert verify(tmp_path / "out", samples=20).ok


@pytest.mark.parametrize("memory", ["80KB", "100MB"])
def test_transposed_weights_and_other_output_types(home, tmp_path, devices, memory):
    write_model(tmp_path / "gpt", {"model.layers.1.q_proj.weight": torch.randn(33, 64).bfloat16()})
    made = {
        "merge_method": "passthrough",
        "models": [{"model": f"{tmp_path / 'gpt'}+{home / 'conv1d'}"}],
        "out_dtype": "float32",
    }
    both(made, tmp_path, device_memory=memory)


METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"parameters": {"density": 0.4}},
    "ties model": {"parameters": {"density": 0.4}, "scope": "model"},
    "dare_ties": {"parameters": {"density": 0.5, "rescale": "l1"}},
}


def composed(home: Path, method: str, *names: str) -> dict[str, Any]:
    """A recipe over models with adapters, and one of float32 without."""
    models = [f"{home / 'base'}+{home / name}" for name in names] + [str(home / "f32")]
    made: dict[str, Any] = {"merge_method": method.split()[0], **METHODS[method]}
    if method != "linear":
        made["base_model"] = str(home / "base")
    return {**made, "models": [{"model": m, "parameters": {"weight": 0.6}} for m in models]}


@pytest.mark.parametrize(
    "method, memory", [*((method, "330KB") for method in METHODS), ("ties", "100MB"), ("ties model", "100MB")]
)
def test_models_with_adapters_in_recipes(home, tmp_path, devices, method, memory):
    report = both(composed(home, method, "extras", "dora", "experts"), tmp_path, device_memory=memory)
    assert not [text for text in report.warnings if "merged on the CPU" in text]


@pytest.mark.parametrize("method", ["linear", "ties model"])
def test_norms_of_columns_are_left_to_the_cpu(home, tmp_path, devices, method):
    report = both(composed(home, method, "columns", "a"), tmp_path)
    told = f"1 tensors with adapters are merged on the CPU, not on cuda:0: {COLUMNS}"
    assert told in report.warnings


def test_the_roundings_of_peft_are_left_to_the_cpu(home, tmp_path, devices):
    report = both(adapters(home, "a", "dora", rounding="peft"), tmp_path)
    assert f"3 tensors with adapters are merged on the CPU, not on cuda:0: {COLUMNS}" in report.warnings
    if devices:
        assert devices[0].uploaded == 0


@pytest.mark.parametrize("backend", ["cuda", "ref"])
def test_forced_backends(home, tmp_path, monkeypatch, backend):
    """Where no kernel keeps the CPU's order of sums, the CPU merges."""
    if why := backends.missing(backend):
        pytest.skip(why)
    made = install(monkeypatch)
    names = ("a", "extras", "dora")
    with pykernels.use_backend("ref" if backend == "ref" else "cpu"):
        merge(adapters(home, *names), tmp_path / "cpu")
    with pykernels.use_backend(backend):
        try:
            report = merge(adapters(home, *names), tmp_path / "out", device="cuda:0")
        except ValueError as error:
            pytest.skip(f"addresses another memory: {error}")
    left = [text for text in report.warnings if "with adapters are merged on the CPU" in text]
    assert bool(left) == (backend != "cuda") and bool(made[0].uploaded) == (backend == "cuda")
    assert all(text.endswith("no CUDA kernels there") for text in left)
    assert files(tmp_path / "out") == files(tmp_path / "cpu")


def planned(home: Path, made: Any) -> Plan:
    return make_plan(made if isinstance(made, Recipe) else read_recipe(made))


@pytest.mark.parametrize("kind, memory", [("adapters", 80_000), ("recipe", 330_000), ("recipe", 10**8)])
def test_loads_hold_no_more_than_was_foreseen(home, kind, memory):
    made = (
        adapters(home, *LOW) if kind == "adapters" else composed(home, "linear", "experts", "extras", "dora")
    )
    plan = planned(home, made)
    budget = DeviceBudget.of(plan, 10**7, memory, 1)
    loads = [load for unit in schedule(plan, budget) for load in unit.loads]
    assert all(load.nbytes <= budget.room for load in loads)
    parts = [part for load in loads for part in load.parts]
    assert all(scratch_of(part.out, part.count) <= memory // 4 for part in parts)
    assert memory > 10**6 or len(parts) > len({part.number for part in parts})
    for out in filter(is_adapted, plan.outputs):
        for first in range(0, out.numel, 997):
            for count in (1, 40, 400, out.numel - first):
                part = Part(0, out, first, min(count, out.numel - first))
                assert place((part,)).nbytes <= most_bytes(out, part.count)


def test_what_joining_takes_is_within_the_scratch(home):
    """Of host memory, as the same operations run there."""
    plan = planned(home, adapters(home, "a", "dora", "extras"))
    [out] = [o for o in plan.outputs if o.name == "model.layers.0.q_proj.weight"]
    [source] = out.sources
    ranks = sum(change.rank for change in source.changes)
    joined = 4 * ranks * (67 + 131)  # left and right of the last product
    assert joined + 3 * 8 * 4 * 67 <= scratch(source, out.numel)


def test_too_little_device_memory_says_how_much_is_needed(home, tmp_path, devices):
    with pytest.raises(
        ValueError, match=r"device_memory must be at least (\d+) bytes for this merge"
    ) as told:
        merge(adapters(home, "a", "dora"), tmp_path / "out", device="cuda:0", device_memory="2KB")
    assert not (tmp_path / "out").exists()
    least = int(str(told.value).split()[5])
    both(adapters(home, "a", "dora"), tmp_path, device_memory=least)


@pytest.mark.parametrize("stage", ["upload", "merge", "download"])
def test_a_device_fails_in_the_middle(home, tmp_path, monkeypatch, stage):
    install(monkeypatch, fault=at_call(2, stage, Broken("the device fell off")))
    with pytest.raises(Broken, match="the device fell off"):
        merge(
            adapters(home, "a", "dora"),
            tmp_path / "out",
            device="cuda:0",
            device_memory="80KB",
            memory="1MB",
        )
    nothing_is_left(tmp_path / "out")


def test_what_is_not_finite_is_counted(home, tmp_path, devices):
    tensors = factors("model.layers.0.q_proj", 67, 131, seed=8)
    tensors["model.layers.0.q_proj.lora_A.weight"][:, 5] = math.inf
    write_adapter(tmp_path / "inf", tensors)
    report = both(adapter_recipe(str(home / "base"), [str(tmp_path / "inf")]), tmp_path)
    assert report.nonfinite == {"model.layers.0.q_proj.weight": 67}


def test_the_command_takes_devices(home, tmp_path, monkeypatch):
    install(monkeypatch)
    arguments = ["lora", "merge", str(home / "base"), str(home / "a"), str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--device", "cuda:0", "--device-memory", "1MB"])
    assert result.exit_code == 0 and "cuda:0 (host memory): merges with backend" in result.output, (
        result.output
    )
