"""Files that must be refused, by class, with file, tensor and sizes in the message; odd ones that load."""

from __future__ import annotations

import gc
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pykernels.engine.files import FileError, header_bytes, open_checkpoint
from pykernels.engine.header import MAX_HEADER, MAX_RANK, parse_header
from pykernels.engine.mapped import MappedFile


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def container(
    header: str | bytes | dict[str, Any], data: int | bytes = 0, length: int | None = None
) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return (
        struct.pack("<Q", len(raw) if length is None else length)
        + raw
        + (bytes(data) if isinstance(data, int) else data)
    )


A = entry("F32", [2], 0, 8)
A_TEXT = json.dumps(A)
EMPTY = entry("I8", [0], 0, 0)
ODD_NAMES = ["", "../x", "ü\u20ac", "a\tb", "no", "\U0001f600"]
WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2,    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip


def one(**changes: Any) -> bytes:
    return container({"a": {**A, **changes}}, 8)


def with_extra(text: str) -> bytes:
    """A valid entry with an unknown field of this JSON text."""
    return container(f'{{"a":{A_TEXT[:-1]},"x":{text}}}}}', 8)


def spelled(fields: str) -> bytes:
    """An entry whose dtype and shape are this JSON text."""
    return container(f'{{"a":{{{fields},"data_offsets":[0,8]}}}}', 8)


REFUSED: dict[str, tuple[bytes, str]] = {
    # not a weights file
    "empty": (b"", "empty"),
    "seven bytes": (b"1234567", "too short"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-LFS pointer"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "html after blanks": (b"\n\n  <HTML><body>not here</body></html>", "HTML"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "pickle": (b"\x80\x02}q\x00(X\x06\x00\x00\x00weight" + bytes(40), "pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(40), "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    # header length
    "length 0": (container("{}", 8, length=0), "header length 0"),
    "length past the end": (container("{}", 8, length=11), "header length 11 exceeds the 10 bytes"),
    "length above the limit": (container("{}", 8, length=MAX_HEADER + 1), f"exceeds the limit {MAX_HEADER}"),
    "length 2^64 - 1": (container("{}", 8, length=2**64 - 1), "exceeds the limit"),
    "length right in 32 bits": (container("{}", 8, length=2**32 + 2), "header length 4294967298"),
    "length big-endian": (struct.pack(">Q", 2) + b"{}", "other byte order"),
    "length ends inside the JSON": (container({"a": A}, 8, length=20), "header"),
    "length swallows data": (container("{}", b"\x01" * 8, length=6), "must end with '}'"),
    # header text
    "not UTF-8": (container(b'{"\xff": 1}'), "not UTF-8"),
    "UTF-16": (container("{}".encode("utf-16-le")), "header"),
    "overlong UTF-8": (container(b'{"\xc0\xaf": 1}'), "not UTF-8"),
    "byte-order mark": (container(b"\xef\xbb\xbf{}"), "must begin with '{'"),
    "leading blank": (container(" {}"), "must begin with '{'"),
    "an array": (container("[]"), "must begin with '{'"),
    "null": (container("null"), "must begin with '{'"),
    "trailing content": (container("{}{}"), "not valid JSON"),
    "padded with tabs": (container("{}\t"), "must end with '}'"),
    "padded with zeros": (container(b"{}\0\0"), "must end with '}'"),
    "trailing comma": (container('{"a": 1,}'), "not valid JSON"),
    "comment": (container('{/* x */}'), "not valid JSON"),
    "single quotes": (container("{'a': 1}"), "not valid JSON"),
    "NaN": (container('{"a": {"x": NaN}}'), "NaN is not JSON"),
    "Infinity": (container('{"a": -Infinity}'), "-Infinity is not JSON"),
    "control character in a name": (container('{"a\nb": 1}'), "not valid JSON"),
    "lone high surrogate": (container('{"\\ud800": 1}'), "surrogate"),
    "lone low surrogate": (container('{"a": "\\udc00"}'), "surrogate"),
    "surrogates in wrong order": (container('{"\\udc00\\ud800": 1}'), "surrogate"),
    "surrogate before text": (container('{"\\ud800x": 1}'), "surrogate"),
    "nested 100000 deep": (container('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nest"),
    "nested 200 deep": (with_extra("[" * 200 + "]" * 200), "nesting"),
    "number of 100000 digits": (container('{"a":' + "9" * 100_000 + "}"), "header"),
    "number out of range": (with_extra("1e999"), "out of range"),
    # duplicate keys
    "duplicate tensor": (container(f'{{"a":{A_TEXT},"a":{A_TEXT}}}', 8), "duplicate key 'a'"),
    "duplicate by escapes": (container(f'{{"a":{A_TEXT},"\\u0061":{A_TEXT}}}', 8), "duplicate key 'a'"),
    "duplicate field": (spelled('"dtype":"F32","dtype":"F32","shape":[2]'), "duplicate key 'dtype'"),
    "duplicate metadata": (container('{"__metadata__":{"k":"1","k":"2"}}'), "duplicate key 'k'"),
    "two metadata": (container('{"__metadata__":{},"__metadata__":{}}'), "duplicate key '__metadata__'"),
    "duplicate in an unknown field": (with_extra('{"k":1,"k":1}'), "duplicate key 'k'"),
    # entry
    "entry is a number": (container({"a": 1}), "tensor 'a': its entry must be an object, got an integer"),
    "entry is null": (container({"a": None}), "got null"),
    "no dtype": (container({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8), "field dtype is missing"),
    "no shape": (container({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8), "field shape is missing"),
    "no offsets": (container({"a": {"dtype": "F32", "shape": [2]}}, 8), "field data_offsets is missing"),
    "unknown dtype": (one(dtype="F33"), "unknown dtype 'F33'"),
    "dtype in small letters": (one(dtype="f32"), "unknown dtype 'f32'"),
    "dtype is a number": (one(dtype=32), "unknown dtype"),
    "shape is a number": (one(shape=2), "shape must be an array"),
    "dimension is a boolean": (one(shape=[True, 2]), "shape must hold integers, got a boolean"),
    "dimension is a float": (one(shape=[2.0]), "shape must hold integers, got a float"),
    "dimension in exponent form": (spelled('"dtype":"F32","shape":[2e0]'), "got a float"),
    "dimension is a string": (one(shape=["2"]), "shape must hold integers, got a string"),
    "dimension is negative": (one(shape=[-2]), "outside"),
    "dimension is -0": (spelled('"dtype":"F32","shape":[-0]'), "got a float"),
    "dimension of 65 bits": (one(shape=[2**64]), "outside"),
    "offset is negative": (one(data_offsets=[-8, 0]), "outside"),
    "offset is a boolean": (one(data_offsets=[False, 8]), "data_offsets must hold integers"),
    "three offsets": (one(data_offsets=[0, 4, 8]), "must be [begin, end]"),
    "offsets reversed": (one(data_offsets=[8, 0]), "must be [begin, end]"),
    "elements overflow": (one(shape=[2**32, 2**32, 2**32]), "overflows"),
    "elements wrap to 2": (one(shape=[2**63, 2, 1]), "overflows"),
    "bytes overflow": (one(shape=[2**62 + 2]), "overflows"),
    "zero hides an overflow": (container({"a": entry("F32", [0, 2**62, 2**62], 0, 0)}), "overflows"),
    "rank": (one(shape=[1] * MAX_RANK + [2]), f"the limit is {MAX_RANK}"),
    "sub-byte": (one(dtype="F4", shape=[3], data_offsets=[0, 2]), "whole bytes"),
    "range too long": (one(shape=[1]), "takes 4 bytes, data_offsets [0, 8] hold 8"),
    "range too short": (one(shape=[4]), "takes 16 bytes"),
    # layout
    "hole": (container({"a": A, "b": entry("F32", [1], 12, 16)}, 16), "'b' (bytes 12 to 16) leaves a hole"),
    "overlap": (container({"a": A, "b": entry("F32", [2], 4, 12)}, 12), "'b' (bytes 4 to 12) overlaps"),
    "shared range": (container({"a": A, "b": A}, 8), "overlaps"),
    "data before the first": (container({"a": entry("F32", [2], 4, 12)}, 12), "hole behind the start"),
    "data behind the last": (container({"a": A}, 9), "1 bytes behind the last tensor"),
    "data without tensors": (container("{}", 4), "4 bytes behind the last tensor"),
    "truncated": (container({"a": A}, 7), "truncated: tensor 'a' ends at data byte 8, the file holds 7"),
    "memory bomb": (container({f"t{i}": A for i in range(60_000)}, 8), "overlap"),
    # names and metadata
    "metadata is null": (container('{"__metadata__":null}'), "__metadata__ must be an object"),
    "metadata is an array": (container('{"__metadata__":[]}'), "__metadata__ must be an object"),
    "metadata value is a number": (container('{"__metadata__":{"k":1}}'), "__metadata__['k'] must be a"),
    "metadata value is an object": (container('{"__metadata__":{"k":{}}}'), "__metadata__['k'] must be"),
    "tensor named __metadata__": (container({"__metadata__": A}, 8), "must be a string"),
}  # fmt: skip


STRICTER = {
    "padded with tabs", "duplicate metadata", "duplicate tensor", "duplicate by escapes", "metadata is null",
    "rank", "duplicate in an unknown field", "zero hides an overflow",
}  # fmt: skip
"""Cases that the format's own reader lets pass, and its description does not."""


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    content, words = REFUSED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        open_checkpoint(tmp_path)
    text = str(caught.value)
    assert words in text and str(path) in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    "case", [c for c in REFUSED if REFUSED[c][0][8:9] == b"{" and len(REFUSED[c][0]) < 10_000]
)
def test_stricter_than_the_format_reader_only_where_meant(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(REFUSED[case][0])
    try:
        with safe_open(path, "pt"):
            accepted = True
    except Exception:
        accepted = False
    assert accepted == (case in STRICTER)


def test_names_in_messages_are_escaped_and_cut(tmp_path: Path) -> None:
    name = "x\x1b[31m" + "y" * 1_000_000
    (tmp_path / "model.safetensors").write_bytes(container({name: {**A, "shape": [3]}}, 8))
    with pytest.raises(FileError) as caught:
        open_checkpoint(tmp_path)
    assert "\\x1b[31m" in str(caught.value) and "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


ACCEPTED: dict[str, tuple[bytes, int]] = {
    "no tensors": (container("{}"), 0),
    "metadata only": (container({"__metadata__": {"format": "pt"}}), 0),
    "rank 0": (container({"a": entry("F32", [], 0, 4)}, 4), 1),
    "zero-size tensors at one offset": (
        container({"z": entry("F32", [0, 3], 8, 8), "a": A, "y": entry("I8", [0], 8, 8), "x": EMPTY}, 8),
        4,
    ),
    "header order is not data order": (container({"b": entry("F32", [1], 8, 12), "a": A}, 12), 2),
    "header length not a multiple of 8": (container('{"a":' + A_TEXT + "}   ", 8), 1),
    "long padding": (container('{"a":' + A_TEXT + "}" + " " * 100_000, 8), 1),
    "data at odd offsets": (container({"o": entry("U8", [1], 0, 1), "a": entry("F32", [2], 1, 9)}, 9), 2),
    "odd names": (container({n: entry("U8", [1], i, i + 1) for i, n in enumerate(ODD_NAMES)}, 6), 6),
    "escaped surrogate pair": (container('{"\\ud83d\\ude00":' + A_TEXT + "}", 8), 1),
    "escaped backslash before ud800": (container('{"\\\\ud800":' + A_TEXT + "}", 8), 1),
    "unknown field": (container({"a": {**A, "note": {"deep": [1, 2.5, None]}}}, 8), 1),
    "every dtype of whole bytes": (
        container(
            {d: entry(d, [8 // w], i * 8, i * 8 + 8) for i, (d, w) in enumerate(WIDTHS.items())},
            8 * len(WIDTHS),
        ),
        len(WIDTHS),
    ),
    "F4 in whole bytes": (container({"a": entry("F4", [4], 0, 2)}, 2), 1),
    "NaN and Inf": (container({"a": A}, struct.pack("<ff", float("nan"), float("inf"))), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(tmp_path: Path, case: str) -> None:
    content, count = ACCEPTED[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.tensors) == count and not checkpoint.warnings
    for name, info in checkpoint.tensors.items():
        assert info.name == name and 8 < info.start <= info.end <= len(content)
    (identity,) = checkpoint.files.values()
    assert identity.size == len(content) and len(identity.header_sha256) == 64


def test_nul_in_a_name_warns(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(container({"a\0b": A}, 8))
    assert "NUL" in open_checkpoint(tmp_path).warnings[0]


def test_sparse_file_larger_than_memory(tmp_path: Path) -> None:
    size = 1 << 36
    path = tmp_path / "model.safetensors"
    head = container({"a": entry("BF16", [size // 2], 0, size)})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    info = open_checkpoint(tmp_path).tensors["a"]
    mapped = MappedFile(info.file)
    chunk = mapped.tensor(info.start + (1 << 35), info.start + (1 << 35) + 4096, torch.bfloat16)
    assert chunk.numel() == 2048 and not chunk.any()


def test_tensors_alias_the_file_at_any_alignment_and_outlive_it(tmp_path: Path) -> None:
    values = torch.randn(1001)
    text = json.dumps({"o": entry("BOOL", [3], 0, 3), "a": entry("F32", [1001], 3, 3 + 4004)})
    text += " " * (-len(text) % 8)
    content = container(text, b"\x00\x02\xff" + values.numpy().tobytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    tensors = open_checkpoint(tmp_path).tensors
    mapped = MappedFile(tensors["a"].file)
    a = mapped.tensor(tensors["a"].start, tensors["a"].end, torch.float32)
    assert a.data_ptr() % 4 and torch.equal(a, values)
    mapped.drop(0, 4096)
    assert mapped.tensor(8, 8, torch.float32).numel() == 0
    del mapped
    gc.collect()
    assert torch.equal(a, values)


def test_written_headers_are_read_by_the_format_reader(tmp_path: Path) -> None:
    tensors = [("b.ü", "BF16", [3, 5], 30), ("a", "F32", [], 4), ("z", "I64", [0, 2], 0)]
    head = header_bytes(tensors, {"format": "pt"})
    assert len(head) % 4096 == 0
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + bytes(34))
    assert {k: tuple(v.shape) for k, v in load_file(path).items()} == {"b.ü": (3, 5), "a": (), "z": (0, 2)}
    assert open_checkpoint(tmp_path).metadata == {"format": "pt"}
    with pytest.raises(FileError, match="is taken"):
        header_bytes([("__metadata__", "F32", [], 4)])


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "dangling", "loop"])
def test_not_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "gone.safetensors")
    with pytest.raises(FileError, match=r"not a regular file|leads out"):
        open_checkpoint(tmp_path)


def test_header_fields_are_checked_without_a_file() -> None:
    entries, metadata = parse_header("f", json.dumps({"a": A}).encode(), 8)
    assert entries["a"].shape == (2,) and metadata == {}


def test_saved_by_the_format_writer(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 3).bfloat16(), "n": torch.arange(3), "b": torch.tensor([True])}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    found = open_checkpoint(tmp_path).tensors
    assert {n: (i.dtype, i.shape) for n, i in found.items()} == {
        "w": ("BF16", (4, 3)),
        "n": ("I64", (3,)),
        "b": ("BOOL", (1,)),
    }
