"""JSON of a model directory, read strictly: what lenient parsers let pass is refused with its place."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

MAX_DEPTH = 128

# What the C scanner of `json` takes in silently; a text without any of these needs no hooks for its numbers.
_ODD_NUMBERS = re.compile(rb"\d{19}|-0|\d[eE]")
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


class FileError(ValueError):
    """A file that is not what its format or its model demands; the text names file, tensor and sizes."""


def shown(name: object, limit: int = 120) -> str:
    """``name`` as it may stand in a message: quoted, control characters escaped, cut to ``limit``."""
    text = str(name)
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


class _Refused(ValueError):
    """A JSON value that is refused while parsing; the caller adds the file's name."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"duplicate key {shown(key)}")
            seen.add(key)
    return result


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not JSON")


def _careful_float(text: str) -> float:
    if abs(value := float(text)) == float("inf"):
        raise _Refused(f"number {shown(text, 40)} is out of range")
    return value


def _careful_int(text: str) -> int | float:
    # A number that no 64-bit integer holds, and "-0", are floats to the format's own reader.
    return _careful_float(text) if len(text) > 20 or text == "-0" else int(text)


def strict_json(raw: bytes, where: str) -> Any:
    """Parse strict UTF-8 JSON: no duplicate keys, NaN, lone surrogates, huge numbers or endless nesting.

    ``where`` begins every message. Raises FileError.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise FileError(f"{where} begins with a byte-order mark; JSON text must not")
    hooks: dict[str, Any] = {}
    if _ODD_NUMBERS.search(raw):
        hooks = {"parse_int": _careful_int, "parse_float": _careful_float}
    try:
        if _SURROGATES.search(raw):
            _check_surrogates(raw)
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant, **hooks)
    except json.JSONDecodeError as error:
        raise FileError(f"{where} is not valid JSON: {error.msg} at character {error.pos}") from None
    except _Refused as error:
        raise FileError(f"{where} is refused: {error}") from None
    except RecursionError:
        raise FileError(f"{where} is refused: nesting deeper than {MAX_DEPTH} levels") from None


def _check_surrogates(raw: bytes) -> None:
    high_ends = -1  # where an escaped high surrogate ended that still waits for its low half
    for match in _ESCAPE.finditer(raw):
        code = int(match[1], 16) if match[1] else 0
        if high_ends >= 0 and (match.start() != high_ends or not 0xDC00 <= code < 0xE000):
            break
        if high_ends < 0 and 0xDC00 <= code < 0xE000:
            raise _Refused(f"broken surrogate pair at byte {match.start()}")
        high_ends = match.end() if 0xD800 <= code < 0xDC00 else -1
    if high_ends >= 0:
        raise _Refused(f"broken surrogate pair at byte {high_ends}")


def check_depth(where: str, value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise FileError(f"{where}: nesting deeper than {MAX_DEPTH} levels")
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
