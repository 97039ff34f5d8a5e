"""rank_pattern and alpha_pattern: PEFT's rule on any key, and an end to every search of a hostile file."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from pykernels.adapters import patterns
from pykernels.adapters.config import read_config
from pykernels.adapters.patterns import STEPS, Patterns
from pykernels.engine.strict_json import FileError
from tests.adapter_files import factors, write_adapter

PATHS = [
    "q_proj", "model.layers.1.q_proj", "model.layers.11.q_proj", "model_layers.1.q_proj", "xq_proj",
    "model.layers.1.xq_proj", "layers.1.mlp.experts.12.up_proj", "a..b", ".a", "unet.down-blocks.0/attn",
]  # fmt: skip


def by_peft(found: dict[str, int], path: str) -> int:
    """The rule as PEFT 0.21.2 has it."""
    return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", path)), -1)


def drawn(random: random.Random) -> str:
    """A path's end, or something near it, spelt as people and tools spell it."""
    key = random.choice(PATHS)
    key = key[random.randrange(len(key)) :] if random.random() < 0.6 else key
    changes = {
        "as it is": lambda: key,
        "escaped": lambda: re.escape(key),
        "with a dot for a character": lambda: f"{key[: len(key) // 2]}.{key[len(key) // 2 + 1 :]}",
        "with digits": lambda: re.sub(r"\d+", r"\\d+", key),
        "with a choice": lambda: key.replace("1", "(1|11)"),
        "with a class": lambda: key.replace("1", "[0-9]"),
    }
    spelt = changes[random.choice(list(changes))]()
    return random.choice(["", "", "^"]) + spelt + random.choice(["", "", "$"])


@pytest.mark.parametrize("seed", range(40))
def test_the_first_key_that_fits_decides(seed):
    draw = random.Random(seed)
    found = {drawn(draw): number for number in range(draw.randrange(1, 30))}
    both = Patterns("here", found)
    for path in PATHS:
        assert both.find(path, -1) == by_peft(found, path), (path, found)


def test_no_key_at_all():
    assert Patterns("here", {}).find("q_proj", 5) == 5


HANGS = {
    "optional characters": ("a?" * 30 + "a" * 30, "a" * 30),
    "alternatives": ("(a|aa)" * 40 + "c", "a" * 60),
    "alternatives without a name": ("(?:a|aa|aaa)" * 30 + "c", "a" * 60),
    "many repetitions": (".*" * 12 + "c", "a" * 60),
    "many counted repetitions": ("a{0,60}" * 12 + "c", "a" * 60),
    "more than anyone needs": ("a*" * 400 + "c", "a"),
    "a class that ends late": (r"[\][]" + "a?" * 30 + "a" * 30 + "]", "]" + "a" * 30),
    "a class that begins with its end": ("[^]]" + "a?" * 30 + "[]a]" * 30, "b" + "a" * 30),
    "a long path": (".*a.*b", "a" * 5000),
}


@pytest.mark.parametrize("name", HANGS)
def test_a_search_that_may_not_end_is_not_begun(name):
    key, path = HANGS[name]
    began = time.perf_counter()
    with pytest.raises(FileError, match=r"^rank_pattern: .*: its search may never end on a path of \d+"):
        Patterns("rank_pattern", {key: 1}).find(path, 8)
    assert time.perf_counter() - began < 1


REFUSED = {
    r"(a+)+x": "repeats a group",
    r"((a|b)c){2}": "repeats a group",
    r"(?=a)b": "has a group of a kind that is not known here",
    r"(?x: [\n)": "not a regular expression",
    r"(?x: #[" + "\n" + "a?a #]\n)": "has a group of a kind",
    "(": "not a regular expression: missing ), unterminated subpattern",
    "(a)" * 334: "is no name, and a regular expression may have 1000 characters",
}


@pytest.mark.parametrize("key", REFUSED, ids=lambda key: key[:12])
def test_keys_that_are_not_searched_for(key):
    with pytest.raises(FileError) as error:
        Patterns("file: alpha_pattern", {"q": 1.0, key: 2.0})
    assert str(error.value).startswith("file: alpha_pattern: ") and REFUSED[key] in str(error.value)


def test_the_dearest_search_that_is_allowed_ends_soon():
    """Every way is tried, as the last character fits nowhere."""
    path = "." * 75
    both = Patterns("here", {".*" * 4 + "c": 1})
    [(_, search)] = both._searches
    assert STEPS / 3 < search.ways(len(path)) <= STEPS
    began = time.thread_time()
    assert both.find(path, 8) == 8
    assert time.thread_time() - began < 5


def test_many_searches_have_an_end(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    both = Patterns("here", {"a.*c": 1})
    assert both.find("b", 8) == 8
    with pytest.raises(FileError, match=r"'a\.\*c': the searches of its kind took more than 0 s"):
        both.find("b", 8)


def test_a_key_per_module_is_a_table():
    """As written by hand, with dots that stand for any character: 5,000 keys for 5,000 modules."""
    names = [f"model.layers.{i // 100}.experts.{i % 100}.up_proj" for i in range(5_000)]
    began = time.thread_time()
    both = Patterns("here", {name: number for number, name in enumerate(names)})
    assert all(both.find(name, -1) == number for number, name in enumerate(names))
    assert time.thread_time() - began < 2


def test_the_config_names_its_file(tmp_path: Path):
    config = {"alpha_pattern": {"a?" * 30 + "a" * 30: 1}, "rank_pattern": {r"layers\.[0-9]+": 3, "q": 5}}
    read = read_config(write_adapter(tmp_path / "a", factors("q", 4, 4), **config))
    assert (read.rank("layers.7"), read.rank("x.q"), read.rank("k")) == (3, 5, 4)
    with pytest.raises(FileError, match=r"adapter_config\.json': alpha_pattern: .*never end"):
        read.scaling("a" * 30, 4)
