"""The public ops as torch operators: opcheck, graphs without a break, fakes, and seeds that schemas know."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pykernels as pk
from pykernels import library
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT, weights
from tests.where import DEVICE, make

ALL = (*DTYPES, torch.float64)
NUMEL = 100
WEIGHT = torch.tensor([0.5, 0.2, -0.3, 0.25], device=DEVICE)
LAMBDA = torch.tensor(0.7, device=DEVICE)
BIG = 2**64 - 1

# Each takes [base, *tuned] and options such as out and out_dtype.
MERGES = {
    "linear_merge": lambda x, **o: pk.linear_merge(x, weights(4), **o),
    "linear_merge_tensor": lambda x, **o: pk.linear_merge(x, WEIGHT, normalize=False, **o),
    "task_arithmetic": lambda x, **o: pk.task_arithmetic(x[0], x[1:], weight=(1, 2, 3), lambda_=2, **o),
    "task_arithmetic_tensor": lambda x, **o: pk.task_arithmetic(
        None, x, weight=WEIGHT, lambda_=LAMBDA, normalize=True, **o
    ),
    "ties_merge": lambda x, **o: pk.ties_merge(x[0], x[1:], density=0.3, **o),
    "ties_merge_tensor": lambda x, **o: pk.ties_merge(
        x[0], x[1:], density=[0.3, 1.0, 0.0], weight=WEIGHT[1:], lambda_=LAMBDA, tie="keep", elect="plain",
        normalize="count", **o
    ),
    "dare_merge": lambda x, **o: pk.dare_merge(x[0], x[1:], density=0.3, seed=BIG, normalize=True, **o),
    "dare_merge_tensor": lambda x, **o: pk.dare_merge(
        x[0], x[1:], density=0.3, seed=1, name="w", weight=WEIGHT[1:], lambda_=LAMBDA, rescale="l1",
        consensus="ties", **o
    ),
}  # fmt: skip
STAGES = {
    "trim": lambda x, **o: pk.trim(x[0], 0.3, tie="keep", **o),
    "drop_rescale": lambda x, **o: pk.drop_rescale(x[0], 0.3, seed=2**63, name="v", rescale=None, **o),
}
OTHERS = {
    "kth_magnitude": lambda x: pk.kth_magnitude(x[0], x[1:], [0.3, 0.0, 1.0]),
    "elect_sign": lambda x: pk.elect_sign(x[1:], [1.0, 0.0, -2.0], elect="plain"),
    "elect_sign_tensor": lambda x: pk.elect_sign(x, WEIGHT),
}


def inputs(dtype=torch.bfloat16, numel=NUMEL):
    """[base, *tuned]."""
    base, tuned = make("gaussian", numel, 3, dtype)
    return [base, *tuned]


def compiled(function, **options):
    """``function`` as one graph without a break."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=options.pop("backend", "aot_eager"), **options)


def schemas(dtype):
    """(overload, arguments, keyword arguments) of every operator, its options spread over them."""
    ops = torch.ops.pykernels
    for call in (*MERGES.values(), *STAGES.values(), *OTHERS.values()):
        call(inputs())  # an operator is there once its op has been used
    base, *tuned = inputs(dtype)
    learned, scale = WEIGHT[1:].clone().requires_grad_(), LAMBDA.clone().requires_grad_()
    plain, wide, out = {"out_dtype": None}, {"out_dtype": torch.float32}, {"out": torch.empty_like(base)}
    numbers, tensors, k = ([0.1, 0.2, 0.3], None, 0.5, None), (None, WEIGHT[1:], None, LAMBDA), [0.3] * 3
    average, rules = {"normalize": True}, {"normalize": "weight", "elect": "weighted", "out_dtype": None}
    ties, draws = {**rules, "tie": "index"}, {"seed": -1, "name": "w", "rescale": "l1"}
    dare = {**rules, **draws, "consensus": "ties"}
    summed = {**dare, "consensus": None, "normalize": "nothing"}
    yield ops.linear_merge.default, (tuned, None, learned), average | plain
    yield ops.linear_merge.default, (tuned, [0.1, 0.2, 0.3], None), {"normalize": False} | wide
    yield ops.linear_merge.out, (tuned, None, WEIGHT[1:]), average | plain | out
    yield ops.task_arithmetic.default, (base, tuned, None, learned, None, scale), average | plain
    yield ops.task_arithmetic.default, (None, tuned, [0.1, 0.2, 0.3], None, None, scale), average | wide
    yield ops.task_arithmetic.out, (base, tuned, *numbers), average | plain | out
    yield ops.ties_merge.default, (base, tuned, k, *numbers), ties
    yield ops.ties_merge.out, (base, tuned, k, *tensors), ties | out
    yield ops.dare_merge.default, (base, tuned, k, *tensors), summed
    yield ops.dare_merge.out, (None, tuned, k, *numbers), dare | out
    yield ops.trim.default, (base, 0.3), {"tie": "keep"}
    yield ops.trim.out, (base, 0.3), {"tie": "index"} | out
    yield ops.drop_rescale.default, (base, 0.3), {**draws, "rescale": "density"}
    yield ops.drop_rescale.out, (base, 0.3), draws | out
    yield ops.elect_sign.default, (tuned, None, WEIGHT[1:]), {"elect": "weighted"}
    yield ops.kth_magnitude.default, (base, tuned, [0.3, 0.0, 1.0]), {}
    yield ops.dot_products.default, (tuned[1], base, tuned), {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=SHORT.get)
def test_opcheck(dtype):
    checked = set()
    for overload, arguments, options in schemas(dtype):
        torch.library.opcheck(overload, arguments, options)
        checked.add(str(overload))
    every = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pykernels::")]
    # These have their own: tests/test_softmax_gradient.py, tests/test_lora_operators.py.
    others = ("softmax", "logsumexp", "lora", "dora_norm")
    names = {name.replace("::", ".") for name in every if not any(other in name for other in others)}
    assert checked == {name if name.count(".") == 2 else f"{name}.default" for name in names}


@pytest.mark.parametrize("name", [*MERGES, *STAGES, *OTHERS])
def test_one_graph_gives_the_same_bits(name):
    call = {**MERGES, **STAGES, **OTHERS}[name]
    x = inputs()
    got = compiled(lambda x: call([y * 1 for y in x]) + 0)(x)
    assert_same_bits(got, call(x) + 0)


@pytest.mark.parametrize("name", [*MERGES, *STAGES])
def test_out_in_a_graph(name):
    call = {**MERGES, **STAGES}[name]
    x, out = inputs(), torch.empty(NUMEL, dtype=torch.bfloat16, device=DEVICE)
    wanted = call(x)

    def fill(x, out):
        result = call(x, out=out)
        assert result is out
        return result + 1

    graph = compiled(fill)
    assert_same_bits(graph(x, out), wanted + 1)
    assert_same_bits(out, wanted)
    over = [y.clone() for y in x]
    graph(over, over[0])  # the base itself
    assert_same_bits(over[0], wanted)


@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_dtypes_in_a_graph(dtype):
    x = inputs(dtype)
    for out_dtype in (None, torch.float32):
        got = compiled(lambda x, d=out_dtype: pk.ties_merge(x[0], x[1:], density=0.5, out_dtype=d))(x)
        assert_same_bits(got, pk.ties_merge(x[0], x[1:], density=0.5, out_dtype=out_dtype))


def test_inductor():
    x = inputs(torch.float32)

    def step(x, weight, lambda_):
        merged = pk.task_arithmetic(x[0] * 2, [y * 2 for y in x[1:]], weight=weight, lambda_=lambda_)
        return (pk.trim(merged.detach(), 0.5) + merged).square().sum()

    grads = []
    for run in (step, compiled(step, backend="inductor")):
        leaves = [WEIGHT[1:].clone().requires_grad_(), LAMBDA.clone().requires_grad_()]
        grads.append(torch.autograd.grad(run(x, *leaves), leaves))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_in_a_graph(normalize):
    x = inputs(torch.float32)

    def merged(x, weight, lambda_):
        average = pk.linear_merge(x[1:], weight, normalize=normalize)
        return average + pk.task_arithmetic(x[0], x[1:], weight=weight, lambda_=lambda_, normalize=normalize)

    results = []
    for run in (merged, compiled(merged)):
        leaves = [WEIGHT[1:].clone().requires_grad_(), LAMBDA.clone().requires_grad_()]
        result = run(x, *leaves)
        results.append((result, *torch.autograd.grad(result, leaves, x[1])))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert_same_bits(got.detach(), wanted.detach())


def test_inputs_that_learn_are_constants_in_a_graph():
    x = [y.requires_grad_() for y in inputs(torch.float32)]
    assert not compiled(lambda x: pk.ties_merge(x[0], x[1:], density=0.5))(x).requires_grad
    assert not compiled(lambda x: pk.trim(x[0], 0.5))(x).requires_grad
    weight = WEIGHT[1:].clone().requires_grad_()
    with torch.no_grad():
        got = compiled(lambda x, w: pk.dare_merge(x[0], x[1:], density=0.5, seed=1, weight=w))(x, weight)
    assert_same_bits(got, pk.dare_merge(x[0], x[1:], density=0.5, seed=1, weight=weight.detach()))


def test_numbers_that_change_between_calls():
    base, *tuned = inputs()

    def draw(lambda_, seed, density):
        return pk.dare_merge(base, tuned, density=density, seed=seed, lambda_=lambda_)

    graph = compiled(draw)
    for numbers in ((0.1, 1, 0.5), (0.2, 2, 0.6), (0.3, BIG, 0.7), (0.4, 2**63, 0.9), (0.5, 5, 0.1)):
        assert_same_bits(graph(*numbers), draw(*numbers))


def test_shapes_that_change_between_calls():
    graph = compiled(lambda x: pk.ties_merge(x[0], x[1:], density=0.5), dynamic=True)
    for numel in (7, 9, 4097):
        x = inputs(torch.float32, numel)
        assert_same_bits(graph(x), pk.ties_merge(x[0], x[1:], density=0.5))


def test_the_backend_is_that_of_the_call():
    x = inputs()
    graph = compiled(lambda x: pk.linear_merge(x, 0.25, normalize=False))
    with pk.use_backend("ref"):
        assert_same_bits(graph(x), pk.linear_merge(x, 0.25, normalize=False))
    assert_same_bits(graph(x), pk.linear_merge(x, 0.25, normalize=False))


def test_export():
    class Merge(torch.nn.Module):
        """Four models and the weights that are learned for them."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(WEIGHT.clone())

        def forward(self, *x):
            return pk.linear_merge(x, self.weight)

    program = torch.export.export(Merge(), tuple(inputs()))
    assert_same_bits(program.module()(*inputs()).detach(), pk.linear_merge(inputs(), WEIGHT))


FAKE_ERRORS = [
    (lambda x: pk.ties_merge(x, [x[:2]], density=0.5), "tuned[0] must have base's shape [4], got [2]"),
    (lambda x: pk.trim(x.view(2, 2).t(), 0.5), "trim: delta must be contiguous, got strides [1, 2]"),
    (lambda x: pk.trim(x, 0.5, tie="all"), "trim: tie must be one of 'index', 'keep', got 'all'"),
    (lambda x: pk.linear_merge([x], x), "linear_merge: weight must have shape [] or [1], got [4]"),
    (lambda x: pk.task_arithmetic(x, [x], lambda_=x), "task_arithmetic: lambda_ must have shape [], got [4]"),
    (lambda x: pk.linear_merge([x], 1.0, out=x[:2]), "out must have the inputs' shape [4], got [2]"),
    (lambda x: pk.linear_merge([x], 1.0, out_dtype=torch.int8), "linear_merge: out_dtype must be float32"),
    (lambda x: pk.elect_sign([x], elect="votes"), "elect_sign: elect must be one of 'weighted', 'plain'"),
    (lambda x: pk.drop_rescale(x, 0.5, seed=1, rescale="l2"), "drop_rescale: rescale must be one of"),
    (lambda x: pk.dare_merge(x, [x], density=0.5, seed=1, consensus="sum"), "consensus must be one of"),
    (lambda x: pk.dare_merge(x, [x], density=0.5, seed=-1), "seed must lie in [0, 2**64), got -1"),
    (lambda x: pk.ties_merge(x, [x], density=1.5), "ties_merge: density must lie in [0, 1], got 1.5"),
    (lambda x: pk.ties_merge(x, [x], density=0.5, normalize=1), "normalize must be one of True, False"),
    (lambda x: pk.kth_magnitude(x, x, 0.5), "tuned must be a sequence of tensors, got Tensor"),
]


@pytest.mark.parametrize(("call", "text"), FAKE_ERRORS, ids=[text[:40] for _, text in FAKE_ERRORS])
def test_a_graph_is_refused_with_the_words_of_the_door(call, text):
    with pytest.raises(Exception) as error:
        compiled(call)(torch.ones(4, device=DEVICE))
    assert text in str(error.value)


def test_fakes_have_the_shape_and_dtype_of_the_result():
    ops = torch.ops.pykernels
    list(schemas(torch.float32))
    with FakeTensorMode():
        x = [torch.empty(3, 5, dtype=torch.float16, device=DEVICE) for _ in range(4)]
        merged = ops.linear_merge(x, [1.0] * 4, None, normalize=True, out_dtype=torch.float64)
        assert (merged.shape, merged.dtype) == ((3, 5), torch.float64)
        signs = ops.elect_sign(x, [1.0] * 4, None, elect="plain")
        assert (signs.shape, signs.dtype) == ((3, 5), torch.int8)
        assert ops.kth_magnitude(x[0], x[1:], [0.5] * 3).dtype == torch.float32
        assert ops.kth_magnitude(None, [x[0].double()], [0.5]).dtype == torch.float64
        assert ops.dot_products(x[0], None, x).shape == (4,)


def test_seeds_survive_a_schema():
    for seed in (0, 1, 2**63 - 1, 2**63, BIG):
        assert -(2**63) <= library.signed(seed) < 2**63 and library.unsigned(library.signed(seed)) == seed


def test_eager_calls_without_a_gradient_go_past_the_dispatcher(monkeypatch):
    monkeypatch.setattr(library, "call", None)
    for call in (*MERGES.values(), *STAGES.values(), *OTHERS.values()):
        call(inputs())
