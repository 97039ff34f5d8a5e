"""Registers and stack of every CUDA kernel in the built module, per architecture, without a GPU.

``python -m pykernels.bench.registers`` prints the table and fails where a kernel has a stack (it spills), or
where an architecture that should have been compiled is missing: those of CUDAARCHS, or all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pykernels

MODULE = "pykernels._cuda"

Usage = dict[str, dict[str, tuple[int, int]]]
"""Kernel -> architecture -> (registers a thread, bytes of stack)."""


def architectures() -> list[str]:
    """Those for which CMake compiles: what CUDAARCHS names, such as 90-real, or all three."""
    named = os.environ.get("CUDAARCHS") or "80;90;100"
    return [f"sm_{arch.partition('-')[0]}" for arch in named.split(";")]


def built() -> Path | None:
    """The module's file, or None where it was not built."""
    # Not by import: tests put the emulated kernels in its place.
    spec = PathFinder.find_spec(MODULE, pykernels.__path__)
    return Path(spec.origin) if spec and spec.origin else None


def usage(said: str) -> Usage:
    """What ``cuobjdump --dump-resource-usage`` said, by readable names."""
    found: Usage = {}
    arch = ""
    for line in said.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = readable(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found.setdefault(name, {})[arch] = int(match[1]), int(match[2])
    return found


_SCENERY = {"", "_", "pk", "cuda", "Table"}


def readable(symbol: str) -> str:
    """``merge<bf16, KeepLarge, Weighted>`` of a mangled name; the plain name where it is no template."""
    words = _names(symbol)
    kernel, *arguments = [w for w in words if w not in _SCENERY and not w.startswith("_GLOBAL_")]
    if re.search(rf"{kernel}If", symbol):
        arguments.insert(0, "float")
    return f"{kernel}<{', '.join(arguments)}>" if arguments else kernel


def _names(symbol: str) -> list[str]:
    """The length-prefixed identifiers of a mangled name (Itanium C++ ABI)."""
    words, i = [], 0
    while i < len(symbol):
        if match := re.match(r"\d+", symbol[i:]):
            start = i + len(match[0])
            words.append(symbol[start : start + int(match[0])])
            i = start + int(match[0])
        else:
            i += 1
    return words


def main() -> int:
    """Print the table; 1 where a kernel spills or an architecture is missing, 2 where there is no module."""
    path = built()
    if path is None and "0" in (os.environ.get(v) for v in ("PYKERNELS_CUDA", "PYKERNELS_REQUIRE_CUDA")):
        print(f"{MODULE} is not built, as PYKERNELS_CUDA=0 or PYKERNELS_REQUIRE_CUDA=0 says: left out")
        return 0
    if path is None:
        print(f"{MODULE} is not built: nvcc is missing, or PYKERNELS_CUDA=0", file=sys.stderr)
        return 2
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", str(path)]
    table = usage(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    wanted = architectures()
    print(f"{'CUDA kernel':<40}" + "".join(f"{arch:>8} regs stack" for arch in wanted))
    failures = []
    for kernel, by_arch in sorted(table.items()):
        cells = [by_arch.get(arch) for arch in wanted]
        print(f"{kernel:<40}" + "".join(f"{c[0]:>13}{c[1]:>6}" if c else f"{'-':>13}{'-':>6}" for c in cells))
        failures += [f"{kernel}: {a}: {c}" for a, c in zip(wanted, cells, strict=True) if not c or c[1]]
    if not table:
        failures.append(f"{path.name} holds no kernels")
    print(*(f"spills or is missing: {failure}" for failure in failures), sep="\n", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
