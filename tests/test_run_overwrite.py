"""Merges over an older checkpoint: what goes, what stays, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pykernels.engine.run import merge
from tests.checkpoints import load, recipe, same, write_models


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes in bfloat16."""
    path = tmp_path_factory.mktemp("models")
    write_models(path)
    return path


def test_overwriting_replaces_a_checkpoint_and_nothing_else(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(recipe(home, "linear"), out, shard_size="50KB")
    (tmp_path / "bare").mkdir()
    state = {"model.norm.weight": torch.ones(1)}
    for name in ("base", "t0"):
        (tmp_path / "bare" / name).mkdir()
        save_file(state, tmp_path / "bare" / name / "model.safetensors")
    save_file(state, out / "adapter_model.safetensors")
    for name in ("pytorch_model.bin", "generation_config.json", "mine.txt", "modelling.py"):
        (out / name).write_text("mine")
    told: list[str] = []
    report = merge(
        recipe(tmp_path / "bare", "ties", tuned=1), out, overwrite=True,
        planned=lambda plan, texts: told.extend(texts),
    )  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_model.safetensors", "mine.txt", "model.safetensors", "modelling.py",
        "pykernels.json", "pytorch_model.bin",
    ]  # fmt: skip
    (said,) = [text for text in report.warnings if "other weights stay" in text]
    assert "adapter_model.safetensors, pytorch_model.bin" in said and said in told


def test_overwriting_trusts_no_path_in_an_old_record(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(recipe(home, "linear"), out)
    (tmp_path / "tokenizer.json").write_text("not in OUT")
    record = json.loads((out / "pykernels.json").read_text())
    record["companions"]["../tokenizer.json"] = "0"
    (out / "pykernels.json").write_text(json.dumps(record))
    merge(recipe(home, "linear"), out, overwrite=True)
    assert (tmp_path / "tokenizer.json").exists()
    (out / "pykernels.json").write_text("{")
    merge(recipe(home, "linear"), out, overwrite=True)
    merge(recipe(home, "linear"), tmp_path / "fresh")
    assert same(load(out), load(tmp_path / "fresh"))
