"""``make demo``: train, merge four ways through the command line, compare; then time a large merge."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

from pykernels.bench.engine_clock import copy_seconds, engine_seconds
from pykernels.bench.llama import Layout, write

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo"
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")
ROUNDS = 3
COMMAND = [sys.executable, "-m", "pykernels.cli"]


def main() -> None:
    """Both halves of the demo; everything it makes is under build/demo."""
    console = Console()
    shutil.rmtree(BUILD, ignore_errors=True)
    small(console, beside("digits"))
    large(console)
    console.print("The recipes are in examples/, the models and merges in build/demo/.")


def small(console: Console, digits: ModuleType) -> None:
    """A base, three experts and four merges of them, each measured on every task."""
    console.print("Training a base and three experts on scikit-learn's handwritten digits ...")
    train, test = digits.data()
    models = {"base": digits.pretrain(train)}
    for seed, task in enumerate(digits.TASKS, 2):
        models[f"expert-{task}"] = digits.finetune(models["base"], train, task, seed)
    for name, model in models.items():
        digits.save(model, BUILD / "models" / name)
    for method in METHODS:
        merge(method, BUILD / "merged" / method)
        models[f"merge: {method}"] = digits.load(BUILD / "merged" / method)
    table = Table(
        "model", *(f"digits {task}" for task in digits.TASKS), "all digits", title="Accuracy on unseen images"
    )
    for name, model in models.items():
        shares = [digits.accuracy(model, digits.of_task(test, task)) for task in digits.TASKS]
        table.add_row(name, *(f"{100 * share:.1f} %" for share in (*shares, digits.accuracy(model, test))))
    console.print(table)


def large(console: Console) -> None:
    """A Llama-layout set of 0.25 GB a model, merged with TIES, beside the copy that moves the same bytes."""
    layout = Layout(hidden=1024, layers=5, intermediate=2816, vocabulary=30000)
    console.print(f"Making four models in Llama's layout, {layout.nbytes / 1e9:.2f} GB each ...")
    models = write(BUILD / "llama", layout)
    files = [m / "model.safetensors" for m in models]
    merges, copies = [], []
    for _ in range(ROUNDS):
        merges.append(merge("llama_ties", BUILD / "merged" / "llama_ties"))
        copies.append(copy_seconds(BUILD, files))
    seconds, copied = statistics.median(merges), statistics.median(copies)
    moved = 5 * layout.nbytes / 1e9
    title = f"{moved:.2f} GB: four models read, one written (median of {ROUNDS})"
    table = Table("what", "seconds", "GB/s", title=title)
    table.add_row("pykernels merge, TIES (engine time)", f"{seconds:.2f}", f"{moved / seconds:.2f}")
    table.add_row("cat of three files + cp of one", f"{copied:.2f}", f"{moved / copied:.2f}")
    console.print(table)


def merge(recipe: str, out: Path) -> float:
    """Run ``pykernels merge`` on a recipe of examples/; returns the engine seconds that it prints."""
    command = ["merge", f"examples/{recipe}.yml", str(out.relative_to(ROOT)), "--overwrite"]
    print("$ pykernels", " ".join(command), flush=True)
    done = subprocess.run([*COMMAND, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    return engine_seconds(done.stdout)


def beside(name: str) -> ModuleType:
    """A module of this folder, which is not on the import path under -P."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"examples/{name}.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
