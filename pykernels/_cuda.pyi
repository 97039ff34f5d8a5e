"""Types of the CUDA module: addresses, sizes and codes; see csrc/bindings_cuda.cpp."""

class Job:
    def __init__(
        self, dtype: int, out: int, out_dtype: int, base: int, tuned: list[int], numel: int, offset: int
    ) -> None: ...
    def numbers(
        self,
        weight: list[float],
        weight_at: int,
        vote: list[float],
        vote_at: int,
        share: list[float],
        share_at: int,
        lambda_: float,
        lambda_at: int,
    ) -> None: ...
    def draws(self, threshold: list[int], index: list[int], key: int) -> None: ...
    def cut(self, key: list[int], last: list[int]) -> None: ...
    def cut_at(self, key: int, last: int) -> None: ...
    def select(self, k: list[int], scratch: int) -> None: ...
    def grad(self, grad: int, dtype: int) -> None: ...

class Softmax:
    def __init__(
        self,
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
    ) -> None: ...
    def scratch(self, device: int) -> int: ...
    def run(self, device: int, stream: int, scratch: int) -> None: ...

class SoftmaxBackward:
    def __init__(
        self,
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
    ) -> None: ...
    def scratch(self, device: int) -> int: ...
    def run(self, device: int, stream: int, scratch: int) -> None: ...

_Matrix = tuple[int, int, int, int]

class LoraRows:
    def __init__(
        self,
        out: int,
        out_dtype: int,
        low: int,
        low_step: int,
        bias: int,
        x: _Matrix,
        m: int,
        k: int,
        n: int,
        adapters: list[tuple[int, _Matrix, _Matrix, float]],
        places: tuple[int, int, int, int],
        drop: tuple[int, int, int, int],
    ) -> None: ...
    def scratch(self, device: int) -> int: ...
    def run(self, device: int, stream: int, scratch: int) -> None: ...

class LoraReduce:
    def __init__(
        self,
        a: _Matrix,
        low: int,
        low_step: int,
        m: int,
        n: int,
        sinks: list[tuple[int, _Matrix, float]],
        places: tuple[int, int, int, int],
        drop: tuple[int, int, int, int],
    ) -> None: ...
    def scratch(self, device: int) -> int: ...
    def run(self, device: int, stream: int, scratch: int) -> None: ...

def lora_by_warp(rows: int, rank: int) -> bool: ...
def lora_table_words(rows: int, adapters: int, rank: int) -> int: ...
def lora_deal(
    table: int, index: int, step: int, rows: int, adapters: int, rank: int, device: int, stream: int
) -> None: ...

class Layer:
    def __init__(
        self,
        dtype: int,
        out: int,
        out_dtype: int,
        weight: int,
        rows: int,
        cols: int,
        scale: int,
        by_column: bool,
    ) -> None: ...
    def add(
        self,
        left: int,
        left_dtype: int,
        left_steps: tuple[int, int],
        right: int,
        right_dtype: int,
        right_steps: tuple[int, int],
        rank: int,
        scale: float,
        scale_at: int,
    ) -> None: ...

def table_bytes(jobs: list[Job]) -> int: ...
def kth_scratch(numel: int, n: int) -> int: ...
def linear_merge(jobs: list[Job], dtype: int, device: int, stream: int, table: int) -> None: ...
def ties_merge(jobs: list[Job], dtype: int, device: int, stream: int, table: int, combine: int) -> None: ...
def ties_fused(
    jobs: list[Job], dtype: int, device: int, stream: int, table: int, combine: int, keep_equals: bool
) -> None: ...
def dare_merge(jobs: list[Job], dtype: int, device: int, stream: int, table: int, combine: int) -> None: ...
def kth_magnitude(jobs: list[Job], dtype: int, device: int, stream: int, table: int) -> None: ...
def magnitude_histogram(
    jobs: list[Job], dtype: int, device: int, stream: int, table: int, shift: int, all: bool
) -> None: ...
def l1_norms(jobs: list[Job], dtype: int, device: int, stream: int, table: int) -> None: ...
def dot_products(jobs: list[Job], dtype: int, device: int, stream: int, table: int) -> None: ...
def elect_sign(jobs: list[Job], dtype: int, device: int, stream: int, table: int, combine: int) -> None: ...
def lora_table_bytes(layers: list[Layer]) -> int: ...
def merge_lora(layers: list[Layer], device: int, stream: int, table: int) -> None: ...
def lora_squares(layers: list[Layer], device: int, stream: int, table: int) -> None: ...
def merge_in_order(
    out: int,
    out_dtype: int,
    weight: int,
    dtype: int,
    rows: int,
    cols: int,
    left: int,
    right: int,
    rank: int,
    scale: int,
    by_column: bool,
    device: int,
    stream: int,
) -> None: ...
def squares_in_order(
    out: int,
    out_dtype: int,
    weight: int,
    dtype: int,
    rows: int,
    cols: int,
    left: int,
    right: int,
    rank: int,
    scale: int,
    by_column: bool,
    device: int,
    stream: int,
) -> None: ...
def memory() -> str: ...
def unavailable() -> str | None: ...
