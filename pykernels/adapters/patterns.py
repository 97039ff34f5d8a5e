"""rank_pattern and alpha_pattern: the first key that fits the end of a module's path decides.

Keys are regular expressions of whoever wrote the file. Plain names, as nearly all are, are looked up in a
table. The others are searched by ``re``, which goes back and forth: what a search may cost is bounded before
it starts, and what all of them cost together is measured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import comb, prod
from typing import Generic, NoReturn, TypeVar

from pykernels.engine.strict_json import FileError, shown

Value = TypeVar("Value", int, float)

LONGEST = 1000
"""Characters of a key that is no name."""
STEPS = 50_000_000
"""Ways that one search may have to try."""
SECONDS = 20.0
"""For all searches of one config."""
_MOST = 20
"""Repetitions in a key; two already may try a way per pair of characters."""

_NAME = re.compile(r"\^?(?:[\w./-]|\\[._/-])+\$?")
_CHARACTER = re.compile(r"(\\?)(.)")
_UNITS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
"""Escapes and classes, whose signs mean something else."""
_KIND_OF_GROUP = re.compile(r"\(\?(?!:)")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


class Patterns(Generic[Value]):
    r"""Values by key, found as PEFT 0.21.2 does: the first key of ``re.match(rf"(.*\.)?({key})$", path)``."""

    def __init__(self, where: str, found: Mapping[str, Value]) -> None:
        """``where`` names file and setting in errors.

        Raises FileError for a key that is no regular expression, or whose search could hang: one that repeats
        a group, has another kind of group than (?:...), or is no name and longer than LONGEST.
        """
        self._where = where
        self._values: tuple[Value, ...] = tuple(found.values())
        self._names: dict[int, dict[tuple[bool, tuple[int, ...]], dict[str, int]]] = {}
        self._searches: list[tuple[int, _Search]] = []
        self._spent = 0.0
        for number, key in enumerate(found):
            if _NAME.fullmatch(key):
                self._add_name(number, key)
            else:
                self._searches.append((number, self._search(key)))

    def find(self, path: str, default: Value) -> Value:
        """The value for the module at ``path``. Raises FileError for a key whose search may take too long."""
        best = min(self._named(path), default=len(self._values))
        for number, search in self._searches:
            if number > best:
                break
            if self._matches(search, path):
                best = number
        return self._values[best] if best < len(self._values) else default

    def _add_name(self, number: int, key: str) -> None:
        """A dot that nothing escapes stands for any character."""
        signs = _CHARACTER.findall(key.removeprefix("^").removesuffix("$"))
        anywhere = tuple(i for i, sign in enumerate(signs) if sign == ("", "."))
        kinds = self._names.setdefault(len(signs), {})
        names = kinds.setdefault((key.startswith("^"), anywhere), {})
        names.setdefault("".join(character for _, character in signs), number)

    def _named(self, path: str) -> Iterator[int]:
        """Numbers of the names that fit the whole path, or its end from a dot on."""
        start = 0
        while True:
            for (whole, anywhere), names in self._names.get(len(path) - start, {}).items():
                if whole and start:
                    continue
                end = path[start:]
                for i in anywhere:
                    if end[i] != ".":
                        end = f"{end[:i]}.{end[i + 1 :]}"
                if end in names:
                    yield names[end]
            start = path.find(".", start) + 1
            if not start:
                return

    def _search(self, key: str) -> _Search:
        if len(key) > LONGEST:
            self._refuse(key, f"is no name, and a regular expression may have {LONGEST} characters here")
        try:
            compiled = re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError) as error:
            self._refuse(key, f"not a regular expression: {error}")
        bare = _UNITS.sub("u", key)
        if _REPEATED_GROUP.search(bare):
            self._refuse(key, "repeats a group, and such a search may never end")
        if _KIND_OF_GROUP.search(bare):
            self._refuse(key, "has a group of a kind that is not known here; only (...) and (?:...) are")
        return _Search(key, compiled, 1 + len(re.findall(r"[*+{]", bare)), _choices(bare))

    def _matches(self, search: _Search, path: str) -> bool:
        if search.repeats > _MOST or search.ways(len(path)) > STEPS:
            self._refuse(search.key, f"its search may never end on a path of {len(path)} characters")
        if self._spent > SECONDS:
            self._refuse(search.key, f"the searches of its kind took more than {SECONDS:g} s")
        began = time.perf_counter()
        found = search.compiled.match(path) is not None
        self._spent += time.perf_counter() - began
        return found

    def _refuse(self, key: str, why: str) -> NoReturn:
        raise FileError(f"{self._where}: {shown(key)}: {why}")


@dataclass(frozen=True)
class _Search:
    """A key that is no name. ``repeats``: signs that take any number of characters, PEFT's own with them."""

    key: str
    compiled: re.Pattern[str]
    repeats: int
    choices: int

    def ways(self, length: int) -> int:
        """To divide a path among the repetitions, times those through the rest: no search tries more."""
        return comb(length + self.repeats, self.repeats) * self.choices


def _choices(bare: str) -> int:
    """Ways through alternatives and optional parts; those of nested groups are counted as if all were met."""
    bars, found = [0], []
    for sign in bare.replace("(?:", "("):
        if sign == "(":
            bars.append(0)
        elif sign == ")" and len(bars) > 1:
            found.append(bars.pop())
        elif sign == "|":
            bars[-1] += 1
    return prod(n + 1 for n in (*bars, *found)) << bare.replace("(?:", "(").count("?")
