"""pykernels lora: adapters merged into a checkpoint, made into one, taken out of a fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pykernels.console import planning, run_merge, writing

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
