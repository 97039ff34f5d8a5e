"""Which device and which versions a run belongs to, as JSON; nothing that names the computer itself.

``python bench/device_probe.py FILE``; exit status 3 where there is no CUDA device.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "pybind11", "transformers", "pydantic", "mergekit", "peft")


def versions() -> dict[str, str]:
    """Versions of Python, nvcc and the packages that matter; those that are missing are left out."""
    found = {"python": sys.version.split()[0]}
    if said := _output("nvcc", "--version"):
        release = re.search(r"release ([\d.]+)", said)
        found["nvcc"] = release.group(1) if release else said.strip()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def probe() -> dict[str, Any]:
    """Versions, and the device under "device": None, with the reason under "why", where there is none."""
    found: dict[str, Any] = {"versions": versions(), "device": None}
    try:
        import torch
    except ImportError as error:
        return found | {"why": f"torch is not installed ({error})"}
    found["versions"]["cuda"] = torch.version.cuda
    if not torch.cuda.is_available():
        return found | {"why": "no CUDA device"}
    about = torch.cuda.get_device_properties(0)
    found["device"] = {
        "name": about.name,
        "memory": about.total_memory,
        "l2": about.L2_cache_size,
        "multiprocessors": about.multi_processor_count,
        "capability": f"{about.major}.{about.minor}",
    }
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    if said := _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"):
        found["device"] |= dict(
            zip(query.replace(".", "_").split(","), map(str.strip, said.split(",")), strict=False)
        )
    return found


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def main(arguments: list[str]) -> int:
    """Write the findings; 3 without a device."""
    found = probe()
    Path(arguments[0]).write_text(json.dumps(found, indent=1) + "\n")
    if found["device"] is None:
        print(f"no device: {found['why']}")
        return 3
    print(found["device"]["name"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
