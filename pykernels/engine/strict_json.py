"""JSON of a model directory, read strictly: what lenient parsers let pass is refused with its place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

MAX_DEPTH = 128

_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


class FileError(ValueError):
    """A file that is not what its format or its model demands; the text names file, tensor and sizes."""


def shown(name: object, limit: int = 120) -> str:
    """``name`` as it may stand in a message: quoted, control characters escaped, cut to ``limit``."""
    text = str(name)
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


class Refused(ValueError):
    """A value that is refused; whoever knows the file and the tensor puts their names before the text."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of ``pairs``, for ``json``'s hook. Raises Refused for a key that stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Refused(f"duplicate key {shown(key)}")
            seen.add(key)
    return result


def _constant(text: str) -> NoReturn:
    raise Refused(f"{text} is not JSON")


def _signed(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # no natural number, though Python's int makes it 0


def strict_json(raw: bytes, where: str, hook: Callable[[list[tuple[str, Any]]], Any] = unique) -> Any:
    """Parse strict UTF-8 JSON: no duplicate keys, NaN, lone surrogates, huge numbers or endless nesting.

    ``where`` begins every message; ``hook`` makes the objects. Raises FileError.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise FileError(f"{where} begins with a byte-order mark; JSON text must not")
    try:
        if _SURROGATES.search(raw):
            _check_surrogates(raw)
        parse_int = _signed if b"-0" in raw else None
        return json.loads(text, object_pairs_hook=hook, parse_constant=_constant, parse_int=parse_int)
    except json.JSONDecodeError as error:
        raise FileError(f"{where} is not valid JSON: {error.msg} at character {error.pos}") from None
    except Refused as error:
        raise FileError(f"{where} is refused: {error}") from None
    except RecursionError:
        raise FileError(f"{where} is refused: nesting deeper than {MAX_DEPTH} levels") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise FileError(f"{where} is refused: a number of thousands of digits") from None


def _check_surrogates(raw: bytes) -> None:
    high_ends = -1  # where an escaped high surrogate ended that still waits for its low half
    for match in _ESCAPE.finditer(raw):
        code = int(match[1], 16) if match[1] else 0
        if high_ends >= 0 and (match.start() != high_ends or not 0xDC00 <= code < 0xE000):
            break
        if high_ends < 0 and 0xDC00 <= code < 0xE000:
            raise Refused(f"broken surrogate pair at byte {match.start()}")
        high_ends = match.end() if 0xD800 <= code < 0xDC00 else -1
    if high_ends >= 0:
        raise Refused(f"broken surrogate pair at byte {high_ends}")


def check_extras(value: Any) -> None:
    """Fields that nobody reads: bounded in depth and range all the same. Raises Refused."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise Refused(f"nesting deeper than {MAX_DEPTH} levels")
        children = [c for item in level for c in (item.values() if isinstance(item, dict) else item)]
        if any(isinstance(child, float) and not math.isfinite(child) for child in children):
            raise Refused("a number is out of range")
        level = [child for child in children if isinstance(child, dict | list)]
