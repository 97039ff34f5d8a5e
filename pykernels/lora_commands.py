"""pykernels lora: adapters merged into a checkpoint, made into one, taken out of a fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pykernels.console import DOWNLOAD, device, planning, run_merge, writing
from pykernels.engine.collector import no_collection
from pykernels.terminal import gigabytes, printable

if TYPE_CHECKING:
    from pykernels.engine.recipe import Recipe

_WEIGHTS = click.option(
    "--weight", "weights", type=float, multiple=True, help="Of each adapter in turn (default 1)."
)


@click.group()
def lora() -> None:
    """PEFT adapters: merge them into a model, compose several, extract one."""


@lora.command("merge")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.argument("out", type=click.Path(path_type=Path))
@_WEIGHTS
@click.option(
    "--rounding", type=click.Choice(["once", "peft"]), default="once", show_default=True,
    help="once: sum in float32, round once; peft: bit for bit as merge_and_unload.",
)  # fmt: skip
@device
@writing
@planning
def merge(
    base: str,
    adapters: tuple[str, ...],
    out: Path,
    weights: tuple[float, ...],
    rounding: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge every ADAPTER into BASE, in one pass, and write the model OUT."""

    def recipe() -> Recipe:
        from pykernels.engine.recipe import adapter_recipe

        return adapter_recipe(base, adapters, weights, rounding)

    run_merge(recipe, out, quiet=quiet, **options)


METHODS = ("cat", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune", "peft_linear")


@lora.command("compose")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(METHODS), default="cat", show_default=True)
@click.option("--rank", type=click.IntRange(1), help="Of the result (default: the largest of the adapters).")
@click.option("--density", type=float, help="Kept fraction, for ties, magnitude_prune and dare methods.")
@_WEIGHTS
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of dare's masks.")
@DOWNLOAD
def compose(adapters: tuple[str, ...], out: Path, **options: Any) -> None:
    """Make several ADAPTERs into one that PEFT loads, and write it into OUT.

    Methods act on the deltas, not on A and B apart; only peft_linear does, as PEFT. Printed is how far each
    module's result is from what the method makes of the dense deltas (relative, Frobenius).
    """
    with no_collection():
        from pykernels.adapters.compose import compose as run

    made = run(list(adapters), out, **options)
    _print_errors(made.errors)
    click.echo(f"composed into {printable(str(made.out))}: {_modules(made.ranks)}, {gigabytes(made.nbytes)}")


@lora.command("extract")
@click.argument("base")
@click.argument("tuned")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=click.IntRange(1), required=True, help="Of every matrix.")
@DOWNLOAD
def extract(base: str, tuned: str, out: Path, **options: Any) -> None:
    """Write the PEFT adapter OUT that is nearest to TUNED - BASE; the error of every tensor is printed.

    Changed norms and biases are copied in full; what an adapter cannot hold is refused by name.
    """
    with no_collection():
        from pykernels.adapters.extract import extract as run

    made = run(base, tuned, out, **options)
    _print_errors(made.errors)
    for name in (*made.saved, *made.biases):
        click.echo(f"{printable(name)}: copied in full")
    click.echo(f"extracted into {printable(str(made.out))}: {_modules(made.ranks)}, {gigabytes(made.nbytes)}")


def _print_errors(errors: Mapping[str, float]) -> None:
    for name, error in errors.items():
        click.echo(f"{printable(name)}: relative error {error:.3g}")


def _modules(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values(), default=0), max(ranks.values(), default=0)
    return f"{len(ranks)} modules of rank {low if low == high else f'{low} to {high}'}"
