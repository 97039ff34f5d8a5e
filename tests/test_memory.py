"""Tensors whose memory is not there, and memory that another thread changes: refused by name, never read."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

import pykernels as pk
from pykernels import backends, memory
from pykernels.ops.lora_pass import everyday_grouped

W, A, B, X = (torch.linspace(-1, 1, a * b).view(a, b) for a, b in ((48, 64), (4, 64), (48, 4), (8, 64)))
ROW, INDEX = W[:, 0].contiguous(), torch.zeros(8, dtype=torch.int64)
LORA = pk.LoRA(A, B, 0.5)


def freed(t):
    """As FSDP leaves a parameter between its uses."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def freed_view(t):
    """Its address is not null: it lies behind the start of what is gone."""
    whole = torch.empty(t.numel() + 1000, dtype=t.dtype)
    view = whole[1000:].view(t.shape)
    whole.untyped_storage().resize_(0)
    return view


def shrunk(t):
    """All but its last byte is there."""
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes - 1)
    return t


CALLS = {
    "softmax: x": lambda f: pk.softmax(f(X)),
    "softmax: x, long": lambda f: pk.softmax(f(X.repeat(1, 2000))),
    "softmax: x, not an everyday call": lambda f: pk.softmax(f(X), temperature=2.0),
    "softmax: out": lambda f: pk.softmax(X, out=f(X)),
    "softmax: mask": lambda f: pk.softmax(X, mask=f(X)),
    "softmax: sink": lambda f: pk.softmax(X, sink=f(X[:, :1])),
    "log_softmax: x": lambda f: pk.log_softmax(f(X)),
    "log_softmax: out": lambda f: pk.log_softmax(X, out=f(X)),
    "logsumexp: x": lambda f: pk.logsumexp(f(X)),
    "linear_merge: tensors[0]": lambda f: pk.linear_merge([f(W), W], 1.0),
    "linear_merge: tensors[1]": lambda f: pk.linear_merge([W, f(W)], 1.0),
    "linear_merge: out": lambda f: pk.linear_merge([W, W], 1.0, out=f(W)),
    "linear_merge: weight": lambda f: pk.linear_merge([W, W], f(ROW[:2])),
    "task_arithmetic: base": lambda f: pk.task_arithmetic(f(W), [W]),
    "task_arithmetic: lambda_": lambda f: pk.task_arithmetic(W, [W], lambda_=f(ROW[0])),
    "ties_merge: tuned[0]": lambda f: pk.ties_merge(W, [f(W)], density=0.5),
    "dare_merge: base": lambda f: pk.dare_merge(f(W), [W], density=0.5, seed=1),
    "kth_magnitude: tuned[0]": lambda f: pk.kth_magnitude(W, [f(W)], 0.5),
    "elect_sign: deltas[0]": lambda f: pk.elect_sign([f(W)]),
    "trim: delta": lambda f: pk.trim(f(W), 0.5),
    "drop_rescale: delta": lambda f: pk.drop_rescale(f(W), 0.5, seed=1),
    "lora_linear: x": lambda f: pk.lora_linear(f(X), W, A, B, scaling=1.0),
    "lora_linear: weight": lambda f: pk.lora_linear(X, f(W), A, B, scaling=1.0),
    "lora_linear: lora_A": lambda f: pk.lora_linear(X, W, f(A), B, scaling=1.0),
    "lora_linear: lora_B": lambda f: pk.lora_linear(X, W, A, f(B), scaling=1.0),
    "lora_linear: bias": lambda f: pk.lora_linear(X, W, A, B, scaling=1.0, bias=f(ROW)),
    "lora_linear_grouped: x": lambda f: pk.lora_linear_grouped(f(X), W, [LORA], INDEX),
    "lora_linear_grouped: adapters[0].A": lambda f: pk.lora_linear_grouped(
        X, W, [LORA._replace(A=f(A))], INDEX
    ),
    "lora_linear_grouped: index": lambda f: pk.lora_linear_grouped(X, W, [LORA], f(INDEX)),
    "merge_lora: weight": lambda f: pk.merge_lora(f(W), [LORA]),
    "merge_lora: weight, as PEFT": lambda f: pk.merge_lora(f(W), [LORA], rounding="peft"),
    "merge_lora: adapters[0].A": lambda f: pk.merge_lora(W, [LORA._replace(A=f(A))]),
    "merge_lora: adapters[0].magnitude": lambda f: pk.merge_lora(W, [LORA._replace(magnitude=f(ROW))]),
    "merge_lora: out": lambda f: pk.merge_lora(W, [LORA], out=f(W)),
    "dora_norm: weight": lambda f: pk.dora_norm(f(W), A, B, 0.5),
    "compose_lora: adapters[0].A": lambda f: pk.compose_lora([LORA._replace(A=f(A))], 1.0),
    "compose_lora: adapters[0].B": lambda f: pk.compose_lora([LORA._replace(B=f(B))], 1.0, method="svd"),
}
FOLLOWED = ("softmax: x", "softmax: mask", "log_softmax: x", "logsumexp: x", "lora_linear: x")
FOLLOWED += ("lora_linear: lora_A", "lora_linear: bias", "merge_lora: adapters[0].A", "linear_merge: weight")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", [freed, freed_view, shrunk])
def test_memory_that_is_not_there(form, name):
    said = f"{name.split(',')[0]} must have memory behind all its elements, a storage of at least "
    with pytest.raises(ValueError) as error:
        CALLS[name](form)
    assert str(error.value).startswith(said)


def test_the_words_say_how_much_there_is():
    view = W.clone()[2:, ::2]
    view.untyped_storage().resize_(4000)
    with pytest.raises(ValueError, match=r"a storage of at least 12284 bytes, got 4000$"):
        pk.softmax(view)


def test_what_is_there_is_taken():
    """To the last byte; nothing is asked of what has no elements."""
    whole = torch.zeros(100)
    for view in (whole[36:].view(8, 8), whole[:1].expand(8, 8), whole[1::2], whole[100:]):
        assert memory._holds(view)
        assert pk.softmax(view).shape == view.shape
    empty = freed(torch.zeros(0, 4))
    assert pk.softmax(empty).shape == pk.linear_merge([empty], 1.0).shape == (0, 4)


class Wrapper(torch.Tensor):
    """A tensor without memory that hands operators to the one it holds."""

    @staticmethod
    def __new__(cls, held):
        """Of the shape and dtype of ``held``."""
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, strides=held.stride())

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """The operator on what is held."""
        args, kwargs = tree_map(lambda t: t.held if isinstance(t, cls) else t, (args, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, function(*args, **kwargs))


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_type_with_operators_of_its_own(name):
    got = CALLS[name](Wrapper)
    assert type(got) is Wrapper
    assert torch.equal(got.held, CALLS[name](lambda t: t))


@pytest.mark.parametrize("form", [Wrapper, FakeTensorMode().from_tensor], ids=["wrapper", "fake"])
@pytest.mark.parametrize(
    "name",
    [n for n in CALLS if n.endswith(("out", "]", "base", "delta")) or n == "merge_lora: weight"],
)
def test_where_no_operator_takes_it(name, form):
    """A fake tensor outside its mode is such a type too."""
    with pytest.raises(TypeError, match=r"must be a plain tensor, got (Wrapper|FakeTensor), which has"):
        CALLS[name](form)


def test_fakes_and_zeros_without_memory():
    fake = FakeTensorMode().from_tensor(X)
    assert isinstance(pk.softmax(fake), FakeTensor)
    with pytest.raises(ValueError, match=r"^softmax: x must have memory .* at least 24 bytes, got 0$"):
        pk.softmax(torch._efficientzerotensor((2, 3)))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: pk.softmax(torch.nested.nested_tensor([X])), "softmax: x must be a dense tensor"),
        (lambda: pk.trim(torch.nested.nested_tensor([X]), 0.5), "trim: delta must be a dense tensor"),
        (lambda: pk.ties_merge(W, [W, W.to_sparse_csr()], density=0.5), r"ties_merge: tuned\[1\] must be"),
        (lambda: pk.ties_merge(W, [W], density=0.5, lambda_=ROW[0].to_sparse()), "ties_merge: lambda_ must"),
        (lambda: pk.dora_norm(W.to(torch.complex64), A, B, 1.0), "dora_norm: weight must be float32"),
        (lambda: pk.dora_norm(W.int(), A, B, 1.0), "dora_norm: weight must be float32"),
    ],
)  # fmt: skip
def test_other_kinds_of_tensors(call, error):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=f"^{error}"):
        call()


@pytest.mark.parametrize("learned", [False, True], ids=["no gradient", "gradient"])
def test_an_index_is_used_as_it_was_checked(monkeypatch, learned):
    """What writes to it after the check, forward or before the backward pass, changes nothing or is seen."""
    index, x = INDEX.clone(), X.clone().requires_grad_(learned)
    wanted = pk.lora_linear_grouped(x, W, [LORA], index)
    call = backends.call

    def late(op, like):
        index.numpy()[:] = 1 << 40
        return call(op, like)

    monkeypatch.setattr(backends, "call", late)
    with pk.use_backend("cpu") if backends.missing("cpu") is None else pk.use_backend("ref"):
        got = pk.lora_linear_grouped(x, W, [LORA], index)
    assert torch.equal(got, wanted)
    if learned:
        with pytest.raises(ValueError, match=r"index must lie in \[-1, 1\), got 1099511627776"):
            got.sum().backward()


@pytest.mark.skipif(everyday_grouped(X, W, [LORA], INDEX, None) is None, reason="there is no everyday call")
def test_an_index_that_changes_during_an_everyday_call():
    x, index, stop = X.repeat(8, 1), INDEX.repeat(8), threading.Event()
    wanted = pk.lora_linear_grouped(x, W, [LORA], index)
    values = index.numpy()

    def write():
        while not stop.is_set():
            values[:] = 1 << 40
            values[:] = 0

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            done = everyday_grouped(x, W, [LORA], index, None)
            assert done is None or torch.equal(done, wanted)
    finally:
        stop.set()
        thread.join()


def test_a_span_counts_to_the_last_element():
    x = torch.zeros(6, 10)
    for view in (x, x[:, 3], x.t(), x[::2, 1:4], x[:0], x[0, 0]):
        at = torch.arange(60).as_strided(view.shape, view.stride())
        assert memory.span(view) == (4 * (int(at.max()) + 1) if view.numel() else 0)
