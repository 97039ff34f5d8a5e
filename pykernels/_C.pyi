"""Types of the compiled module: addresses, sizes and codes; see csrc/bindings*.cpp."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import ModuleType

import torch

def linear_merge(
    out: int,
    out_dtype: int,
    dtype: int,
    base: int,
    tuned: list[int],
    numel: int,
    weight: list[float],
    threads: int,
) -> None: ...
def ties_merge(
    out: int,
    out_dtype: int,
    dtype: int,
    base: int,
    tuned: list[int],
    numel: int,
    key: list[int],
    last: list[int],
    weight: list[float],
    vote: list[float],
    share: list[float],
    lambda_: float,
    combine: int,
    offset: int,
    threads: int,
) -> None: ...
def ties_fused(
    out: int,
    out_dtype: int,
    dtype: int,
    base: int,
    tuned: list[int],
    numel: int,
    k: list[int],
    keep_equals: bool,
    weight: list[float],
    vote: list[float],
    share: list[float],
    lambda_: float,
    combine: int,
    threads: int,
) -> None: ...
def dare_merge(
    out: int,
    out_dtype: int,
    dtype: int,
    base: int,
    tuned: list[int],
    numel: int,
    threshold: list[int],
    index: list[int],
    key: int,
    weight: list[float],
    vote: list[float],
    share: list[float],
    lambda_: float,
    combine: int,
    offset: int,
    threads: int,
) -> None: ...
def l1_norms(
    sums: int,
    dtype: int,
    base: int,
    tuned: list[int],
    numel: int,
    threshold: list[int],
    index: list[int],
    key: int,
    offset: int,
    threads: int,
) -> None: ...
def dot_products(
    sums: int,
    grad_dtype: int,
    grad: int,
    dtype: int,
    base: int,
    tuned: list[int],
    numel: int,
    threads: int,
) -> None: ...
def kth_magnitude(
    dtype: int, base: int, tuned: list[int], numel: int, k: list[int], threads: int
) -> tuple[list[int], list[int]]: ...
def magnitude_histogram(
    bins: int,
    dtype: int,
    base: int,
    tuned: list[int],
    numel: int,
    shift: int,
    prefix: list[int] | None,
    threads: int,
) -> None: ...
def elect_sign(
    out: int, dtype: int, deltas: list[int], numel: int, weight: list[float], combine: int, threads: int
) -> None: ...
def softmax(
    out: int,
    out_dtype: int,
    x: int,
    dtype: int,
    outer: int,
    n: int,
    inner: int,
    kind: int,
    mask: int,
    mask_kind: int,
    mask_stride: tuple[int, int, int],
    sink: int,
    sink_stride: tuple[int, int],
    temperature: float,
    softcap: float,
    safe: bool,
    threads: int,
) -> None: ...
def softmax_backward(
    out: int,
    out_dtype: int,
    grad: int,
    grad_dtype: int,
    y: int,
    dtype: int,
    outer: int,
    n: int,
    inner: int,
    kind: int,
    scale: float,
    threads: int,
) -> None: ...
def merge_lora(
    out: int,
    out_dtype: int,
    weight: int,
    dtype: int,
    rows: int,
    cols: int,
    factors: list[tuple[tuple[int, int, int, int], tuple[int, int, int, int], int, float, float]],
    scale: int,
    by_column: bool,
    threads: int,
) -> None: ...
def lora_squares(
    sums: int,
    weight: int,
    dtype: int,
    rows: int,
    cols: int,
    factors: list[tuple[tuple[int, int, int, int], tuple[int, int, int, int], int, float, float]],
    by_column: bool,
    threads: int,
) -> None: ...
def product(
    out: tuple[int, int, int, int],
    bias: int,
    a: tuple[int, int, int, int],
    b: tuple[int, int, int, int],
    m: int,
    n: int,
    k: int,
    rows: int,
    extensions: list[tuple[int, int, int, tuple[int, int, int, int], tuple[int, int, int, int], float]],
    parts: list[tuple[int, int, int, tuple[int, int, int, int]]],
    drop: tuple[int, int, int],
    threads: int,
) -> None: ...
def shrink(
    low: int,
    low_stride: int,
    a: tuple[int, int, int, int],
    k: int,
    rows: int,
    parts: list[tuple[int, int, int, tuple[int, int, int, int]]],
    drop: tuple[int, int, int],
    threads: int,
) -> None: ...
def reduce(
    out: tuple[int, int, int, int],
    begin: int,
    end: int,
    rank: int,
    scale: float,
    low: int,
    low_stride: int,
    a: tuple[int, int, int, int],
    n: int,
    rows: int,
    drop: tuple[int, int, int],
    threads: int,
) -> None: ...
def lend_tensors(
    kind: type[torch.Tensor],
    forced: ContextVar[str | None],
    empty_like: Callable[..., torch.Tensor],
    written: Callable[[torch.Tensor], bool],
    threads: Callable[[], int],
    watches: tuple[Callable[[], int], Callable[[], object], ModuleType],
) -> bool: ...
def know_tensors(kind: type[torch.Tensor], parameter: type[torch.Tensor]) -> bool: ...
def have_memory(tensors: Sequence[torch.Tensor]) -> bool: ...
def take_shortcuts(
    library: str, kind: type[torch.Tensor], trials: list[tuple[torch.Tensor, int, int, int, bool, bool]]
) -> bool: ...
def softmax_rows(x: object, dim: object, out: object) -> torch.Tensor | None: ...
def log_softmax_rows(x: object, dim: object, out: object) -> torch.Tensor | None: ...
def logsumexp_rows(x: object, dim: object, keepdim: object) -> torch.Tensor | None: ...
def lend_layers(
    kind: type[torch.Tensor],
    parameter: type[torch.Tensor],
    adapter: type,
    forced: ContextVar[str | None],
    recording: Callable[[], bool],
    threads: Callable[[], int],
    float_rows: int,
    watches: tuple[Callable[[], int], Callable[[], object], ModuleType],
    written: Callable[[torch.Tensor], bool],
) -> bool: ...
def lora_layer(
    x: object,
    weight: object,
    lora_A: object,
    lora_B: object,
    scaling: object,
    bias: object,
    column_scale: object,
) -> torch.Tensor | None: ...
def lora_layers(
    x: object, weight: object, adapters: object, index: object, bias: object
) -> torch.Tensor | None: ...
def lora_merge(
    weight: object, adapters: object, fan_in_fan_out: object, out: object, rounding: object
) -> torch.Tensor | None: ...
def count_nonfinite(dtype: int, data: int, numel: int) -> int: ...
def ideal(out: int, inputs: list[int], bytes: int, threads: int) -> None: ...
def advise_huge(data: int, bytes: int) -> None: ...
def own_threads(own: bool) -> bool: ...
def forget_team() -> None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
