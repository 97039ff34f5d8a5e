"""The rules of the house that a machine can check: imports, sizes and names of files, quoted figures."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "csrc", "examples", "kernels", "pykernels", "tests")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu"}
)
MODULES = [
    path
    for path in SOURCES
    if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("pykernels", "kernels")
]

FLOORS = (
    ("cli",),
    ("console", "lora_commands"),
    ("terminal",),
    ("__init__",),
    ("engine.run", "adapters.compose", "adapters.extract"),
    ("adapters.composition",),
    ("adapters.copies", "adapters.write"),
    ("engine.verify", "engine.plan", "engine"),
    ("adapters",),
    ("engine.files", "engine.header", "engine.index", "engine.shard", "engine.strict_json"),
    ("engine.recipe", "engine.settings", "engine.strict_yaml", "engine.sizes", "engine.collector"),
    ("methods",),
    ("ops",),
    ("library",),
    ("lora_linear_cpu", "lora_linear_cuda"),
    ("lora_linear_torch",),
    ("backends",),
    ("products",),
    (
        "native",
        "merge_lora_cpu",
        "merge_lora_cuda",
        "merge_in_order_cuda",
        "cuda",
        "kernels",
        "check",
        "check_lora",
        "ref",
    ),
    ("rows", "low_rank", "dora_norm_torch"),
    ("_C", "_cuda", "cut", "grouping", "memory", "uncast"),
)
"""From the top down; a module may import from its own floor and those below. "engine": the rest of it."""

MAY_IMPORT_REF = ("ref", "backends", "engine.verify")
DATA = {("", "__version__")}
"""Plain data that any floor may name."""


def dotted(path: Path) -> str:
    """``pykernels/engine/run.py`` -> ``engine.run``, ``kernels/table.py`` -> ``kernels.table``."""
    inside = path.relative_to(ROOT)
    inside = inside.relative_to("pykernels") if inside.parts[0] == "pykernels" else inside
    return ".".join(inside.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module without the package's name, imported name or "") of every import of our own code in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name[10:], "") for a in node.names if a.name.split(".")[0] == "pykernels")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pykernels":
            module = node.module[10:]
            for name in (a.name for a in node.names):
                inner = f"{module}.{name}".lstrip(".")
                yield (inner, "") if is_module(inner) else (module, name)


def is_module(name: str) -> bool:
    """Whether the package holds such a module or folder."""
    path = ROOT / ("" if name.split(".")[0] == "kernels" else "pykernels") / Path(*name.split("."))
    return name in {"_C", "_cuda"} or path.is_dir() or path.with_suffix(".py").is_file()


def floor(module: str) -> int:
    """Number of a module's floor, 0 at the top; the longest listed prefix decides."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, rooms in enumerate(FLOORS):
            if ".".join(parts[:length]) in rooms:
                return number
    raise AssertionError(f"pykernels.{module} stands on no floor: give it one in tests/test_house.py")


def upward(path: Path) -> list[str]:
    """The imports of a file that point up."""
    mine = floor(dotted(path))
    return [
        f"{module}.{name}".strip(".")
        for module, name in imports(path)
        if (module, name) not in DATA and floor(module) < mine
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    assert upward(path) == []


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "pykernels" / "ops" / "bad.py"
    path.parent.mkdir(parents=True)
    lines = ("pykernels.methods import METHODS", "pykernels import check", "pykernels.backends import find")
    path.write_text("".join(f"from {line}\n" for line in lines))
    (tmp_path / "pykernels" / "check.py").touch()
    assert upward(path) == ["methods.METHODS"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_few_know_the_reference(path):
    if not dotted(path).startswith(MAY_IMPORT_REF):
        assert [m for m, _ in imports(path) if m.split(".")[0] == "ref"] == []


def test_looking_at_the_table_of_backends_imports_no_backend():
    found = {module.split(".")[0] for module, _ in imports(ROOT / "pykernels" / "backends.py")}
    assert found <= {"check"}


def test_no_torch_in_csrc():
    for path in SOURCES:
        if path.is_relative_to(ROOT / "csrc"):
            assert "torch/" not in path.read_text() and "ATen" not in path.read_text(), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "manager", "base"}


def test_readme_quotes_the_committed_run():
    from pykernels.bench.report import write_readme

    assert write_readme(ROOT / "README.md", check=True), "run: python -m pykernels.bench.report README"
