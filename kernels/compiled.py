"""Every Triton kernel compiled ahead of time, without a GPU: ``python -m pykernels.kernels.compiled``.

Prints registers and stack of each kernel in its benchmark configurations for sm_80, sm_90 and sm_100, and
fails if a kernel spills (a stack), or fuses a product and a sum, which could change a decision, or reads
aligned rows in less than words. Measured is what the launches of :mod:`pykernels.kernels.launch` and
:mod:`pykernels.kernels.row_shapes` would compile: the same blocks, warps and options.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pykernels.kernels import (
    block_sums,
    dare_merge,
    dot_products,
    elect_sign,
    kth_magnitude,
    l1_norms,
    launch,
    linear_merge,
    lora_product,
    lora_reduce,
    lora_rows,
    lora_shapes,
    lora_shrink,
    merge_loop,
    merge_lora,
    rounds,
    row_shapes,
    sample,
    selection,
    softmax,
    softmax_backward,
    table,
    ties_merge,
)

ARCHITECTURES = (80, 90, 100)
DTYPES = (tl.float32, tl.bfloat16)
TABLE = {"rows": "*i64", "jobs": "i32", "stride": "i32", "models": "i32"}
SEARCH = {"states": "*i64", "counts": "*i32", "buffer": "*i32"}
CUT = {"key": "*i64", "last": "*i64"}


class Configuration(NamedTuple):
    """One kernel as it is launched: types of its arguments, values of its constants."""

    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, object]
    warps: int
    fused: bool = False
    """Whether it names fused operations itself; then no other is looked for."""
    wide: bool = False
    """Whether all that it reads, masks too, lies so that loads are of four bytes or more."""
    even: tuple[str, ...] = ()
    """Numbers that are multiples of 16, as sizes of layers are."""
    architectures: tuple[int, ...] = ARCHITECTURES
    stages: int | None = None

    def __str__(self) -> str:
        named = [f"{k}={getattr(v, 'name', v)}" for k, v in self.constants.items() if k in VARIANTS]
        return " ".join([self.kernel.__name__, *named])


VARIANTS = (
    "IN", "MODELS", "COMBINE", "KEEP", "ALIGN", "KIND", "LOG", "CAPPED", "FORM", "LINES", "N", "LOW", "DROP",
    "GROUPED", "SCALED", "ROWS", "COLUMNS",
)  # fmt: skip


class Usage(NamedTuple):
    """What a compiled kernel takes per thread, and what it should not hold: fused operations, short loads."""

    registers: int
    stack: int
    fused: list[str]
    short: list[str]


def configurations() -> Iterator[Configuration]:
    """Every kernel, in the types and constants that benchmarks run."""
    words = {"table": "*i64", "start": "i64", **{f"w{i}": "i64" for i in range(table.WORDS)}}
    yield Configuration(table._pack, words, {}, 1)
    yield Configuration(
        rounds._narrow, {**TABLE, "states": "*i64", "bins": "*i32", "copies": "i32"}, {}, launch.WARPS
    )
    for dtype in DTYPES:
        yield from merges(dtype)
        yield from selections(dtype)
        yield from statistics(dtype)
    yield from softmaxes()
    yield from softmax_gradients()
    yield from lora_layers()
    yield from lora_merges()


def merges(dtype: tl.dtype) -> Iterator[Configuration]:
    """The streaming merges: three models, by every election; on sm_90 alone many, and any byte address."""
    total, weighted, plain = (merge_loop.SUM.value, merge_loop.WEIGHTED.value, merge_loop.PLAIN.value)
    for align, models in ((16, 3), (16, 0), (0, 3)):
        fixed = {
            "SKIP": False, "BASED": True, "IN": dtype, "TO": dtype, "ALIGN": align, "MODELS": models,
            "BLOCK": launch.BLOCK, "TILE": launch.TILE,
        }  # fmt: skip
        runs = ARCHITECTURES if (align, models) == (16, 3) else (90,)
        one = Configuration(linear_merge._linear_merge, TABLE, {"SHARED": False, **fixed}, launch.WARPS)
        yield one._replace(architectures=runs)
        for combine in (total, weighted, plain) if (align, models) == (16, 3) else (weighted,):
            elected = {"COMBINE": combine, "SHARED": combine != total, **fixed}
            for kernel in (ties_merge._ties_merge, dare_merge._dare_merge):
                one = Configuration(kernel, TABLE, elected, launch.WARPS)
                yield one._replace(architectures=runs)


def selections(dtype: tl.dtype) -> Iterator[Configuration]:
    """The kernels of the k-th magnitude, and the histogram."""
    like: dict[str, object] = {"BASED": True, "IN": dtype, "ALIGN": 1}
    tile: dict[str, object] = {**like, "TILE": launch.TILE}
    held: dict[str, object] = {**tile, "CAPACITY": selection.CAPACITY}
    whole = {**like, "SAMPLE": selection.SAMPLE}
    small = {**like, "SMALL": selection.SMALL}
    yield Configuration(sample._select_small, {**TABLE, **CUT}, {"KEEP": False, **small}, selection.WIDE)
    yield Configuration(sample._sample, {**TABLE, "states": "*i64"}, whole, selection.WIDE)
    yield Configuration(rounds._collect, {**TABLE, **SEARCH}, held, selection.SCANNING)
    counters = {**TABLE, **SEARCH, "bins": "*i32", "copies": "i32"}
    yield Configuration(rounds._count, counters, held, selection.WARPS)
    yield Configuration(rounds._equals, {**TABLE, **SEARCH}, held, selection.WARPS)
    locate = {**TABLE, "states": "*i64", "counts": "*i32", **CUT}
    yield Configuration(
        rounds._locate, locate, {"KEEP": False, **tile, "STEP": selection.STEP}, selection.WARPS
    )
    histogram = {**TABLE, "bins": "*i64", "shift": "i32", "copies": "i32"}
    yield Configuration(
        kth_magnitude._magnitude_histogram, histogram, {"PREFIXED": True, **tile}, selection.WARPS
    )


def statistics(dtype: tl.dtype) -> Iterator[Configuration]:
    """The sums over blocks, and the elected signs."""
    like: dict[str, object] = {"IN": dtype, "ALIGN": 16}
    sums = {**TABLE, "sums": "*fp64"}
    fixed = {"BASED": True, **like, "BLOCKS": block_sums.BLOCKS}
    yield Configuration(l1_norms._l1_norms, sums, fixed, launch.WARPS)
    yield Configuration(dot_products._dot_products, sums, {**fixed, "BY": dtype}, launch.WARPS)
    yield Configuration(
        elect_sign._elect_sign, TABLE, {"PLAIN": False, **like, "BLOCK": launch.BLOCK}, launch.WARPS
    )


ROWS = {name: "i64" for name in (*softmax.NUMBERS, *softmax_backward.NUMBERS)}
ROWS |= {"safe": "i32", "temperature": "fp32", "softcap": "fp32", "scale": "fp32", "mosts": "*fp32"}


def rows(
    kernel: Any,
    sizes: tuple[int, int, int],
    reach: row_shapes.Reach,
    dtype: tl.dtype,
    sums: str = "*i64",
    **fixed: object,
) -> Configuration:
    """A kernel over rows [outer, n, inner], aligned, of one dtype."""
    n = sizes[1]
    shape = row_shapes.shape_of(torch.Size(sizes), reach)
    constants = {**fixed, "IN": dtype, "TO": dtype, **shape.fixed(16)}
    warps = constants.pop("num_warps")
    if "FULL" in kernel.arg_names:
        constants["FULL"] = n == shape.tile
    taken = {name: kind for name, kind in {**ROWS, "sums": sums}.items() if name in kernel.arg_names}
    return Configuration(kernel, taken, constants, warps, fused=True, wide=True)


def softmaxes() -> Iterator[Configuration]:
    """softmax and its kin in every regime, with and without what fills most registers."""
    plain: dict[str, object] = {
        "SINK": False, "MASK": None, "CAPPED": False, "TEMPERED": False, "DENSE": False, "MASK_ALIGN": 1
    }  # fmt: skip
    sampled = {**plain, "TEMPERED": True}
    masked = {**sampled, "SINK": True, "MASK": tl.int1, "DENSE": True, "MASK_ALIGN": 16}
    capped = {**masked, "CAPPED": True}
    kinds = (softmax.SOFTMAX.value, softmax.LOG.value, softmax.SUM.value)
    for kernel, sizes, dtype, kind, options in (
        (softmax._softmax_whole, (4096, 60, 1), tl.float32, 1, plain),
        (softmax._softmax_whole, (4096, 4096, 1), tl.float32, 0, plain),
        (softmax._softmax_whole, (4096, 16000, 1), tl.bfloat16, 0, masked),
        (softmax._softmax_whole, (4096, 4000, 1), tl.bfloat16, 0, capped),
        (softmax._softmax_whole, (64, 512, 4096), tl.float32, 0, plain),
        (softmax._softmax_walked, (64, 131072, 1), tl.float32, 1, plain),
        (softmax._softmax_walked, (64, 131072, 1), tl.float32, 2, plain),
        (softmax._softmax_walked, (64, 131072, 1), tl.bfloat16, 0, masked),
        (softmax._softmax_walked, (64, 4096, 4096), tl.float32, 0, plain),
        (softmax._softmax_chunks, (8, 151936, 1), tl.float32, 0, sampled),
        (softmax._softmax_joined, (8, 151936, 1), tl.float32, 0, sampled),
    ):
        degree = 6 if kind or dtype == tl.float32 else 4
        reach = row_shapes.CAPPED if options is capped else row_shapes.FORWARD
        yield rows(kernel, sizes, reach, dtype, KIND=kinds[kind], DEGREE=degree, **options)


def softmax_gradients() -> Iterator[Configuration]:
    """The gradients of softmax and log_softmax in every regime."""
    for kernel, sizes, dtype, log in (
        (softmax_backward._softmax_backward_whole, (4096, 16384, 1), tl.float32, False),
        (softmax_backward._softmax_backward_whole, (4096, 16000, 1), tl.bfloat16, True),
        (softmax_backward._softmax_backward_whole, (64, 512, 4096), tl.float32, True),
        (softmax_backward._softmax_backward_walked, (64, 131072, 1), tl.bfloat16, True),
        (softmax_backward._softmax_backward_chunks, (8, 151936, 1), tl.float32, False),
        (softmax_backward._softmax_backward_joined, (8, 151936, 1), tl.float32, True),
    ):
        yield rows(kernel, sizes, row_shapes.BACKWARD, dtype, "*fp64", LOG=log, BY=dtype)


LAYER = {"x": "IN", "weight": "IN", "bias": "IN", "out": "IN", "low": "*fp32", "parts": "*fp32"}
LAYER |= dict.fromkeys(("order", "ids", "starts", "table"), "*i64")
LAYER |= dict.fromkeys(("n", "k", "sx0", "sx1", "sw0", "sw1", "adapters", "lots", "threshold"), "i32")
LAYER |= {"scaling": "fp32"}
EVEN = ("n", "k", "sx0", "sw0", "sw1")


def layer(
    kernel: Any, shape: lora_shapes.Shape, dtype: tl.dtype, since: int = 80, until: int = 100, **fixed: Any
) -> Configuration:
    """A kernel of a linear layer of even sizes; x contiguous, and what is given as None absent."""
    pointer = {tl.float32: "*fp32", tl.bfloat16: "*bf16", tl.float16: "*fp16"}[dtype]
    named = {"IN": dtype, "LOW": dtype, "FIELD": lora_rows.FACTOR_B.value, "FORM": lora_rows.ACROSS}
    named |= {"TILED": True, "sx1": 1, **fixed}
    named |= {name: value for name, value in shape.fixed(0).items() if name.isupper()}
    named |= {"STEPS": 0, "RANKS": lora_shapes.RANKS}
    names = kernel.arg_names
    constants = {name: value for name, value in named.items() if name in names}
    if not fixed["GROUPED"]:
        constants |= dict.fromkeys({"order", "ids", "starts", "table"} & set(names), None)
    taken = {n: LAYER.get(n, "i64") for n in names if n not in constants and not n.isupper()}
    taken = {name: pointer if kind == "IN" else kind for name, kind in taken.items()}
    even = tuple(name for name in EVEN if name in taken)
    runs = tuple(a for a in ARCHITECTURES if since <= a <= until)
    return Configuration(
        kernel, taken, constants, shape.warps, fused=True, even=even, architectures=runs, stages=shape.stages
    )


def lora_layers() -> Iterator[Configuration]:
    """Linear layers with LoRA: large tiles, those that take most registers, few rows, and sums of parts."""
    half, wide = tl.bfloat16, tl.float32
    made, small, large = lora_product._lora_product, {"until": 80}, {"since": 90}
    forth = {"FROZEN": True, "BIASED": False, "DROP": False, "EVEN": True}
    plain = {**forth, "GROUPED": False, "sw0": 1, "bias": None}
    back = {**forth, "GROUPED": False, "sw1": 1, "bias": None, "FORM": lora_rows.ALONG, "DROP": True}
    many = {**forth, "GROUPED": True, "sw0": 1, "EVEN": False, "BIASED": True, "LOW": wide}
    yield layer(made, lora_shapes.MOST_ROWS, half, **large, **plain)
    yield layer(made, lora_shapes.MANY_ROWS, half, **large, **back, LOW=wide)
    yield layer(made, lora_shapes.MANY_ROWS, half, **large, **many)
    yield layer(made, lora_shapes.MANY_ROWS, half, **small, **plain)
    yield layer(made, lora_shapes.SOME_ROWS, half, **small, **back, LOW=wide)
    yield layer(made, lora_shapes.SOME_ROWS, half, since=90, until=90, **{**back, "TILED": False})
    yield layer(made, lora_shapes.SOME_ROWS, half, **small, **many)
    yield layer(made, lora_shapes.FEW_ROWS, half, **many)
    yield layer(made, lora_shapes.LOW_ALONE, wide, **{**many, "FROZEN": False})
    alike, drop = {"GROUPED": True, "DROP": False}, {"GROUPED": False, "DROP": True, "FORM": lora_rows.ALONG}
    f16, f32 = torch.bfloat16, torch.float32
    for shape, dtype, more in (
        (lora_shapes.shrink(1, 64, f16, f32), half, {**alike, "LOW": wide}),
        (lora_shapes.shrink(99, 64, f16, f16), half, drop),
        (lora_shapes.shrink(99, 64, f16, f32), half, {**drop, "LOW": wide}),
        (lora_shapes.shrink(99, 64, f32, f32), wide, alike),
    ):
        yield layer(lora_shrink._lora_shrink, shape, dtype, **more)
    yield layer(lora_reduce._lora_reduce, lora_shapes.reduce(64, f16), half, **drop)
    yield layer(lora_reduce._lora_reduce, lora_shapes.reduce(16, f16), half, GROUPED=False, DROP=False)
    yield layer(lora_reduce._lora_reduce, lora_shapes.reduce(64, f32), wide, **alike)
    parts = {"parts": "*fp32", "splits": "i32", "n": "i32", "scaling": "fp32"}
    joined = {"low": "*fp32", "count": "i64", **parts}
    yield Configuration(lora_shrink._lora_join, joined, {"BLOCK": lora_shrink.JOINED}, launch.WARPS)
    finished = {"table": "*i64", **parts}
    finished |= dict.fromkeys(("ranks", "rank", "splits", "adapters", "address"), "i64")
    fixed = {"GROUPED": True, "FIELD": lora_rows.GRADIENT_B.value, "TURNED": True, "TO": half}
    fixed |= {"BLOCK": lora_reduce.FINISHED}
    yield Configuration(lora_reduce._lora_finish, finished, fixed, launch.WARPS)


def lora_merges() -> Iterator[Configuration]:
    """Adapters merged into weights, with magnitudes and without, and the norms of these."""
    taken = {"rows": "*i64", "jobs": "i32", "stride": "i32"}
    for kernel, shape, low, more in (
        (merge_lora._merge_lora, lora_shapes.MERGE, tl.bfloat16, {"SCALED": False, "TO": tl.bfloat16}),
        (merge_lora._merge_lora, lora_shapes.MERGE_SCALED, tl.float32, {"SCALED": True, "TO": tl.bfloat16}),
        (merge_lora._lora_squares, lora_shapes.MERGE_SCALED, tl.float32, {}),
    ):
        fixed = {name: value for name, value in shape.fixed(0).items() if name.isupper() and name != "STEPS"}
        fixed |= {"BY_COLUMN": False, "LOW": low, "IN": tl.bfloat16, "ALIGN": 16, "LOW_ALIGN": 1, **more}
        sums = {} if "SCALED" in more else {"sums": "*fp64"}
        yield Configuration(kernel, {**taken, **sums}, fixed, shape.warps, fused=True)


def usage(configuration: Configuration, architecture: int) -> Usage:
    """Compile one configuration. Pointers are aligned: they are tables and allocations of torch."""
    names = list(configuration.kernel.arg_names)
    signature = {name: configuration.arguments.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in configuration.even
    }
    source = ASTSource(configuration.kernel, signature, configuration.constants, aligned)
    options: dict[str, object] = {"num_warps": configuration.warps, "enable_fp_fusion": False}
    if configuration.stages is not None:
        options["num_stages"] = configuration.stages
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run(
            [tool, "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = (int(re.findall(rf"\b{what}:(\d+)", said)[-1]) for what in ("REG", "STACK"))
    fused = [] if configuration.fused else re.findall(r"\bfma\.\S+", kernel.asm["ptx"])
    short = re.findall(r"\bld\.global\.b(?:8|16)\b", kernel.asm["ptx"]) if configuration.wide else []
    return Usage(registers, stack, fused, short)


def usages() -> Iterator[tuple[Configuration, list[Usage]]]:
    """Every configuration on every architecture, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda c: (c, [usage(c, a) for a in c.architectures]), list(configurations()))


def main() -> int:
    """Print the table; 1 where a kernel spills, fuses or reads in short pieces."""
    if launch.INTERPRETED:
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 2
    failures = []
    print(f"{'kernel':<56}" + "".join(f"  sm_{a:<3} regs stack" for a in ARCHITECTURES))
    for configuration, uses in usages():
        found = dict(zip(configuration.architectures, uses, strict=True))
        cells = (f"{u.registers:>13}{u.stack:>6}" if (u := found.get(a)) else " " * 19 for a in ARCHITECTURES)
        print(f"{configuration!s:<56}" + "".join(cells), flush=True)
        if any(u.stack or u.fused or u.short for u in uses):
            failures.append(f"{configuration}: spills, fuses or reads in short pieces: {uses}")
    print(*failures, sep="\n", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
