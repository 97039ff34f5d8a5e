"""What an earlier checkpoint left in OUT: files that a new one replaces, and files that stay."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from pykernels.engine.companions import COPIED, INDEX, NEVER
from pykernels.engine.files import FileError, shown
from pykernels.engine.index import read_index
from pykernels.engine.record import RECORD, read_record

WEIGHTS = "model*.safetensors"
"""Names under which loaders look for weights."""
LOADED = (
    "generation_config.json", "chat_template.*", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files that loaders pick up by name: beside new weights, those of an older model would be wrong."""


def replaced(out: Path, new: Collection[str]) -> list[Path]:
    """Files of OUT's old checkpoint, its index first, then weights, then small files that are not ``new``."""
    shards, companions = _named(out)
    there = sorted(p.name for p in out.iterdir() if not p.is_dir()) if out.is_dir() else []
    weights = [name for name in there if name in shards or fnmatch.fnmatch(name, WEIGHTS)]
    stale = [
        name
        for name in there
        if name not in new
        and not name.endswith(NEVER)
        and (_matches(name, LOADED) or (name in companions and _matches(name, COPIED)))
    ]
    index = [INDEX] if os.path.lexists(out / INDEX) else []
    return [out / name for name in (*index, *weights, *stale)]


def foreign_weights(out: Path) -> str | None:
    """A warning that names the weights in OUT that belong to no checkpoint of ours and stay, or None."""
    if not out.is_dir():
        return None
    gone = set(replaced(out, ()))
    endings = tuple(ending for ending in NEVER if ending != ".py")
    kept = sorted(p.name for p in out.iterdir() if p.name.endswith(endings) and p not in gone)
    return f"{shown(out, 300)}: other weights stay in it: {shown(', '.join(kept[:5]))}" if kept else None


def _named(out: Path) -> tuple[set[str], set[str]]:
    """Weights and small files that the old record and the old index name, plain names only."""
    shards: set[str] = set()
    companions: set[str] = set()
    if os.path.lexists(out / RECORD):
        try:
            record = read_record(out)
            shards |= _plain(shard.name for shard in record.plan.shards)
            companions |= _plain(record.companions)
        except (FileError, OSError):
            pass  # not readable: what it named stays, apart from the names that loaders look for
    if os.path.lexists(out / INDEX):
        try:
            shards |= _plain(read_index(out, out / INDEX)[0].values())
        except (FileError, OSError):
            pass
    return {name for name in shards if name.endswith(".safetensors")}, companions


def _plain(names: Iterable[str]) -> set[str]:
    return {name for name in names if Path(name).name == name}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
