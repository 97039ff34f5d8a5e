"""Adapters attached to a model of a merge: tensors keep their bytes, and say what changes them when read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pykernels.adapters.change import ADD, REPLACE, ROWS, Change
from pykernels.adapters.checkpoint import Adapter, open_adapter
from pykernels.adapters.resolve import Base, Resolved, resolve
from pykernels.engine.files import FileError, shown
from pykernels.engine.matching import EMBEDDINGS, HEADS, Model


def attach(
    model: Model,
    adapters: Sequence[tuple[str, float]],
    *,
    rounding: str = "once",
    allow_download: bool = False,
) -> Model:
    """``model`` with ``adapters`` (name or directory, weight) merged into it, in their order.

    Raises FileError for whatever cannot be merged, naming file, tensor, rule and value.
    """
    if "quantization_config" in model.config:
        raise FileError(
            f"{shown(model.checkpoint.path, 300)}: its config has a quantization_config; adapters are "
            "merged into float tensors, dequantise the base first"
        )
    opened = [open_adapter(name, allow_download=allow_download) for name, _ in adapters]
    tied = _tied(model)
    base = Base(model.name, model.checkpoint.tensors, str(model.config.get("model_type", "")), tied)
    found = [resolve(a, i, adapters[i][1], base) for i, a in enumerate(opened)]
    joined = _join(opened, found)
    twins = _tie(model, opened, joined)
    for name, changes in joined.changes.items():
        _check_steps(opened, name, changes)
    tensors = {**model.checkpoint.tensors, **{n: replace(t, name=n) for n, t in joined.untied.items()}}
    files = {**model.checkpoint.files, **{a.file: a.identity for a in opened}}
    config = {**model.config, "tie_word_embeddings": False} if joined.untied else model.config
    return replace(
        model,
        checkpoint=replace(model.checkpoint, tensors=tensors, files=files),
        config=config,
        changes={name: tuple(changes) for name, changes in joined.changes.items()},
        rounding=rounding,
        adapters=tuple(str(a.path) for a in opened),
        modules=tuple(f.modules for f in found),
        same=tuple(joined.same),
        twins=tuple(twins),
        untied=bool(joined.untied),
        said=tuple(joined.notes),
    )


def _join(adapters: Sequence[Adapter], found: Sequence[Resolved]) -> Resolved:
    """One list of steps per tensor. Raises FileError where two adapters do what excludes the other's."""
    joined = Resolved()
    for number, one in enumerate(found):
        for name, changes in one.changes.items():
            _check_conflict(adapters, joined, one, name, number)
            for change in changes:
                first = _first_copy(joined, name) if change.kind == REPLACE else None
                if first is not None:
                    joined.same.append((first.tensors[0], change.tensors[0]))
                elif change.kind == REPLACE:
                    joined.changes.setdefault(name, []).insert(0, change)  # what all others are added to
                else:
                    joined.add(name, change)
        joined.copies |= one.copies
        joined.same += one.same
        joined.notes += one.notes
        for name, info in one.untied.items():
            if name in joined.untied:
                joined.same.append((joined.untied[name], info))
            joined.untied.setdefault(name, info)
    return joined


def _first_copy(joined: Resolved, name: str) -> Change | None:
    return next((c for c in joined.changes.get(name, []) if c.kind == REPLACE), None)


def _check_conflict(
    adapters: Sequence[Adapter], joined: Resolved, one: Resolved, name: str, number: int
) -> None:
    before = joined.changes.get(name, [])
    if not before:
        return
    who = f"{shown(adapters[before[0].adapter].name)} and {shown(adapters[number].name)}"
    after = one.changes[name]
    copies = name in joined.copies, name in one.copies
    if any(copies) and not (all(copies) and len(before) == len(after) == 1):
        raise FileError(
            f"{who}: tensor {shown(name)}: one replaces what the other changes; merge one of them"
        )


def _check_steps(adapters: Sequence[Adapter], name: str, changes: Sequence[Change]) -> None:
    """Steps of one tensor, which may come from several adapters and from a tied head. Raises FileError."""
    who = " and ".join(dict.fromkeys(shown(adapters[c.adapter].name) for c in changes))
    rows = [row for change in changes for row in change.index]
    twice = next((row for row, count in Counter(rows).items() if count > 1), None)
    if twice is not None:
        raise FileError(f"{who}: tensor {shown(name)}: row {twice} is overwritten twice; merge one of them")
    if len({c.transposed for c in changes if c.kind == ADD and len(c.tensors) > 2}) > 1:
        raise FileError(f"{who}: tensor {shown(name)}: has magnitudes of its rows and of its columns")


def _tied(model: Model) -> dict[str, str]:
    """Names of heads that are the one stored embedding."""
    if not model.ties:
        return {}
    names = model.checkpoint.tensors
    stored = [n for n in names if any(f".{n}".endswith(f".{tail}") for tail in EMBEDDINGS)]
    return dict.fromkeys(HEADS, stored[0]) if len(stored) == 1 else {}


def _tie(model: Model, adapters: Sequence[Adapter], joined: Resolved) -> list[tuple[Change, Change]]:
    """A head that is tied shares the embedding's changes: all of them, or one of two that are the same.

    Returns those pairs: a head's change that was left out, and the embedding's, which must be its transpose.
    """
    left: list[tuple[Change, Change]] = []
    for head, embedding in _tied(model).items():
        if head in joined.untied:
            if any(c.kind == ADD and not c.transposed for c in joined.changes.get(embedding, [])):
                raise FileError(
                    f"tensor {shown(head)}: one adapter replaces what another changes; merge one of them"
                )
            continue
        both = [*joined.changes.get(embedding, []), *joined.changes.pop(head, [])]
        if not both:
            continue
        twins = {c: twin for c in both if (twin := _twin(c, both, adapters)) is not None}
        left += twins.items()
        kept = [c for c in both if c not in twins]
        joined.changes[embedding] = kept
        if head in model.checkpoint.tensors:
            joined.changes[head] = kept
        if any(c.kind in (ADD, ROWS) for c in kept):
            told = (
                f"{shown(model.name)} ties its head to {shown(embedding)}: both get what an adapter "
                "changes of either, as in PEFT's merge, where the adapter itself changed one"
            )
            joined.notes = list(dict.fromkeys([*joined.notes, told]))
    return left


def _twin(change: Change, both: Sequence[Change], adapters: Sequence[Adapter]) -> Change | None:
    """The embedding's half where ``change`` is the head's, of an adapter that keeps both tied."""
    if change.kind != ADD or change.transposed or not adapters[change.adapter].config.tied:
        return None
    halves = (c for c in both if c.kind == ADD and c.transposed and c.adapter == change.adapter)
    return next(halves, None)
