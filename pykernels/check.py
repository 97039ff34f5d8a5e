"""The words of every error that a public op raises, and the checks that raise them.

A message names the op, the argument, the rule and the value, in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

from pykernels import memory

if TYPE_CHECKING:
    from typing_extensions import TypeIs

MAX_MODELS = 64
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = frozenset({float, int})
_PLAIN = frozenset({float, int, list, tuple})
_NONE = frozenset({bool, list, tuple})
"""Types that are no numbers, known without a slow question."""
_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_TINY = 2.0**-126


def same_kind(op: str, first: str, like: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    """``tensor`` must be a contiguous tensor of ``like``'s shape, dtype and device."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != like.shape:
        raise ValueError(
            f"{op}: {name} must have {first}'s shape {list(like.shape)}, got {list(tensor.shape)}"
        )
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have {first}'s dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {first}'s device {like.device}, got {tensor.device}")
    _plain(op, name, tensor)


def one_tensor(op: str, name: str, tensor: torch.Tensor) -> None:
    """``tensor`` must be a contiguous floating-point tensor of a dtype that the ops take."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    _plain(op, name, tensor)


def _plain(op: str, name: str, tensor: torch.Tensor) -> None:
    """Memory must hold the values themselves, one after another."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        dense(op, name, tensor)  # finds the words
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")
    if tensor.is_neg():
        raise ValueError(f"{op}: {name} must not be a negated view, call resolve_neg() first")
    if not memory.hold((tensor,)):
        memory.examine(op, name, tensor, plain=True)


def dense(op: str, name: str, tensor: torch.Tensor) -> None:
    """``tensor`` must have one element per place, in memory."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise ValueError(f"{op}: {name} must be a dense tensor with data, got {kind} on {tensor.device}")


def models(op: str, tuned: Sequence[torch.Tensor], name: str) -> None:
    """``tuned`` must be a sequence of 1 to 64."""
    if isinstance(tuned, torch.Tensor) or not isinstance(tuned, Sequence):
        raise TypeError(f"{op}: {name} must be a sequence of tensors, got {type(tuned).__name__}")
    if not 1 <= len(tuned) <= MAX_MODELS:
        raise ValueError(f"{op}: {name} must hold 1 to {MAX_MODELS} tensors, got {len(tuned)}")


def tensors(
    op: str, base: torch.Tensor | None, tuned: Sequence[torch.Tensor], name: str = "tuned"
) -> torch.Tensor:
    """``base`` (or the first tuned one) and all of ``tuned`` must be alike; returns what they are held to."""
    models(op, tuned, name)
    first, like = ("base", base) if base is not None else (f"{name}[0]", tuned[0])
    one_tensor(op, first, like)
    shape, dtype, device = like.shape, like.dtype, None if like.is_cpu else like.device
    try:
        for i, tensor in enumerate(tuned):
            if (
                (type(tensor) is not torch.Tensor and not isinstance(tensor, torch.Tensor))
                or tensor.dtype is not dtype
                or tensor.shape != shape
                or (not tensor.is_cpu if device is None else tensor.device != device)
                or not tensor.is_contiguous()
                or tensor.is_neg()
            ):
                same_kind(op, first, like, f"{name}[{i}]", tensor)  # finds the words
    except RuntimeError:  # of a kind that has no strides, or no shape
        for i, tensor in enumerate(tuned):
            dense(op, f"{name}[{i}]", tensor)
        raise
    if not memory.hold(tuned):
        for i, tensor in enumerate(tuned):
            memory.examine(op, f"{name}[{i}]", tensor, plain=True)
    return like


def is_tensor(value: object) -> TypeIs[torch.Tensor]:
    """Whether this is a tensor; the type first, as asking the class is slow."""
    return type(value) not in _PLAIN and isinstance(value, torch.Tensor)


def _is_number(value: object) -> bool:
    """An int, a float or what counts as one; the type first, as asking the abstract class is slow."""
    kind = type(value)
    return kind is float or kind is int or (kind not in _NONE and isinstance(value, Real))


def per_model(op: str, name: str, value: float | Sequence[float], n: int) -> list[float]:
    """A finite number, or one per model, as a list of ``n`` floats."""
    if _is_number(value):
        values = [float(value)] * n  # type: ignore[arg-type]
    elif is_tensor(value) and value.dim() == 0:
        values = [float(value)] * n
    else:
        if type(value) in (list, tuple) and not _NUMBERS.issuperset(map(type, value)):  # type: ignore[arg-type]
            _whole(op, name, value)
        try:
            if type(value) is not list and isinstance(value, bool | str | bytes | Mapping):
                raise TypeError
            values = [float(v) for v in value]  # type: ignore[union-attr]
        except (TypeError, ValueError):
            raise TypeError(f"{op}: {name} must be a number or one per model, got {value!r}") from None
        if len(values) != n:
            raise ValueError(
                f"{op}: {name} must be a number or {n} of them, one per model, got a list of {len(values)}"
            )
    for v in values:
        if not -_FLOAT32_MAX <= v <= _FLOAT32_MAX:
            raise ValueError(f"{op}: {name} must be finite in float32, got {v}")
    return values


def _whole(op: str, name: str, values: Any) -> None:
    """Tensors in a list would lose their gradients without a word."""
    if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in values):
        raise ValueError(
            f"{op}: {name} must be one tensor where its gradient is asked for, got a list: torch.stack it"
        )


def coefficient(op: str, name: str, value: torch.Tensor, like: torch.Tensor, models: int | None) -> None:
    """A tensor of numbers beside ``like``: [] for all models or, unless ``models`` is None, one per model."""
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on the inputs' device {like.device}, got {value.device}")
    if value.dim() and (models is None or value.shape != (models,)):
        rule = "[]" if models is None else f"[] or [{models}]"
        raise ValueError(f"{op}: {name} must have shape {rule}, got {list(value.shape)}")
    dense(op, name, value)
    memory.examine(op, name, value)


def no_gradient(op: str, name: str, value: object) -> None:
    """Refuse a tensor whose gradient nothing here could give."""
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} must not require grad, as no gradient is defined: pass {name}.detach()"
        )


def changeable(op: str, out: torch.Tensor) -> None:
    """What torch asks of a tensor that is written to: no gradient, and inference mode for a tensor of it.

    The latter not in a graph, as every run of it asks.
    """
    no_gradient(op, "out", out)
    if not is_compiling() and out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}: out must not be an inference tensor outside of inference mode, as torch allows no update "
            "of one there: pass out.clone()"
        )


def no_out(op: str, out: torch.Tensor | None) -> None:
    """A result that carries a gradient is a new tensor."""
    if out is not None:
        raise ValueError(f"{op}: out must be None where a gradient is asked for: out= records none")


def density(op: str, value: float | Sequence[float], n: int) -> list[float]:
    """The kept fraction, a number in [0, 1] or one per model."""
    values = per_model(op, "density", value, n)
    for v in values:
        if not 0.0 <= v <= 1.0:
            raise ValueError(f"{op}: density must lie in [0, 1], got {v}")
    return values


def number(op: str, name: str, value: float) -> float:
    """A finite number."""
    if not _is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        raise ValueError(f"{op}: {name} must be finite in float32, got {value}")
    return float(value)


def choice(op: str, name: str, value: object, known: tuple[object, ...]) -> None:
    """``value`` must be one of ``known``, by type too (1 is not True)."""
    for k in known:
        if value is k or (type(value) is type(k) and value == k):
            return
    raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def seed(op: str, value: int) -> int:
    """A seed: an integer of at most 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: seed must be an integer, got {type(value).__name__}")
    if not 0 <= value < 2**64:
        raise ValueError(f"{op}: seed must lie in [0, 2**64), got {value}")
    return value


def row_input(op: str, x: torch.Tensor, dtype: torch.dtype | None, *, integers: bool = False) -> torch.dtype:
    """A dense tensor of any strides, float or cast to the float ``dtype``; returns the dtype to work on.

    ``integers``: what is no float counts as float32, as ``torch.logsumexp`` has it.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise NotImplementedError(f"{op}: x must be a dense tensor, got {kind}")
    if x.is_meta:
        raise ValueError(f"{op}: x must be a tensor with data, got one on {x.device}")
    memory.examine(op, "x", x)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if x.dtype in FLOAT_DTYPES:
        return dtype or x.dtype
    if x.dtype.is_complex or (dtype is None and not integers) or (integers and x.dtype.is_floating_point):
        rule = "" if x.dtype.is_complex or integers else ", or dtype= given"
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or float64{rule}, got {x.dtype}")
    return dtype or torch.float32


def dimension(op: str, dim: int, rank: int) -> int:
    """A dimension of a tensor of ``rank`` dimensions, counted from 0; 0 and -1 name the one of a number."""
    if type(dim) is not int and (isinstance(dim, bool) or not isinstance(dim, Integral)):
        raise TypeError(f"{op}: dim must be an integer, got {type(dim).__name__}")
    rank = rank or 1
    if not -rank <= dim < rank:
        raise IndexError(
            f"{op}: Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})"
        )
    return int(dim) % rank


def dimensions(op: str, dims: Sequence[int], rank: int) -> list[int]:
    """Different dimensions, at least one, counted from 0 and in ascending order."""
    if isinstance(dims, str) or not isinstance(dims, Sequence):
        raise TypeError(f"{op}: dim must be an integer or several, got {type(dims).__name__}")
    found = sorted(dimension(op, d, rank) for d in dims)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{op}: dim must name one dimension or several different ones, got {list(dims)}")
    return found


def positive(op: str, name: str, value: float) -> float:
    """A number above 0 that float32 holds without a loss of digits."""
    value = number(op, name, value)
    if not value >= _FLOAT32_TINY:
        raise ValueError(f"{op}: {name} must be positive and normal in float32, got {value}")
    return value


def beside(
    op: str, name: str, value: torch.Tensor, like: torch.Tensor, shape: Sequence[int] | None, first: str = "x"
) -> None:
    """``value`` must be a dense tensor on ``like``'s device, to be broadcast to ``shape`` where given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    dense(op, name, value)
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {first}'s device {like.device}, got {value.device}")
    memory.examine(op, name, value)
    if shape is None:
        return
    short = len(shape) - value.dim()
    if short < 0 or any(a != b and a != 1 for a, b in zip(value.shape, shape[short:], strict=True)):
        raise ValueError(f"{op}: {name} must broadcast to {list(shape)}, got {list(value.shape)}")


def matrix(
    op: str,
    name: str,
    value: torch.Tensor,
    like: torch.Tensor,
    shape: Sequence[int | str],
    *,
    wide: bool = False,
) -> None:
    """``value`` must be a tensor beside x (``like``) of ``shape``, where a letter stands for any size.

    Its dtype must be x's, or with ``wide`` may be float32 as well.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if len(value.shape) != len(shape) or any(
        n != want and not isinstance(want, str) for n, want in zip(value.shape, shape, strict=True)
    ):
        rule = ", ".join(map(str, shape))
        raise ValueError(f"{op}: {name} must have shape [{rule}], got {list(value.shape)}")
    if value.dtype != like.dtype and not (wide and value.dtype == torch.float32):
        rule = f"x's dtype {like.dtype}" + (" or float32" if wide and like.dtype != torch.float32 else "")
        raise TypeError(f"{op}: {name} must have {rule}, got {value.dtype}")
    dense(op, name, value)
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on x's device {like.device}, got {value.device}")
    memory.examine(op, name, value)


def row_output(op: str, out: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> None:
    """``out`` must be a dense tensor of ``x``'s shape and device; the errors of dtype and overlap are
    torch's.
    """
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{op}: out must be a tensor, got {type(out).__name__}")
    dense(op, "out", out)
    if out.dtype != dtype:
        raise RuntimeError(f"{op}: out must have the result's dtype {dtype}, got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"{op}: out must have x's shape {list(x.shape)}, got {list(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"{op}: out must be on x's device {x.device}, got {out.device}")
    if not out.is_contiguous() and any(n > 1 and not s for n, s in zip(out.shape, out.stride(), strict=True)):
        raise RuntimeError(f"{op}: out must have a place for every element, got strides {list(out.stride())}")
    changeable(op, out)
    memory.examine(op, "out", out, plain=True)


def result_dtype(op: str, out_dtype: torch.dtype | None, like: torch.Tensor) -> torch.dtype:
    """The dtype of a new result: ``out_dtype``, or that of the inputs."""
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}")
    return out_dtype or like.dtype


def output(
    op: str,
    out: torch.Tensor,
    out_dtype: torch.dtype | None,
    like: torch.Tensor,
    inputs: Sequence[torch.Tensor],
) -> None:
    """``out`` must fit ``like`` and be an input itself or share no memory with one."""
    one_tensor(op, "out", out)
    changeable(op, out)
    if out_dtype is not None and out.dtype != result_dtype(op, out_dtype, like):
        raise TypeError(f"{op}: out must have out_dtype {out_dtype}, got {out.dtype}")
    if out.shape != like.shape:
        raise ValueError(f"{op}: out must have the inputs' shape {list(like.shape)}, got {list(out.shape)}")
    if out.device != like.device:
        raise ValueError(f"{op}: out must be on the inputs' device {like.device}, got {out.device}")
    if not inputs:
        return
    start, size, same = out.data_ptr(), like.numel() * like.element_size(), out.dtype == like.dtype
    end = start + out.numel() * out.element_size()
    for i, tensor in enumerate(inputs):
        at = tensor.data_ptr()
        if start < at + size and at < end and not (at == start and same):
            raise ValueError(
                f"{op}: out must be an input itself or share no memory with it, overlaps input {i} in part"
            )


def apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors surely share no memory."""
    start, at, first, second = a.data_ptr(), b.data_ptr(), memory.span(a), memory.span(b)
    return not first or not second or start + first <= at or at + second <= start


def aliases(out: torch.Tensor, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether ``out`` is one of the inputs."""
    start = out.data_ptr()
    return any(t.data_ptr() == start for t in inputs) and out.numel() > 0
