"""Random masks and DARE: known answers, one golden mask, and the statistics that the paper promises."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from pykernels.ref.dare_merge import dare_merge
from pykernels.ref.drop_rescale import drop_rescale
from pykernels.ref.l1_norms import l1_norms
from pykernels.ref.philox import draws, mask_key, philox

WORD = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(counter, key, words):
    got = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in got) == words


def scalar_draw(key: int, model: int, element: int) -> int:
    """The draw of one element, on Python's integers."""
    tile, inside = divmod(element, 128)
    j, (lane, half) = inside // 32, divmod(inside % 32, 2)
    c = 16 * tile + lane
    c0, c1, c2, c3 = c & WORD, c >> 32, model, 0
    k0, k1 = key & WORD, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & WORD, p0 >> 32 ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return (c0, c1, c2, c3)[j] >> 16 * half & 0xFFFF


@pytest.mark.parametrize("start", [0, 5, 128, 2**31 - 3, 2**32 * 8 - 64, 2**40 + 77])
@pytest.mark.parametrize("model", [0, 63])
def test_layout_of_the_draws(start, model):
    key = mask_key(2**64 - 1, "lm_head.weight")
    wanted = [scalar_draw(key, model, e) for e in range(start, start + 300)]
    assert draws(key, model, start, 300).tolist() == wanted


def test_golden_mask():
    assert mask_key(0, "") == 0x18CC49CA5BEA08CA
    key = mask_key(7, "model.layers.0.mlp.up_proj.weight")
    assert key == 0x719E121C904F6754
    assert draws(key, 2, 0, 8).tolist() == [38034, 3028, 64294, 56895, 26021, 26830, 31531, 34580]
    kept = draws(key, 2, 0, 4096) < 19661  # density 0.3
    digest = hashlib.sha256(bytes(kept.tolist())).hexdigest()
    assert digest == "8fba1e4348a9458ccb8bc306085f33aacfe5017b3bf7fcdbb09a902527a895b8"


def test_key_is_blake2b_of_seed_and_name():
    digest = hashlib.blake2b(b"\x05\x01" + bytes(6) + "é".encode(), digest_size=8).digest()
    assert mask_key(0x105, "é") == int.from_bytes(digest, "little")


def test_draws_are_uniform_and_models_differ():
    first, second = draws(mask_key(1, "w"), 0, 0, 2**20), draws(mask_key(1, "w"), 1, 0, 2**20)
    counts = torch.bincount(first >> 8, minlength=256).double()
    chi2 = float(((counts - 4096) ** 2 / 4096).sum())
    assert 255 - 5 * math.sqrt(510) < chi2 < 255 + 5 * math.sqrt(510)
    both = ((first < 6554) & (second < 6554)).double().mean()
    assert abs(float(both) - 0.01) < 5 * math.sqrt(0.01 / 2**20)


def test_dropping_by_hand():
    draw = draws(9, 0, 4096, 5).tolist()
    delta = torch.tensor([1.0, -2.0, 3.0, math.nan, 5.0])
    got = drop_rescale(delta, sorted(draw)[2], 9, 2.0, 4096)
    wanted = [2 * d if x < sorted(draw)[2] else 0.0 for d, x in zip(delta.tolist(), draw, strict=True)]
    assert got[[0, 1, 2, 4]].tolist() == [wanted[i] for i in (0, 1, 2, 4)] and bool(got[3].isnan())
    assert drop_rescale(delta[:3], 0, 9, 2.0).tolist() == [0, 0, 0]
    assert drop_rescale(delta[:3], 65536, 9, 1.0).tolist() == [1, -2, 3]


def test_dare_is_unbiased_with_the_variance_of_the_paper():
    # A linear layer: E[drop(delta) x] = delta x, variance p / (1 - p) * sum((delta x)^2), p the drop rate.
    g = torch.Generator().manual_seed(3)
    delta, x = torch.randn(512, generator=g) * 0.01, torch.randn(512, generator=g).double()
    threshold = 13107  # density 0.2
    keep = threshold / 65536
    seeds = [mask_key(s, "w") for s in range(4000)]
    outputs = torch.stack([drop_rescale(delta, threshold, key, 1 / keep) @ x for key in seeds])
    variance = float((1 - keep) / keep * (delta.double() * x).square().sum())
    assert abs(float(outputs.mean() - delta.double() @ x)) < 5 * math.sqrt(variance / 4000)
    assert float(outputs.var()) == pytest.approx(variance, rel=0.12)


def test_dare_of_one_model_is_base_plus_the_dropped_delta():
    g = torch.Generator().manual_seed(4)
    base = torch.randn(1000, generator=g)
    tuned = base + torch.randn(1000, generator=g)
    merged = dare_merge(base, [tuned], [20_000], [0], 5, [0.5], None, None, 1.0, None)
    dropped = drop_rescale(tuned - base, 20_000, 5, 0.5)
    assert torch.equal(merged, base.double() + dropped)


def test_dare_with_consensus_by_hand():
    draw = [draws(5, m, 0, 64) for m in (3, 0)]
    deltas = [torch.full((64,), 2.0), torch.full((64,), -3.0)]
    got = dare_merge(None, deltas, [30_000, 30_000], [3, 0], 5, [1.0, 1.0], None, [1.0, 1.0], 1.0, "weighted")
    first, second = draw[0] < 30_000, draw[1] < 30_000
    wanted = torch.where(second, -3.0, torch.where(first, 2.0, 0.0))  # 3 outvotes 2
    assert torch.equal(got, wanted.double())


def test_the_norm_ratio_is_the_density_only_on_many_even_entries():
    # mergekit's rescale at density 0.1: about 10 on many Gaussian entries, anything on few heavy-tailed ones.
    g = torch.Generator().manual_seed(5)
    many = torch.randn(2**20, generator=g)
    few = torch.tan(math.pi * (torch.rand(200, generator=g) - 0.5))
    ratio = []
    for delta in (many, few):
        before, after = l1_norms(None, [delta], [6554], [0], mask_key(1, "w")).sum(0)[0].tolist()
        ratio.append(before / after)
    assert abs(ratio[0] - 10) < 0.1 < 2 < abs(ratio[1] - 10)
