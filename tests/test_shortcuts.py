"""Answers of torch's library in place of Python's: tried before, given up for one wrong, and the same."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import pykernels as pk
from pykernels import backends, memory
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import drawn, without_shortcuts
from tests.test_memory import CALLS, freed, freed_view, shrunk

everyday = pytest.importorskip("pykernels.everyday", exc_type=ImportError)
LENDS = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
pytestmark = [
    pytest.mark.skipif(not LENDS, reason="this torch does not speak DLPack's exchange protocol"),
    pytest.mark.skipif(
        not torch.__version__.startswith(everyday.SHORTCUTS_OF), reason="another torch is not asked"
    ),
]
chosen_freely = pytest.mark.skipif(backends._forced.get() is not None, reason="a backend is forced")
WRONG = {"address": 1, "bytes": 2, "offset": 3, "negated": 4, "learned": 5}


@pytest.fixture
def untaken():
    """No shortcuts, as where a trial went wrong."""
    yield from without_shortcuts()


@pytest.fixture
def trial(monkeypatch):
    """Runs the trials after a change to their list; whether shortcuts were taken."""
    take = everyday._C.take_shortcuts

    def run(change):
        monkeypatch.setattr(
            everyday._C, "take_shortcuts", lambda file, kind, some: take(file, kind, change(some))
        )
        return everyday.take_shortcuts()

    yield run
    monkeypatch.undo()
    assert everyday.take_shortcuts()


@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("field", WRONG)
def test_one_wrong_answer_leaves_all_to_python(trial, field, which):
    def falsify(some):
        said = list(some[which])
        said[WRONG[field]] = (
            not said[WRONG[field]] if field in ("negated", "learned") else said[WRONG[field]] + 1
        )
        return [*some[:which], tuple(said), *some[which + 1 :]]

    assert not trial(falsify)
    assert trial(lambda some: some)


SURROUNDINGS = {
    "a fake mode": FakeTensorMode,
    "a default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "forward mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_trials_go_right_wherever_the_first_call_stands(surrounding):
    with SURROUNDINGS[surrounding]():
        assert everyday.take_shortcuts()


def test_trials_go_right_within_transforms():
    taken = []
    x = torch.randn(2, 3)
    torch.func.vmap(lambda v: (taken.append(everyday.take_shortcuts()), v)[1])(x)
    torch.func.jvp(lambda v: (taken.append(everyday.take_shortcuts()), v)[1], (x,), (x,))
    assert taken == [True, True]


def test_another_torch_is_not_asked(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(everyday, "SHORTCUTS_OF", ())
        assert not everyday.take_shortcuts()
    assert everyday.take_shortcuts()


def test_no_trials_or_none_that_can_be_read(trial):
    for some in ([], [(1, 2)], [None], ()):
        assert not trial(lambda _, some=some: some)
    assert not trial(lambda some: [(some[2][0], *some[0][1:]), *some])


def test_a_library_that_is_not_loaded(tmp_path):
    from pykernels import _C

    for file in (str(tmp_path / "torch.so"), 3):
        assert not _C.take_shortcuts(file, torch.Tensor, [(torch.zeros(1), 0, 4, 0, False, False)])
    with pytest.raises(TypeError, match="takes 3 arguments, got 1"):
        _C.take_shortcuts("torch.so")
    assert everyday.take_shortcuts()


@pytest.mark.parametrize(
    "name", ["softmax: x", "softmax: out", "ties_merge: tuned[0]", "lora_linear: lora_A"]
)
@pytest.mark.parametrize("form", [freed, freed_view, shrunk])
def test_memory_is_asked_for_without_them(untaken, form, name):
    with pytest.raises(ValueError, match="must have memory behind all its elements"):
        CALLS[name](form)


def test_memory_to_the_last_byte():
    whole = torch.zeros(100)
    views = (whole[36:], whole[:1].expand(8, 8), whole[1::2], whole[100:], torch.nn.Parameter(whole))
    assert memory.hold(views)
    whole.untyped_storage().resize_(399)
    assert [memory.hold((v,)) for v in views] == [False, True, False, True, False]


@chosen_freely
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 4, 1, 6), (1,) * 7 + (9,), (1,) * 9 + (9,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_new_results(dtype, shape):
    """As torch makes them, of more dimensions than the shortcut takes too."""
    x = drawn("3 randn", shape).to(dtype)
    got, wanted = pk.softmax(x), torch.softmax(x, -1)
    assert sys.getrefcount(got) == 2
    for of in (
        type,
        torch.Tensor.stride,
        lambda t: (t.dtype, t.device, t.layout, t.requires_grad, t.is_leaf, t._version),
        lambda t: (t.untyped_storage().nbytes(), t.untyped_storage().resizable(), t.is_inference()),
    ):
        assert of(got) == of(wanted)
    with torch.inference_mode():
        assert pk.softmax(x).is_inference()


def held():
    """KiB of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


@chosen_freely
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc tells what a process holds")
def test_results_are_given_back():
    x = torch.randn(60_000)
    pk.softmax(x)
    before = held()
    for _ in range(1500):
        pk.softmax(x), pk.logsumexp(x)
    assert held() - before < 100_000  # of 350,000


@pytest.mark.parametrize("taken", [True, False], ids=["shortcuts", "none"])
def test_an_output_of_inference_mode(taken, request):
    """As torch, which refuses it outside. A tensor from outside may be one inside, too."""
    if not taken:
        request.getfixturevalue("untaken")
    x, plain = torch.randn(2, 3), torch.zeros(2, 3)
    with torch.inference_mode():
        out = torch.zeros(2, 3)
        wanted = pk.softmax(x)
        for given in (out, plain):
            assert_same_bits(pk.softmax(x, out=given), wanted)
    out.untyped_storage().fill_(0)
    lora = pk.LoRA(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    with pytest.raises(RuntimeError, match="merge_lora: out must not be an inference tensor outside of"):
        pk.merge_lora(x, [lora], out=out)
    with pytest.raises(RuntimeError, match="softmax: out must not be an inference tensor outside of"):
        pk.softmax(x, out=out)
    assert not out.any()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        out.add_(1)


@chosen_freely
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 70), (40, 1000), (2, 70_000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_logsumexp_takes_rows(dtype, shape, keepdim):
    x = drawn("3 randn", shape).to(dtype)
    with pk.use_backend("cpu"):  # asks the long way
        wanted = pk.logsumexp(x, keepdim=keepdim)
    for dim in (-1, len(shape) - 1):
        got = everyday._C.logsumexp_rows(x, dim, keepdim)
        assert got.shape == wanted.shape and got.dtype == dtype
        assert_same_bits(got, wanted)
        assert_same_bits(pk.logsumexp(x, dim, keepdim=keepdim), wanted)


@chosen_freely
def test_logsumexp_leaves_the_rest(untaken):
    x, rows = torch.randn(2, 3), everyday._C.logsumexp_rows
    assert rows(x, -1, False) is None
    assert everyday.take_shortcuts()
    assert rows(x, -1, False) is not None
    learned, deep = x.clone().requires_grad_(), torch.randn((1,) * 8 + (3,))
    for given in (
        [1.0],
        learned,
        deep,
        torch._neg_view(x),
        x.double(),
        torch.zeros(2, 0),
        torch.tensor(1.0),
        freed(x),
    ):
        assert rows(given, -1, False) is None
    for dim, keepdim in ((0, False), ([1], False), (2, False), (-1, 1)):
        assert rows(x, dim, keepdim) is None
