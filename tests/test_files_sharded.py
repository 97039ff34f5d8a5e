"""Model directories: index rules, where shards may lie, and what else a directory may hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pykernels.engine.files import FileError, open_checkpoint, resolve_model

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards with the tensors a and b, and their index."""
    path = tmp_path / "model"
    path.mkdir()
    save_file({"a": torch.ones(2)}, path / ONE)
    save_file({"b": torch.ones(3)}, path / TWO)
    write_index(path, {"a": ONE, "b": TWO}, {"total_size": 20})
    return path


def write_index(path: Path, weight_map: Any, metadata: Any = None) -> None:
    write_text(path, json.dumps({"metadata": metadata or {}, "weight_map": weight_map}))


def write_text(path: Path, text: str) -> None:
    (path / "model.safetensors.index.json").write_text(text)


def refusal(path: Path) -> str:
    with pytest.raises(FileError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_sharded_model(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert list(checkpoint.tensors) == ["a", "b"] and not checkpoint.warnings
    assert checkpoint.tensors["b"].file == str(model / TWO) and set(checkpoint.files) == {
        str(model / ONE),
        str(model / TWO),
    }


BAD_NAMES = {
    "parent": ("../outside/x.safetensors", "plain path"),
    "parent inside": ("sub/../../outside/x.safetensors", "plain path"),
    "absolute": ("/etc/x.safetensors", "absolute path"),
    "url": ("https://host/x.safetensors", "URL"),
    "file url": ("file:///x.safetensors", "URL"),
    "backslash": ("..\\x.safetensors", "backslash"),
    "nul": ("x\0.safetensors", "NUL"),
    "empty": ("", "must end in .safetensors"),
    "dot": (".", "must end in .safetensors"),
    "extension only": (".safetensors", "plain path"),
    "pickle": ("pytorch_model.bin", "must end in .safetensors"),
    "text file": ("config.json", "must end in .safetensors"),
    "double slash": ("sub//x.safetensors", "plain path"),
    "very long": ("x" * 300 + ".safetensors", "too long"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_shard_names(model: Path, case: str) -> None:
    name, words = BAD_NAMES[case]
    (model.parent / "outside").mkdir()
    save_file({"b": torch.zeros(3)}, model.parent / "outside" / "x.safetensors")
    write_index(model, {"a": ONE, "b": name})
    assert words in (text := refusal(model)) and "model.safetensors.index.json" in text


@pytest.mark.parametrize("kind", ["file link", "directory link"])
def test_links_out_of_the_model(model: Path, kind: str) -> None:
    outside = model.parent / "outside"
    outside.mkdir()
    save_file({"b": torch.zeros(3)}, outside / "x.safetensors")
    if kind == "file link":
        (model / "x.safetensors").symlink_to(outside / "x.safetensors")
        write_index(model, {"a": ONE, "b": "x.safetensors"})
    else:
        (model / "sub").symlink_to(outside)
        write_index(model, {"a": ONE, "b": "sub/x.safetensors"})
    assert "leads out of the model directory" in refusal(model)


def test_single_file_linked_out_of_the_model(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(3)}, tmp_path / "x.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "x.safetensors")
    assert "leads out" in refusal(tmp_path / "model")


def test_links_and_folders_inside_the_model(model: Path) -> None:
    (model / "sub").mkdir()
    (model / TWO).rename(model / "sub" / "real.safetensors")
    (model / TWO).symlink_to("sub/real.safetensors")
    assert set(open_checkpoint(model).tensors) == {"a", "b"}
    write_index(model, {"a": ONE, "b": "sub/real.safetensors"}, {"total_size": 20})
    (model / ONE).rename(model / "one.safetensors")
    write_index(model, {"a": "one.safetensors", "b": "sub/real.safetensors"}, {"total_size": 20})
    assert set(open_checkpoint(model).tensors) == {"a", "b"}


@pytest.mark.parametrize("single", [True, False])
def test_hub_cache(tmp_path: Path, single: bool) -> None:
    home = tmp_path / "hub" / "models--org--name"
    snapshot = home / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    names = ["model.safetensors"] if single else [ONE, TWO]
    for i, name in enumerate(names):
        save_file({"ab"[i]: torch.ones(2)}, home / "blobs" / f"blob{i}")
        (snapshot / name).symlink_to(f"../../blobs/blob{i}")
    if not single:
        write_index(home / "blobs", {"a": ONE, "b": TWO}, {"total_size": 16})
        (home / "blobs" / "model.safetensors.index.json").rename(home / "blobs" / "index")
        (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/index")
    assert len(open_checkpoint(snapshot).tensors) == len(names)
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    save_file({"ab"[len(names) - 1]: torch.ones(2)}, other / "blob")
    (snapshot / names[-1]).unlink()
    (snapshot / names[-1]).symlink_to("../../../models--org--other/blobs/blob")
    assert "leads out" in refusal(snapshot)


INDEXES = {
    "not JSON": ("{", "not valid JSON"),
    "array": ("[]", "weight_map must be"),
    "no weight_map": ('{"metadata": {}}', "weight_map must be"),
    "empty weight_map": ('{"weight_map": {}}', "is not empty"),
    "weight_map is an array": ('{"weight_map": ["a"]}', "weight_map must be"),
    "shard is a number": ('{"weight_map": {"a": 1}}', "weight_map['a'] must be the name of a shard"),
    "shard is an array": ('{"weight_map": {"a": ["x"]}}', "weight_map['a']"),
    "shard is null": ('{"weight_map": {"a": null}}', "weight_map['a']"),
    "duplicate tensor": (
        f'{{"weight_map": {{"a": "{ONE}", "b": "{TWO}", "b": "{ONE}"}}}}',
        "duplicate key 'b'",
    ),
    "two weight_maps": (
        f'{{"weight_map": {{"a": "{ONE}"}}, "weight_map": {{"b": "{TWO}"}}}}',
        "duplicate key",
    ),
    "byte-order mark": ("\ufeff{}", "byte-order mark"),
    "deep": ('{"weight_map":' + "[" * 50_000 + "]" * 50_000 + "}", "nesting"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_text(model: Path, case: str) -> None:
    text, words = INDEXES[case]
    write_text(model, text)
    assert words in (said := refusal(model)) and "model.safetensors.index.json" in said


def test_listed_tensor_is_not_there(model: Path) -> None:
    write_index(model, {"a": ONE, "b": TWO, "c": TWO})
    assert "tensor 'c' is not in its shard" in refusal(model)
    write_index(model, {"a": TWO, "b": ONE})
    assert f"it is in '{model / ONE}'" in refusal(model)


def test_missing_shards(model: Path) -> None:
    (model / TWO).unlink()
    assert TWO in (text := refusal(model)) and "No such file" in text
    write_index(model, {"a": ONE})
    assert "shard 2 of 2 of 'model' is missing" in refusal(model)


def test_shard_is_a_fifo(model: Path) -> None:
    (model / TWO).unlink()
    os.mkfifo(model / TWO)
    assert "not a regular file but a FIFO" in refusal(model)


def test_tensor_in_two_shards(model: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, model / TWO)
    assert "tensor 'a' is in two shards" in refusal(model)


def test_warnings(model: Path) -> None:
    save_file({"b": torch.ones(3), "c": torch.ones(1)}, model / TWO)
    save_file({"z": torch.ones(1)}, model / "model.safetensors")
    write_index(model, {"a": ONE, "b": TWO}, {"total_size": -1})
    unlisted, both, size = open_checkpoint(model).warnings
    assert "1 tensors on disk are not listed" in unlisted and "'c'" in unlisted
    assert "the index is read, model.safetensors is not" in both
    assert "total_size is '-1', the listed tensors take 20 bytes" in size
    write_index(model, {"a": ONE, "b": TWO}, {"total_size": "many"})
    assert "'many'" in open_checkpoint(model).warnings[-1]


def test_directories_without_weights(tmp_path: Path) -> None:
    assert "holds neither model.safetensors nor" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "pickled weights are never loaded" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "adapter_model.safetensors")
    assert "only 'adapter_model.safetensors'" in refusal(tmp_path)
    assert "not a model directory" in refusal(tmp_path / "gone")
    assert "give the directory" in refusal(tmp_path / "adapter_model.safetensors")


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    for name, words in (("./gone", "not a hub id"), ("/gone/too", "not a hub id"), ("a/b/c", "not a hub id")):
        with pytest.raises(FileError, match=words):
            resolve_model(name)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="this is a file"):
        resolve_model(str(tmp_path / "file"))


def test_resolve_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    import huggingface_hub
    import huggingface_hub.constants

    real = huggingface_hub.snapshot_download
    asked = []

    def cached(repository: str, **options: Any) -> str:
        asked.append((repository, options["local_files_only"], options["revision"]))
        return str(real(repository, **options, cache_dir=tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert resolve_model("org/name") == snapshot
    with pytest.raises(FileError, match="not found in the local Hugging Face cache; allow the download"):
        resolve_model("org/other@v2")
    assert asked == [("org/name", True, None), ("org/other", True, "v2")]
