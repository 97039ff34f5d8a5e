"""A merge read back: one flipped bit anywhere is found and named, and the numbers are the reference's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pykernels.engine.files import FileError
from pykernels.engine.run import merge
from pykernels.engine.verify import verify
from tests.checkpoints import METHODS, SHAPES, load, recipe, write_model, write_models


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes in bfloat16."""
    path = tmp_path_factory.mktemp("models")
    write_models(path)
    return path


@pytest.fixture
def merged(home: Path, tmp_path: Path) -> Path:
    """A sharded TIES merge."""
    merge(recipe(home, "ties"), tmp_path / "out", shard_size="50KB")
    return tmp_path / "out"


def flip(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_agrees_with_the_reference(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    write_models(tmp_path, dtype)
    merge(recipe(tmp_path, method), tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.ok, str(report)
    assert set(report.recomputed) == {name for name, shape in SHAPES.items() if 0 not in shape}
    assert "verified: 8 tensors" in str(report)


@pytest.mark.parametrize("weights", [(0.5, -0.4, 0.3), (1.0, 0.0, -1.5)], ids=str)
def test_negative_and_zero_weights(home: Path, tmp_path: Path, weights: tuple[float, ...]) -> None:
    for method in ("ties", "dare_ties"):
        asked = recipe(home, method)
        for model, weight in zip(asked["models"], weights, strict=True):
            model["parameters"]["weight"] = weight
        merge(asked, tmp_path / method)
        assert verify(tmp_path / method).ok


def test_model_scope(home: Path, tmp_path: Path) -> None:
    merge(recipe(home, "ties", scope="model"), tmp_path / "out")
    report = verify(tmp_path / "out", samples=2)
    assert report.ok and len(report.recomputed) == 2


@pytest.mark.parametrize("limit", [1 << 30, 10])
def test_model_scope_says_who_found_the_thresholds(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    from pykernels import backends
    from pykernels.engine import recompute
    from pykernels.engine.compute import Compute

    def survey(self: Compute) -> None:
        used.append(backends.call("magnitude_histogram", torch.empty(1)).__module__)
        real(self)

    used: list[str] = []
    real = Compute.survey
    merge(recipe(home, "ties", scope="model"), tmp_path / "out")
    monkeypatch.setattr(recompute, "SURVEYED", limit)
    monkeypatch.setattr(Compute, "survey", survey)
    report = verify(tmp_path / "out", samples=2)
    assert report.ok
    assert any("thresholds" in note for note in report.notes) == (limit == 10)
    assert used[0].startswith("pykernels.ref") or limit == 10


def test_relative_paths_are_found_from_elsewhere(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    merge(recipe(Path(), "ties"), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    report = verify("out")
    assert report.ok and report.recomputed and not report.notes
    record = json.loads((tmp_path / "out" / "pykernels.json").read_text())
    assert [model["name"] for model in record["plan"]["models"]] == ["t0", "t1", "t2", "base"]


def test_a_count_that_the_record_does_not_have(merged: Path) -> None:
    record = json.loads((merged / "pykernels.json").read_text())
    name = "model.norm.weight"
    record["tensors"][name]["nonfinite"] = 3
    (merged / "pykernels.json").write_text(json.dumps(record))
    (failure,) = verify(merged, samples=0).failures
    assert f"tensor '{name}': 0 NaN or infinite elements, the record says 3" in failure


def test_any_flipped_bit_is_found_and_named(merged: Path) -> None:
    draw = random.Random(0)
    record = json.loads((merged / "pykernels.json").read_text())
    outputs = [o for o in record["plan"]["outputs"] if o["end"] > o["start"]]
    for output in outputs:
        shard = record["plan"]["shards"][output["shard"]]["name"]
        at, bit = draw.randrange(output["start"], output["end"]), draw.randrange(8)
        flip(merged / shard, at, bit)
        (failure,) = verify(merged, samples=0).failures
        assert failure.startswith(f"{shard}: tensor '{output['name']}' (bytes {output['start']} to ")
        flip(merged / shard, at, bit)
    assert verify(merged, samples=0).ok


def test_flipped_bits_of_headers_and_small_files(merged: Path) -> None:
    shard = sorted(merged.glob("*.safetensors"))[0]
    for at in (0, 9, 30, 4000):
        flip(shard, at)
        report = verify(merged, samples=0)
        assert any(f"{shard.name}: the header differs" in f and f"at byte {at}" in f for f in report.failures)
        flip(shard, at)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"):
        flip(merged / name, 5)
        assert any(f"'{name}': was changed since the merge" in f for f in verify(merged, samples=0).failures)
        flip(merged / name, 5)
    (merged / "README.md").write_text("a better card")
    assert verify(merged, samples=0).ok


def test_missing_longer_and_foreign_files(merged: Path) -> None:
    first, second = sorted(merged.glob("*.safetensors"))[:2]
    with first.open("ab") as file:
        file.write(b"x")
    second.unlink()
    (merged / "tokenizer.json").unlink()
    save_file({"x": torch.zeros(1)}, merged / "model-extra.safetensors")
    failures = "\n".join(verify(merged).failures)
    assert f"{first.name}: {first.stat().st_size} bytes, {first.stat().st_size - 1} were written" in failures
    assert f"{second.name}: " in failures and "No such file" in failures
    assert "'model-extra.safetensors': not part of this merge" in failures and "tokenizer.json" in failures


def test_wrong_numbers_with_right_checksums_are_found(home: Path, tmp_path: Path) -> None:
    """As if a kernel had erred: the record vouches for the bytes, only the reference can tell."""
    import xxhash

    out = tmp_path / "out"
    merge(recipe(home, "task_arithmetic"), out)
    name = "model.layers.0.mlp.down_proj.weight"
    state = load_file(out / "model.safetensors")
    index = (state[name].float().abs() > 0.5).flatten().nonzero()[3].item()
    record = json.loads((out / "pykernels.json").read_text())
    output = next(o for o in record["plan"]["outputs"] if o["name"] == name)
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[output["start"] + 2 * index] ^= 4  # four units in the last place of one element
    (out / "model.safetensors").write_bytes(raw)
    record["tensors"][name]["xxh3_128"] = xxhash.xxh3_128(raw[output["start"] : output["end"]]).hexdigest()
    (out / "pykernels.json").write_text(json.dumps(record))
    (failure,) = verify(out).failures
    assert f"tensor '{name}': 1 of {257 * 311} elements are not what the reference computes" in failure


def test_nonfinite_elements_are_reported(home: Path, tmp_path: Path) -> None:
    for name in ("base", "t0"):
        state = load(home / name)
        state["model.norm.weight"] = torch.tensor([float("nan")]).bfloat16()
        write_model(tmp_path / name, state)
    merge(recipe(tmp_path, "ties", tuned=1), tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.ok and report.nonfinite == {"model.norm.weight": 1}
    assert "1 NaN or infinite elements in 'model.norm.weight'" in str(report)


def test_without_inputs_the_rest_is_checked(home: Path, tmp_path: Path) -> None:
    for name in ("base", "t0"):
        write_model(tmp_path / name, load(home / name))
    merge(recipe(tmp_path, "ties", tuned=1), tmp_path / "out")
    (tmp_path / "t0" / "model.safetensors").unlink()
    report = verify(tmp_path / "out")
    assert report.ok and not report.recomputed and "the inputs are not at hand" in report.notes[-1]


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "cannot be opened"),
        ("{", "not valid JSON"),
        ("[]", "not a record"),
        ('{"format": 99}', "format '99', this version reads 1"),
        ('{"format": 1, "plan": {}, "tensors": {}, "companions": {}}', "not a record"),
    ],
)
def test_records(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "pykernels.json").write_text(text)
    with pytest.raises(FileError, match=words):
        verify(tmp_path)
