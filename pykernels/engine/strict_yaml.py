"""YAML text to plain data, refusing what can hurt: size, depth, alias bombs, duplicate keys, odd keys."""

from __future__ import annotations

from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000

# The parser in C reads the same language about ten times as fast; some builds of PyYAML lack it.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(text: str) -> Any:
    """Parse one YAML document to dicts, lists and scalars. Raises ValueError, with the line if it has one."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes, which no recipe needs")
    try:
        _measure(text)
        loader = _SafeLoader(text)
        try:
            node = loader.get_single_node()
            _check_keys(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        if "nesting depth" in str(e.problem):  # newer scanners give up at a depth of their own, far past ours
            raise ValueError(f"{line}nested deeper than {MAX_DEPTH} levels") from None
        raise ValueError(f"{line}not valid YAML: {e.problem or e.context}") from None
    except yaml.YAMLError as e:
        raise ValueError(f"not valid YAML: {' '.join(str(e).split())}") from None


def _measure(text: str) -> None:
    """Walk the event stream, which expands nothing, and bound depth and the values after alias expansion."""
    totals: list[int] = [0]  # nodes inside each open collection, aliases expanded; [0] is the document
    anchors: dict[str, int] = {}
    names: list[str | None] = []
    for event in yaml.parse(text, Loader=_SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise ValueError(
                    f"line {line}: alias *{event.anchor} has no anchor before it, or holds itself"
                )
            totals[-1] += anchors[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            totals[-1] += 1
            if event.anchor:
                anchors[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            totals.append(1)
            names.append(event.anchor)
            if len(names) > MAX_DEPTH:
                raise ValueError(f"line {line}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            inside, anchor = totals.pop(), names.pop()
            totals[-1] += inside
            if anchor:
                anchors[anchor] = inside
        if sum(totals) > MAX_NODES:
            raise ValueError(f"line {line}: more than {MAX_NODES} values once aliases are expanded")


def _check_keys(root: yaml.Node | None) -> None:
    """Refuse a key that is not text or stands twice in one mapping, where YAML lets the last one win."""
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            todo += node.value
            continue
        keys: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1 if key.start_mark else 0
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _TEXT_TAGS:
                raise ValueError(f"line {line}: a key must be text, got {str(key.value)[:80]!r}")
            if key.value in keys:
                raise ValueError(f"line {line}: key {key.value[:80]!r} stands twice in one mapping")
            keys.add(key.value)
            todo.append(value)


_TEXT_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge", "value"))
