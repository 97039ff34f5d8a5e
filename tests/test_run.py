"""Merges from end to end: right numbers, the same bits whatever the budget, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pykernels
from pykernels.engine import writer
from pykernels.engine.files import FileError
from pykernels.engine.nonfinite import count_nonfinite
from pykernels.engine.preflight import OutputError
from pykernels.engine.run import Progress, merge
from tests.checkpoints import METHODS, SHAPES, WEIGHTS, load, recipe, same, write_model, write_models


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes in bfloat16."""
    path = tmp_path_factory.mktemp("models")
    write_models(path)
    return path


def expected(home: Path, method: str) -> dict[str, torch.Tensor]:
    """The merge by the public ops, tensor by tensor."""
    base, tuned = load(home / "base"), [load(home / f"t{i}") for i in range(3)]
    merged = {}
    for name, b in base.items():
        t = [state[name] for state in tuned]
        if not b.is_floating_point():
            merged[name] = b
        elif method == "linear":
            merged[name] = pykernels.linear_merge(t, list(WEIGHTS))
        elif method == "task_arithmetic":
            merged[name] = pykernels.task_arithmetic(b, t, weight=list(WEIGHTS), lambda_=0.7)
        elif method == "ties":
            merged[name] = pykernels.ties_merge(b, t, density=0.3, weight=list(WEIGHTS), lambda_=0.9)
        elif method == "dare_linear":
            merged[name] = pykernels.dare_merge(b, t, density=0.5, seed=11, name=name, weight=list(WEIGHTS))
        else:
            merged[name] = pykernels.dare_merge(
                b, t, density=0.6, seed=12, name=name, weight=list(WEIGHTS), rescale="l1", consensus="ties",
                normalize=True,
            )  # fmt: skip
    return merged


BUDGETS: dict[str, dict[str, Any]] = {
    "one shard": {},
    "small memory": {"memory": "1MB"},
    "small shards": {"shard_size": "20KB"},
    "both, one thread": {"memory": "1MB", "shard_size": 30_000, "threads": 1},
    "durable": {"durable": True, "shard_size": "60KB"},
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", METHODS)
def test_bits_are_those_of_the_ops_whatever_the_budget(
    home: Path, tmp_path: Path, method: str, budget: str
) -> None:
    report = merge(recipe(home, method), tmp_path / "out", **BUDGETS[budget])
    assert same(load(tmp_path / "out"), expected(home, method))
    assert report.tensors == len(SHAPES) + 2 and not report.nonfinite and report.seconds > 0
    assert (report.shards > 1) == ("shard_size" in BUDGETS[budget])


@pytest.mark.parametrize("memory", ["1MB", "2GB"])
def test_model_scope_trims_over_all_tensors(home: Path, tmp_path: Path, memory: str) -> None:
    merge(recipe(home, "ties", scope="model"), tmp_path / "out", memory=memory)
    names = sorted(SHAPES)
    base, tuned = load(home / "base"), [load(home / f"t{i}") for i in range(3)]

    def joined(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([state[name].reshape(-1) for name in names])

    whole = pykernels.ties_merge(
        joined(base), [joined(t) for t in tuned], density=0.3, weight=list(WEIGHTS), lambda_=0.9
    )
    out = load(tmp_path / "out")
    assert torch.equal(torch.cat([out[name].reshape(-1) for name in names]), whole)


@pytest.mark.parametrize("memory", ["1MB", "2GB"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_mixed_dtypes_are_widened_exactly(tmp_path: Path, method: str, memory: str) -> None:
    write_models(tmp_path, torch.bfloat16, tuned=1)
    b = load(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    floats = {
        n: t.float() + 0.02 * torch.randn(t.shape, generator=generator) for n, t in b.items() if n in SHAPES
    }
    rest = {n: t for n, t in b.items() if n not in SHAPES}
    write_model(tmp_path / "t1", {**rest, **{n: t.half() for n, t in floats.items()}})
    write_model(tmp_path / "t2", {**rest, **floats})
    merge(recipe(tmp_path, method), tmp_path / "out", memory=memory)
    for name in ("base", "t0", "t1"):  # the same models, all in float32 from the start
        state = load(tmp_path / name)
        save_file(
            {n: t.float() if n in SHAPES else t for n, t in state.items()},
            tmp_path / name / "model.safetensors",
        )
    merge(recipe(tmp_path, method, dtype="bfloat16"), tmp_path / "wide", memory=memory)
    assert same(load(tmp_path / "out"), load(tmp_path / "wide"))


def test_float64_goes_to_the_reference(tmp_path: Path) -> None:
    write_models(tmp_path, torch.float64)
    merge(recipe(tmp_path, "task_arithmetic"), tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    base, tuned = load(tmp_path / "base")[name], [load(tmp_path / f"t{i}")[name] for i in range(3)]
    wanted = base + 0.7 * sum(w * (t - base) for w, t in zip(WEIGHTS, tuned, strict=True))
    torch.testing.assert_close(load(tmp_path / "out")[name], wanted, rtol=1e-12, atol=1e-12)


def test_data_at_odd_offsets(home: Path, tmp_path: Path) -> None:
    merge(recipe(home, "ties"), tmp_path / "aligned")
    for name in ("base", "t0", "t1", "t2"):
        write_model(tmp_path / name, load(home / name))
        path = tmp_path / name / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little") + 3
        path.write_bytes(length.to_bytes(8, "little") + raw[8 : length + 5] + b"   " + raw[length + 5 :])
    merge(recipe(tmp_path, "ties"), tmp_path / "odd")
    assert same(load(tmp_path / "odd"), load(tmp_path / "aligned"))


def test_models_in_the_hub_cache(home: Path, tmp_path: Path) -> None:
    """Every file of a snapshot is a link into the blobs beside it."""
    for name in ("base", "t0"):
        cache = tmp_path / f"models--org--{name}"
        write_model(cache / "blobs", load(home / name))
        (cache / "snapshots" / name).mkdir(parents=True)
        for blob in (cache / "blobs").iterdir():
            (cache / "snapshots" / name / blob.name).symlink_to(f"../../blobs/{blob.name}")
        (tmp_path / name).symlink_to(cache / "snapshots" / name)
    merge(recipe(tmp_path, "linear", tuned=1, base_model=str(tmp_path / "base")), tmp_path / "out")
    assert same(load(tmp_path / "out"), load(home / "t0"))
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (
        tmp_path / "out" / "tokenizer.json"
    ).is_symlink()


def test_without_the_extension(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pykernels.use_backend("ref"):
        merge(recipe(home, "ties"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pykernels.json").read_text())["backend"] == "ref"
    for name, wanted in expected(home, "ties").items():
        torch.testing.assert_close(load(tmp_path / "out")[name], wanted)
    values = torch.tensor([1.0, float("nan"), float("-inf"), 65504.0, 0.0]).half()
    assert count_nonfinite(values) == 2
    monkeypatch.setattr("pykernels.backends.missing", lambda name: "not built")
    assert count_nonfinite(values) == 2


def test_what_lies_beside_the_weights(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(recipe(home, "ties", dtype="float16"), out, shard_size="30KB", seed=5)
    shards = sorted(out.glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert {p.name for p in out.iterdir()} - {p.name for p in shards} == {
        "model.safetensors.index.json", "config.json", "tokenizer.json", "chat_template.jinja", "README.md",
        "pykernels.json",
    }  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama", "torch_dtype": "float16"}
    assert "merge_method: ties" in (out / "README.md").read_text()
    record = json.loads((out / "pykernels.json").read_text())
    assert (
        record["seed"] == 5
        and record["backend"] in ("cpu", "ref")
        and set(record["tensors"]) == set(load(out))
    )
    assert all(len(t["xxh3_128"]) == 32 for t in record["tensors"].values())


def test_nan_and_overflow_are_counted(home: Path, tmp_path: Path) -> None:
    for name in ("base", "t0", "t1", "t2"):
        state = load(home / name)
        if name == "t1":
            state["model.norm.weight"] = torch.full((1,), float("nan")).bfloat16()
            state["model.embed_tokens.weight"][5, :3] = 3e38
        write_model(tmp_path / name, state)
    report = merge(recipe(tmp_path, "linear", dtype="float16"), tmp_path / "out", memory="1MB")
    assert report.nonfinite == {"model.norm.weight": 1, "model.embed_tokens.weight": 3}
    assert "model.norm.weight (1)" in report.warnings[-1]


def test_progress_ends_at_the_total(home: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    merge(recipe(home, "ties"), tmp_path / "out", progress=seen.append)
    assert seen[-1].done == seen[-1].total > 0


def test_dry_run_writes_nothing(home: Path, tmp_path: Path) -> None:
    report = merge(recipe(home, "ties"), tmp_path / "deep" / "out", dry_run=True)
    assert report.dry_run and report.written > 0 and not (tmp_path / "deep").exists()


def test_no_float_tensors_at_all(tmp_path: Path) -> None:
    for name in ("base", "t0"):
        write_model(tmp_path / name, {"ids": torch.arange(3)})
    merge(recipe(tmp_path, "ties", tuned=1), tmp_path / "out")
    assert same(load(tmp_path / "out"), {"ids": torch.arange(3)})


# What must be refused


@pytest.mark.parametrize(
    "tensor, values",
    [("model.position_ids", "element 3 is 3 and 7000000000"), ("model.flags", "element 0 is 1 and 0")],
)
def test_other_tensors_must_be_equal(home: Path, tmp_path: Path, tensor: str, values: str) -> None:
    for name in ("base", "t0"):
        state = load(home / name)
        if name == "t0":
            if tensor == "model.position_ids":
                state[tensor][3] = 7_000_000_000
            else:
                state[tensor] = ~state[tensor]
        write_model(tmp_path / name, state)
    with pytest.raises(
        OutputError, match=f"tensor '{tensor}' .* differs between .*base.* and .*t0.*: {values}$"
    ):
        merge(recipe(tmp_path, "ties", tuned=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_rules(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".pykernels-dead").mkdir()
    merge(recipe(home, "linear"), out, shard_size="30KB")  # empty but for the leftovers of a killed run
    assert not (out / ".pykernels-dead").exists()
    with pytest.raises(OutputError, match="is not empty"):
        merge(recipe(home, "linear"), out)
    (out / "mine.txt").write_text("kept")
    merge(recipe(home, "linear"), out, overwrite=True)
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert (out / "mine.txt").read_text() == "kept"
    for place in (home / "t0", home / "sub" / ".." / "base"):
        (home / "sub").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match="is the directory of the input"):
            merge(recipe(home, "ties"), place, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a directory"):
        merge(recipe(home, "ties"), tmp_path / "file")


def test_no_room(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    few = os.statvfs_result((*real[:4], 100, *real[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda path: few)
    with pytest.raises(OutputError, match=f"needs .* {100 * real.f_frsize} are free"):
        merge(recipe(home, "ties"), tmp_path / "out")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"memory": "10KB"}, "memory must be at least"),
        ({"memory": "much"}, 'memory must be a size such as "2GB"'),
        ({"shard_size": "5 furlongs"}, "shard_size must be a size"),
        ({"shard_size": 0}, "shard_size must be at least 1 byte"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_options(home: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merge(recipe(home, "ties"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_config_that_leads_out(home: Path, tmp_path: Path) -> None:
    for name in ("base", "t0"):
        write_model(tmp_path / name, load(home / name))
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(FileError, match="leads out of the model directory"):
        merge(recipe(tmp_path, "ties", tuned=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Faults on the way


def failing(count: int, error: OSError) -> Any:
    """A pwrite that fails at its ``count``-th call."""
    real, calls = os.pwrite, [0]

    def pwrite(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] == count:
            raise error
        return real(*arguments)

    return pwrite


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_failed_write_leaves_no_final_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, overwrite: bool
) -> None:
    out = tmp_path / "out"
    before = {}
    if overwrite:
        merge(recipe(home, "linear"), out)
        before = load(out)
    monkeypatch.setattr(writer.os, "pwrite", failing(count, OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left") as caught:
        merge(recipe(home, "ties"), out, shard_size="40KB", memory="1MB", overwrite=overwrite)
    assert caught.value.errno == errno.ENOSPC and "model-0000" in str(caught.value.filename)
    assert out.exists() == overwrite and (not overwrite or same(load(out), before))
    monkeypatch.undo()
    merge(recipe(home, "ties"), out, overwrite=overwrite)
    assert same(load(out), expected(home, "ties"))


def test_an_interrupt_leaves_no_final_name(home: Path, tmp_path: Path) -> None:
    def interrupt(state: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe(home, "ties"), tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_is_noticed(home: Path, tmp_path: Path) -> None:
    for name in ("base", "t0"):
        write_model(tmp_path / name, load(home / name))

    def touch(state: Progress) -> None:
        os.utime(tmp_path / "t0" / "model.safetensors")

    with pytest.raises(FileError, match="changed since its header was read"):
        merge(recipe(tmp_path, "ties", tuned=1), tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_two_merges_into_one_place(home: Path, tmp_path: Path) -> None:
    def again(state: Progress) -> None:
        if state.done < state.total:
            with pytest.raises(OutputError, match="another run is writing"):
                merge(recipe(home, "ties"), tmp_path / "out")

    merge(recipe(home, "ties"), tmp_path / "out", progress=again)
    assert same(load(tmp_path / "out"), expected(home, "ties"))


def test_file_descriptors_do_not_leak(home: Path, tmp_path: Path) -> None:
    merge(recipe(home, "ties"), tmp_path / "first")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for i in range(3):
        merge(recipe(home, "ties"), tmp_path / f"out{i}", shard_size="30KB")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
