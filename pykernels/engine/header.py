"""A safetensors header, read strictly and written: every rule is checked before a byte of data is used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from pykernels.engine.strict_json import FileError, Refused, check_extras, shown, strict_json, unique

MAX_HEADER = 100_000_000
MAX_RANK = 32
DATA_ALIGNMENT = 4096
INT64_MAX = 2**63 - 1
MANY = 50_000

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

LOOKS_LIKE = (
    (re.compile(rb"version https://git-lfs"), "a git-LFS pointer: fetch the real file with `git lfs pull`"),
    (
        re.compile(rb"\s*<(!doctype|html|\?xml|head)", re.IGNORECASE),
        "an HTML or XML page, not the file behind it",
    ),
    (re.compile(rb"PK\x03\x04"), "a zip archive (PyTorch's pickle format is one): convert it to safetensors"),
    (re.compile(rb"\x80[\x02-\x05]"), "a pickle: convert it to safetensors"),
    (re.compile(rb"GGUF"), "a GGUF file"),
    (re.compile(rb"\x89HDF"), "an HDF5 file"),
    (re.compile(rb"\x93NUMPY"), "a NumPy array file"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive"),
)


class Entry(NamedTuple):
    """One tensor of a header; ``start`` and ``end`` are relative to the first data byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def looks_like(head: bytes) -> str | None:
    """What a file that begins with ``head`` is, if it is a well-known other thing."""
    return next((what for pattern, what in LOOKS_LIKE if pattern.match(head)), None)


def read_length(file: str, head: bytes, size: int) -> int:
    """Length of the JSON text, from the first bytes (9 or more) of a file of ``size`` bytes."""
    if size == 0:
        raise FileError(f"{file}: the file is empty (0 bytes); a safetensors file has at least 10")
    length = int.from_bytes(head[:8], "little")
    if size < 8 or not 0 < length <= min(MAX_HEADER, size - 8) or head[8:9] != b"{":
        _bad_length(file, head, size, length)
    return length


def _bad_length(file: str, head: bytes, size: int, length: int) -> NoReturn:
    if what := looks_like(head):
        raise FileError(f"{file}: not a safetensors file: it looks like {what} ({size} bytes)")
    if size < 8:
        raise FileError(f"{file}: {size} bytes is too short for the 8 bytes of a header length: truncated")
    if length == 0:
        raise FileError(f"{file}: header length 0 in a file of {size} bytes; a header has at least 2 bytes")
    if length > min(MAX_HEADER, size - 8):
        hint = "; it would fit in the other byte order" if int.from_bytes(head[:8], "big") <= size - 8 else ""
        limit = f"the limit {MAX_HEADER}" if length > MAX_HEADER else f"the {size - 8} bytes behind it"
        raise FileError(
            f"{file}: header length {length} exceeds {limit} (file size {size}): "
            f"not safetensors or truncated{hint}"
        )
    raise FileError(
        f"{file}: the header must begin with '{{', found {head[8:9]!r} "
        f"(header length {length}, file size {size})"
    )


def parse_header(file: str, raw: bytes, data_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors (in header order) and metadata of the JSON text ``raw`` before ``data_bytes`` bytes of data.

    Raises FileError for anything that the format forbids.
    """
    text = raw.rstrip(b" ")
    if not text.endswith(b"}"):
        raise FileError(
            f"{file}: header: must end with '}}' and spaces only, found {raw[-1:]!r} at byte {len(text) - 1}"
        )
    found = strict_json(text, f"{file}: header", _bounded(data_bytes))
    metadata = _metadata(file, found.pop("__metadata__")) if "__metadata__" in found else {}
    entries = {}
    for name, value in found.items():
        try:
            entries[name] = _entry(value)
        except Refused as error:
            raise FileError(f"{file}: tensor {shown(name)}: {error}") from None
    _check_layout(file, entries, data_bytes)
    return entries, metadata


def _bounded(data_bytes: int) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """A hook that gives up on a memory bomb, many tensors on few bytes, before the last of them is parsed."""
    count = claimed = 0

    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal count, claimed
        result = unique(pairs)
        match result.get("data_offsets"):
            case [int(start), int(end)]:
                count += 1
                claimed += end - start
                if count > MANY and claimed > data_bytes:
                    raise Refused(
                        f"the first {count} tensors overlap: {claimed} bytes in a file of {data_bytes}"
                    )
        return result

    return hook


def _metadata(file: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FileError(f"{file}: __metadata__ must be an object of strings, got {_kind(value)}")
    for key, item in value.items():
        if not isinstance(item, str):
            raise FileError(f"{file}: __metadata__[{shown(key)}] must be a string, got {_kind(item)}")
    return value


_KINDS = {
    dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer",
    float: "a float",
}  # fmt: skip


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def _entry(value: Any) -> Entry:
    if not isinstance(value, dict):
        raise Refused(f"its entry must be an object, got {_kind(value)}")
    try:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    except KeyError as missing:
        raise Refused(f"field {missing.args[0]} is missing") from None
    if len(value) > 3:
        check_extras(value)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Refused(f"unknown dtype {shown(dtype)}; known are {', '.join(BITS)}")
    _check_integers("shape", shape)
    _check_integers("data_offsets", offsets)
    if len(shape) > MAX_RANK:
        raise Refused(f"shape has {len(shape)} dimensions, the limit is {MAX_RANK}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Refused(f"data_offsets must be [begin, end] with begin <= end, got {shown(offsets)}")
    need, held = tensor_bytes(dtype, shape), offsets[1] - offsets[0]
    if held != need:
        raise Refused(f"shape {shape} of {dtype} takes {need} bytes, data_offsets {offsets} hold {held}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_integers(field: str, value: Any) -> None:
    if not isinstance(value, list):
        raise Refused(f"{field} must be an array of integers, got {_kind(value)}")
    for item in value:
        if type(item) is not int:  # bool is an int to isinstance
            raise Refused(f"{field} must hold integers, got {_kind(item)} ({shown(item, 40)})")
        if not 0 <= item < 2**64:
            raise Refused(f"{field} holds {shown(item, 40)}, outside 0 .. 2^64 - 1")


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of dtype code ``dtype``. Raises Refused where a product leaves 64 bits."""
    count, product = 1, 1
    for size in shape:
        count *= size
        product *= size or 1  # a zero must not hide a product that no reader can hold
        if product > INT64_MAX:
            raise Refused(f"shape {list(shape)} overflows: more than 2^63 - 1 elements")
    bits = count * BITS[dtype]
    if bits % 8:
        raise Refused(f"{count} elements of {dtype} take {bits} bits, which do not fill whole bytes")
    if bits // 8 > INT64_MAX:
        raise Refused(f"shape {list(shape)} of {dtype} overflows: {bits // 8} bytes")
    return bits // 8


def _check_layout(file: str, entries: Mapping[str, Entry], data_bytes: int) -> None:
    """Ranges must tile the data: from 0, no hole, no overlap, to the end of the file."""
    position, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != position:
            kind = "leaves a hole" if entry.start > position else "overlaps"
            behind = (
                f"tensor {shown(previous)}, which ends at {position}"
                if previous
                else "the start of the data, at 0"
            )
            raise FileError(
                f"{file}: tensor {shown(name)} (bytes {entry.start} to {entry.end}) {kind} behind {behind} "
                f"({data_bytes} data bytes in the file)"
            )
        position, previous = entry.end, name
    if position > data_bytes:
        raise FileError(
            f"{file}: truncated: tensor {shown(previous)} ends at data byte {position}, "
            f"the file holds {data_bytes}"
        )
    if position < data_bytes:
        raise FileError(
            f"{file}: {data_bytes - position} bytes behind the last tensor (data ends at {position}, "
            f"the file holds {data_bytes}): they belong to no tensor"
        )


def header_bytes(
    tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file: length, JSON and spaces up to a multiple of 4096.

    ``tensors``: (name, dtype code, shape, bytes) in the order of their data, which leave no gap.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        if name in table or name == "__metadata__":
            raise FileError(f"header: tensor name {shown(name)} is taken")
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    length = -(-(len(text) + 8) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    if length > MAX_HEADER:
        raise FileError(
            f"header: {len(tensors)} tensors take {length} bytes of header, the limit is {MAX_HEADER}"
        )
    return length.to_bytes(8, "little") + text.ljust(length)
