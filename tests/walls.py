"""Buffers between pages that may not be touched, and the compiled module with all its buffers put there.

Under AddressSanitizer the bytes between a buffer and its walls are poisoned too, so that an access one byte
past the end is fatal wherever the buffer stands; without it, such bytes are checked for writes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PAGE = mmap.PAGESIZE
CANARY = 0xA5
SIZES = {0: 4, 1: 2, 2: 2}
"""Bytes of an element by the dtype code of csrc/math/dtype.h."""

MASK_SIZES = {**SIZES, 3: 1}
LOGSUMEXP = 2
"""The kind of a softmax call that writes one number a row."""

PLACES = ("end", 1, "start", 7, 34, 63, 3, 32)
"""Where a buffer stands: at the wall behind it, at the wall before it, or so many bytes after that wall."""

LAYOUT = {
    **dict.fromkeys(
        ("linear_merge", "ties_merge", "ties_fused", "dare_merge"), "out out_dtype dtype base tuned numel"
    ),
    "l1_norms": "norms dtype base tuned numel",
    "dot_products": "dots grad_dtype grad dtype base tuned numel",
    "kth_magnitude": "dtype base tuned numel",
    "magnitude_histogram": "bins dtype base tuned numel",
    "elect_sign": "signs dtype tuned numel",
    "count_nonfinite": "dtype base numel",
    "softmax": "out out_dtype base dtype outer n inner kind mask mask_kind mask_stride sink sink_stride",
    "merge_lora": "out out_dtype base dtype rows cols factors scale by_column",
    "lora_squares": "squares base dtype rows cols factors by_column",
    "softmax_backward": "out out_dtype grad grad_dtype base dtype outer n inner kind",
}
"""Leading arguments of the functions of ``_C``; ``tuned`` is a list of addresses, ``factors`` one of pairs of
matrices (address, dtype, strides) and their rank, other tensors are one address."""

WITHOUT_TENSORS = {"advise_huge", "forget_team", "ideal", "isa", "isas", "own_threads", "use_isa"}
"""Functions that touch no tensor of a kernel test (``ideal``, the benchmarks' control, needs lines of 64)."""

ELSEWHERE = {
    *("know_tensors", "have_memory", "lend_tensors", "take_shortcuts"),
    *("softmax_rows", "log_softmax_rows", "logsumexp_rows"),
    *("product", "shrink", "reduce", "lend_layers", "lora_layer", "lora_layers", "lora_merge"),
}
"""Functions that take tensors in another form, or none of their elements: softmax's kernels are reached by
``softmax`` too, and the products that layers are made of have guard pages of their own in
test_lora_kernels.py."""

_libc = ctypes.CDLL(None, use_errno=True)


def asan() -> bool:
    """Whether AddressSanitizer watches this process."""
    return hasattr(_libc, "__asan_poison_memory_region")


def _bytes(given: dict[str, Any]) -> dict[str, int]:
    """Sizes of the tensors of a call, by the names of LAYOUT; ``base``: of each of ``tuned`` too."""
    numel, models = _numel(given), len(given.get("tuned", ()))
    blocks = -(-numel // 4096)
    return {
        "base": numel * SIZES[given["dtype"]],
        "grad": numel * SIZES[given.get("grad_dtype", 0)],
        "out": (_rows(given) if given.get("kind") == LOGSUMEXP else numel) * SIZES[given.get("out_dtype", 0)],
        "signs": numel,
        "norms": blocks * models * 16,
        "dots": blocks * models * 8,
        "bins": models * 65536 * 8,
        "scale": given.get("cols" if given.get("by_column") else "rows", 0) * 4,
        "squares": _squares(given) * 8,
        "mask": _span(given, "mask_stride", "outer n inner") * MASK_SIZES.get(given.get("mask_kind"), 0),
        "sink": _span(given, "sink_stride", "outer inner") * 4,
    }


def _squares(given: dict[str, Any]) -> int:
    """Sums of squares: per stretch of 48 rows and column, or per block of 4096 columns and row."""
    rows, cols = given.get("rows", 0), given.get("cols", 0)
    return -(-rows // 48) * cols if given.get("by_column") else -(-cols // 4096) * rows


def _numel(given: dict[str, Any]) -> int:
    if "cols" in given:
        return given["rows"] * given["cols"]
    return given["numel"] if "numel" in given else _rows(given) * given["n"]


def _moved(stage: Stage, factor: tuple[Any, ...], rows: int, cols: int) -> tuple[Any, ...]:
    """A low-rank pair of matrices, each where the stage puts it."""
    left, right, rank, *scales = factor
    moved = []
    for (address, dtype, *steps), shape in ((left, (rows, rank)), (right, (rank, cols))):
        span = 1 + sum(step * (size - 1) for step, size in zip(steps, shape, strict=True))
        moved.append((stage.put(address, span * SIZES[dtype]), dtype, *steps))
    return (*moved, rank, *scales)


def _rows(given: dict[str, Any]) -> int:
    return given["outer"] * given["inner"]


def _span(given: dict[str, Any], strides: str, sizes: str) -> int:
    """Elements from the first to the last of a strided tensor."""
    steps = zip(given.get(strides, ()), sizes.split(), strict=False)
    return 1 + sum(step * max(given[size] - 1, 0) for step, size in steps)


_WRITTEN = {"out", "squares", "signs", "norms", "dots", "bins"}
_EIGHT_ALIGNED = {
    "norms",
    "dots",
    "bins",
    "sink",
    "scale",
    "squares",
}  # the caller's own, never a view of a file


class Region:
    """Pages of memory between two that may not be touched."""

    def __init__(self, pages: int) -> None:
        self.size = pages * PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + PAGE
        for wall in (self.start - PAGE, self.start + self.size):
            if _libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def surround(self, offset: int, nbytes: int) -> None:
        """Mark all but the buffer, for :meth:`check`, and let AddressSanitizer guard it."""
        ctypes.memset(self.start, CANARY, self.size)
        self._guard("__asan_poison_memory_region", 0, offset)
        self._guard("__asan_poison_memory_region", offset + nbytes, self.size)

    def check(self, offset: int, nbytes: int) -> bool:
        """Whether the marks around the buffer are as they were; AddressSanitizer's guards are taken down."""
        self._guard("__asan_unpoison_memory_region", 0, self.size)
        around = self.memory[PAGE : PAGE + offset] + self.memory[PAGE + offset + nbytes : PAGE + self.size]
        return around.count(CANARY) == len(around)

    def _guard(self, function: str, begin: int, end: int) -> None:
        if asan():
            getattr(_libc, function)(ctypes.c_void_p(self.start + begin), ctypes.c_size_t(end - begin))


class Walls:
    """Tensors in regions of their own."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def place(self, tensor: torch.Tensor, *, at_end: bool) -> torch.Tensor:
        """A copy of ``tensor`` that ends (or begins) at a wall."""
        nbytes = tensor.numel() * tensor.element_size()
        region = Region(max(1, -(-nbytes // PAGE)))
        self.regions.append(region)
        offset = PAGE + (region.size - nbytes if at_end else 0)
        copy = torch.frombuffer(region.memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return copy.copy_(tensor)


class Stage:
    """One call's buffers between walls; equal addresses share a place, as an output may be an input."""

    _spare: dict[int, list[Region]] = {}  # noqa: RUF012

    def __init__(self, seed: object) -> None:
        self.seed = seed
        self.buffers: dict[int, tuple[Region, int, int]] = {}

    def put(self, address: int, nbytes: int, step: int = 1) -> int:
        """The address of a copy of so many bytes, at a multiple of ``step``; 0 stays 0."""
        if address == 0:
            return 0
        if address not in self.buffers:
            pages = -(-(nbytes + 64) // PAGE)
            spare = self._spare.setdefault(pages, [])
            region = spare.pop() if spare else Region(pages)
            offset = self._offset(region.size - nbytes, step)
            region.surround(offset, nbytes)
            ctypes.memmove(region.start + offset, address, nbytes)
            self.buffers[address] = region, offset, nbytes
        region, offset, _ = self.buffers[address]
        return region.start + offset

    def _offset(self, room: int, step: int) -> int:
        """A place that depends on the call's arguments alone, so that a failure repeats when run alone."""
        place = PLACES[zlib.crc32(repr((self.seed, len(self.buffers))).encode()) % len(PLACES)]
        wanted = room if place == "end" else 0 if place == "start" else int(place)
        return wanted // step * step

    def close(self, name: str, written: set[int]) -> None:
        """Copy the outputs back; AssertionError where anything around a buffer, or an input, has changed."""
        for address, (region, offset, nbytes) in self.buffers.items():
            intact = region.check(offset, nbytes)
            here = region.start + offset
            if address in written:
                ctypes.memmove(address, here, nbytes)
            else:
                intact = intact and ctypes.string_at(address, nbytes) == ctypes.string_at(here, nbytes)
            self._spare[region.size // PAGE].append(region)
            if not intact:
                raise AssertionError(f"{name}: wrote beside a buffer of {nbytes} bytes, or into an input")


def _behind_walls(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, run on copies of its tensors."""
    names = LAYOUT[name].split()

    def call(*arguments: Any) -> Any:
        given = dict(zip(names, arguments, strict=False))
        nbytes = _bytes(given)
        stage = Stage((name, _numel(given), given["dtype"], len(given.get("tuned", ()))))
        moved: list[Any] = []
        for key in names:
            if key == "tuned":
                moved.append([stage.put(address, nbytes["base"]) for address in given[key]])
            elif key == "factors":
                moved.append([_moved(stage, factor, given["rows"], given["cols"]) for factor in given[key]])
            elif key in nbytes:
                moved.append(stage.put(given[key], nbytes[key], 8 if key in _EIGHT_ALIGNED else 1))
            else:
                moved.append(given[key])
        result = function(*moved, *arguments[len(names) :])
        stage.close(name, {given[key] for key in _WRITTEN & set(names)})
        return result

    return call


class Walled(ModuleType):
    """``_C`` with every function of ``LAYOUT`` run behind walls."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        for name in vars(module):
            function = getattr(module, name)
            setattr(self, name, _behind_walls(name, function) if name in LAYOUT else function)


def load(path: str, name: str = "pykernels._C") -> ModuleType:
    """The extension module in a file, under a name of the package."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no extension module: {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(path: str) -> None:
    """Let ``pykernels._C`` be the build at ``path``, behind walls.

    The emulated CUDA kernels beside it come along as they are: their tests build walls of their own.
    """
    if "pykernels._C" in sys.modules:
        raise ImportError(f"pykernels._C is loaded already, and not from {path}")
    sys.modules["pykernels._C"] = Walled(load(path))
    for emulated in Path(path).parent.glob("_cuda_emulated.*"):
        name = "pykernels._cuda_emulated"
        sys.modules[name] = load(str(emulated), name)
