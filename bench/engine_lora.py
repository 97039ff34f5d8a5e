"""Adapters merged into a whole checkpoint: ``lora merge`` against ``cp`` of the base, and against PEFT.

``python -m pykernels.bench.engine_lora [--large]`` runs this part alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pykernels.bench.engine_clock import (
    ROUNDS,
    copy_seconds,
    merge_seconds,
    print_rows,
    process_seconds,
    row,
    warm,
)
from pykernels.bench.llama import Layout, write

RANK = 16
_MERGE = [sys.executable, "-m", "pykernels.cli", "lora", "merge"]
_PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, out, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
for adapter in adapters:
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out)
"""


def write_adapters(folder: Path, layout: Layout, count: int) -> list[Path]:
    """``count`` float32 adapters of rank 16 on all seven projections of every layer."""
    made = []
    for at in range(count):
        path = folder / f"adapter{at}"
        path.mkdir(parents=True, exist_ok=True)
        random = torch.Generator().manual_seed(1000 + at)
        factors: dict[str, torch.Tensor] = {}
        for name, shape in layout.shapes():
            if "_proj" not in name:
                continue
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=random).mul_(0.02)
            factors[f"{module}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=random).mul_(0.02)
        save_file(factors, path / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
            "target_modules": "all-linear", "bias": "none",
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))
        made.append(path)
    return made


def measure(place: Path, base: Path, layout: Layout) -> list[dict[str, Any]]:
    """One and four adapters, hot, against a copy of the base; then the whole process against PEFT's."""
    adapters = write_adapters(place, layout, 4)
    file = base / "model.safetensors"
    counts = (1, 4)
    calls: dict[str, Callable[[], float]] = {"copy": partial(copy_seconds, place, [file])}
    calls |= {_name(n): partial(_merge_seconds, place, base, adapters[:n]) for n in counts}
    seconds: dict[str, list[float]] = {call: [] for call in calls}
    for _ in range(ROUNDS):
        for call, run in calls.items():
            warm([file])
            seconds[call].append(run())
    control = statistics.median(seconds["copy"])
    rows = [row(_name(n), statistics.median(seconds[_name(n)]), "cp 1", control) for n in counts]
    return [*rows, *_peft(place, base, adapters[:1])]


def _name(count: int) -> str:
    return f"lora merge, {count} x rank {RANK}, hot" if count > 1 else f"lora merge, rank {RANK}, hot"


def _merge_seconds(place: Path, base: Path, adapters: list[Path]) -> float:
    return merge_seconds([*_MERGE, str(base), *map(str, adapters)], place / "merged")[0]


def _peft(place: Path, base: Path, adapters: list[Path]) -> list[dict[str, Any]]:
    try:
        import peft  # noqa: F401
    except ImportError:
        return []
    ours = statistics.median(
        merge_seconds([*_MERGE, str(base), *map(str, adapters)], place / "merged")[1] for _ in range(3)
    )
    command = [sys.executable, "-c", _PEFT, str(base), str(place / "peft"), *map(str, adapters)]
    theirs = process_seconds(command)
    return [row("PEFT merge_and_unload, whole process", theirs, "pykernels lora merge", ours)]


def main() -> None:
    """Print this part's rows."""
    layout = replace(Layout(), layers=21) if "--large" in sys.argv[1:] else Layout()
    with tempfile.TemporaryDirectory(prefix="pykernels-bench-") as name:
        [base] = write(Path(name), layout, tuned=0)
        print_rows(measure(Path(name), base, layout), print)


if __name__ == "__main__":
    main()
