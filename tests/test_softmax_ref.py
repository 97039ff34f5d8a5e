"""The truth of softmax against torch in float64, in blocks and whole; and the paper's kernel, shown wrong."""

from __future__ import annotations

import pytest
import torch

from pykernels.ref import softmax as truth
from pykernels.ref import softmax_blocks as blocks
from pykernels.ref.two_pass_softmax import two_pass_softmax
from tests.bounds import assert_same_bits
from tests.softmax_cases import INF, KINDS, LEAST, MOST, NAN, SPECIAL, drawn, units


def filled(row, x, *options, shape=None):
    """A row op's result on x [outer, n, inner]."""
    out = torch.full(shape or x.shape, 7.0, dtype=x.dtype)
    row(out, x, *options)
    return out


@pytest.mark.parametrize("name", SPECIAL)
def test_special_rows_are_torchs(name):
    x = torch.tensor(SPECIAL[name], dtype=torch.float32).view(1, -1, 1)
    none = (1.0, None, None, None, False)
    for got, wanted in (
        (filled(blocks.softmax, x, *none), x.double().softmax(1)),
        (filled(blocks.log_softmax, x, *none), x.double().log_softmax(1)),
        (filled(blocks.logsumexp, x, 1.0, shape=(1, 1)), x.double().logsumexp(1)),
    ):
        torch.testing.assert_close(got, wanted.to(torch.float32), rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_torchs_in_float64(kind):
    x = drawn(kind, (3, 700, 2)).double()
    none = (1.0, None, None, None, False)
    torch.testing.assert_close(filled(blocks.softmax, x, *none), x.softmax(1), rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(filled(blocks.log_softmax, x, *none), x.log_softmax(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        filled(blocks.logsumexp, x, 1.0, shape=(3, 2)), x.logsumexp(1), rtol=1e-12, atol=1e-12
    )


def test_options_in_their_order():
    x, mask = drawn("3 randn", (2, 50, 3)).double(), drawn("small", (2, 50, 3), 1).double()
    sink = torch.randn(2, 3, dtype=torch.float64)
    z = 2.0 * (x / 2.0).tanh() / 0.7 + mask
    wanted = torch.cat([z, sink[:, None]], 1).softmax(1)[:, :-1]
    torch.testing.assert_close(filled(blocks.softmax, x, 0.7, 2.0, mask, sink, False), wanted)
    wanted = z.masked_fill(mask > -40, -INF).log_softmax(1)
    got = filled(blocks.log_softmax, x, 0.7, 2.0, None, None, False)
    torch.testing.assert_close(got, (z - mask).log_softmax(1))
    keep = mask <= -40
    got = filled(blocks.softmax, x + torch.where(keep, 0.0, NAN), 0.7, 2.0, keep, None, False)
    torch.testing.assert_close(got, (z - mask).masked_fill(~keep, -INF).softmax(1))


def test_a_sum_with_infinite_sinks():
    x = torch.tensor([[1.0, 2.0], [-INF, -INF]]).unsqueeze(2)
    for sink, wanted in (
        (-INF, [[0.2689414, 0.7310586], [0.0, 0.0]]),
        (0.5, [[0.2312239, 0.6285317], [0.0, 0.0]]),
        (INF, [[NAN, NAN], [NAN, NAN]]),
        (NAN, [[NAN, NAN], [NAN, NAN]]),
    ):
        got = filled(blocks.softmax, x, 1.0, None, None, torch.full((2, 1), sink), True)
        torch.testing.assert_close(got.squeeze(2), torch.tensor(wanted), equal_nan=True)


def test_safe_rows():
    x = torch.tensor([[-INF, -INF], [-INF, NAN], [-INF, INF], [LEAST, LEAST]]).unsqueeze(2)
    got = filled(blocks.softmax, x, 1.0, None, None, None, True).squeeze(2)
    wanted = torch.tensor([[0.0, 0.0], [NAN, NAN], [NAN, NAN], [0.5, 0.5]])
    torch.testing.assert_close(got, wanted, equal_nan=True)
    got = filled(blocks.log_softmax, x, 1.0, None, None, None, True).squeeze(2)
    torch.testing.assert_close(got, wanted.log(), equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1000, 1), (3, 100, 7), (5, 9, 40), (2, 64, 64), (70, 1, 1), (2, 0, 3)])
def test_blocks_do_not_matter(monkeypatch, shape):
    x, grad = drawn("masked", shape), drawn("small", shape, 2)
    x[..., 0] = -INF if shape[0] > 2 else x[..., 0]
    keep = drawn("equal", shape) < 1
    sink = torch.zeros(shape[0], shape[2])

    def results():
        yield filled(blocks.softmax, x, 0.5, 3.0, keep, sink, True)
        yield filled(blocks.log_softmax, x, 0.5, None, None, None, False)
        yield filled(blocks.logsumexp, x, 2.0, shape=(shape[0], shape[2]))
        yield filled(lambda out, *a: blocks.softmax_backward(out, grad, *a), x.softmax(1), 0.5)
        yield filled(lambda out, *a: blocks.log_softmax_backward(out, grad, *a), x.softmax(1).log(), 0.5)

    whole = list(results())
    monkeypatch.setattr(blocks, "LARGEST", 64)
    for got, wanted in zip(results(), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-7, atol=1e-7, equal_nan=True)


def test_in_place():
    x = drawn("3 randn", (4, 100, 2))
    wanted = filled(blocks.softmax, x, 1.0, None, None, None, False)
    blocks.softmax(x, x, 1.0, None, None, None, False)
    assert_same_bits(x, wanted)


def test_parts_of_a_row_join_to_the_whole():
    z = drawn("30 randn", (5, 90)).double()
    z[1, :30], z[2], z[3, 40], z[4, 80] = -INF, -INF, NAN, INF
    parts = truth.joined(truth.row_sum(z[:, :30], 1), truth.row_sum(z[:, 30:], 1))
    for got, wanted in zip(parts, truth.row_sum(z, 1), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_logits_are_rounded_step_by_step():
    x = torch.tensor([LEAST, 3.0])
    assert truth.logits(x, 1.0, None, torch.tensor([LEAST, 0.0])).tolist() == [-INF, 3.0]
    assert truth.logits(x, 0.1, None, None).tolist() == [-INF, float(torch.tensor(3.0) / torch.tensor(0.1))]
    assert truth.logits(x.double(), 1.0, None, x.double()).tolist() == [2 * LEAST, 6.0]


class TestPublishedKernel:
    """Where the two passes of the paper, as published, are no drop-in."""

    def test_right_on_plain_rows(self):
        x = drawn("3 randn", (4, 4096))
        assert units(two_pass_softmax(x), x.double().softmax(1)).max() < 10

    @pytest.mark.parametrize(
        ("row", "published"),
        [
            ([INF, 0.0, 1.0], [NAN, 0.0, 0.0]),  # torch: all NaN
            ([LEAST] * 4, [NAN] * 4),  # torch: a quarter each
            ([LEAST, -INF], [NAN, NAN]),  # torch: 1 and 0
            ([MOST, 0.0], [NAN, 0.0]),  # torch: 1 and 0
            ([1e30, -1e30], [NAN, NAN]),  # torch: 1 and 0
        ],
    )
    def test_wrong_on_special_rows(self, row, published):
        x = torch.tensor([row])
        got = two_pass_softmax(x)
        torch.testing.assert_close(got, torch.tensor([published]), equal_nan=True)
        assert not torch.allclose(got, x.softmax(1), equal_nan=True)

    def test_wrong_where_products_have_no_fraction(self):
        x = torch.tensor([[1e8, 1e8 - 16]])
        assert two_pass_softmax(x)[0, 1] < 0.5 * x.softmax(1)[0, 1]

    def test_float_sums_drift(self):
        x = drawn("equal", (1, 1 << 15))
        got = two_pass_softmax(x)
        assert units(got, x.double().softmax(1)).max() > 100
