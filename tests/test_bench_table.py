"""The table of benchmark cases and what is made from a run; the timing itself is not a test's matter."""

from __future__ import annotations

import pytest
import torch

from pykernels.backends import TABLE
from pykernels.bench import chart, inputs, peers, report, roofline, turns
from pykernels.bench.cases import CALLS, CASES, Case, Target
from pykernels.bench.inputs import Spec
from pykernels.bench.lora_calls import values

IDEAL = {"of": "ideal", "word": "", "most": 3.5}
ROW = {
    "name": "ties_merge 4096x4096 bf16 n=3", "op": "ties_merge", "kind": "time", "value": 12.34, "unit": "ms",
    "gbs": 13.6, "of_copy": 0.5, "x_ideal": 2.0, "ratio": 2.0, "met": True, "target": IDEAL,
    "peers": [{"name": "mergekit", "x": 301.2}],
}  # fmt: skip
INDEX = {
    **ROW,
    "ratio": 1.4,
    "met": False,
    "target": {"of": "a row", "word": "keep", "most": 1.3},
    "peers": [],
}
CALL = {
    "name": "trim call 64 elements", "op": "trim", "kind": "call", "value": 20.0, "unit": "us", "ratio": 20.0,
    "met": False, "target": {"of": "us", "word": "", "most": 15.0},
}  # fmt: skip
MACHINE = {
    "cpu": "Some CPU @ 2",
    "threads": 2,
    "isa": "avx2",
    "torch": "2.13.0",
    "peers": {"mergekit": "0.1.5"},
}
MERGE = {
    "name": "ties, hot",
    "seconds": 0.5,
    "against": "cp",
    "control": 0.4,
    "ratio": 1.25,
    "target": "<= 1.6",
}
RUN = {
    "machine": MACHINE,
    "controls": {"before": {"ideal": 24.0, "copy": 20.0}, "after": {"ideal": 23.0, "copy": 19.0}},
    "rows": [ROW, INDEX, CALL],
    "engine": {"about": "base + 3 tuned", "rows": [MERGE]},
}


def test_names_are_unique_and_targets_name_rows():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {c.target.of for c in CASES} - set(names) == {"ideal", "copy", "us", "MiB", "ms"}


def test_every_public_op_has_a_case():
    parts = {"ties_fused", "l1_norms", "dot_products", "magnitude_histogram", "merge_in_order"}
    public = set(TABLE) - parts - {"lora_linear_backward", "dropout_mask", "dora_norm"}
    public |= {"compose_lora"}  # of torch's and this package's own ops: no row in the table of backends
    assert public == set(CALLS) == {case.op for case in CASES}


@pytest.mark.parametrize(
    ("case", "nbytes"),
    [
        (Case("linear_merge"), 5 * 2 * 4096**2),
        (Case("kth_magnitude"), 4 * 2 * 4096**2),
        (Case("ties_merge", Spec(dtype=torch.float32, n=8)), 10 * 4 * 4096**2),
        (Case("elect_sign"), (3 * 2 + 1) * 4096**2),
        (Case("trim", Spec(n=1)), 2 * 2 * 4096**2),
        (Case("softmax", Spec(n=1, data="logits")), 2 * 2 * 4096**2),
        (Case("softmax_backward", Spec(n=1, data="logits")), 3 * 2 * 4096**2),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_least_bytes(case, nbytes):
    assert case.nbytes == nbytes


@pytest.mark.parametrize("case", [c for c in CASES if c.isa is None], ids=lambda case: case.name)
def test_every_case_runs(case):
    x = inputs.make(Spec(shape=(8, 256), dtype=case.spec.dtype, n=case.spec.n, data=case.spec.data))
    x.out.fill_(float("nan"))
    assert torch.isfinite(values(case.call(x)())).all()


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in case.peers if name.endswith("torch")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_peers_agree(case, name):
    peer = next(p for p in peers.of(case) if p.name == name)
    assert peers.compare(peer, case) < 1e-4


def test_a_wrong_peer_is_caught():
    case = next(c for c in CASES if c.op == "linear_merge" and c.peers)
    good = next(iter(peers.of(case)))
    wrong = peers.Peer("wrong", 1.0, lambda case, x: lambda: good.theirs(case, x)() * 1.001, good.ours)
    with pytest.raises(RuntimeError, match="wrong and pykernels disagree on linear_merge"):
        peers.compare(wrong, case)


@pytest.mark.parametrize("data", ["gaussian", "heavy ties", "student-t 4", "block-scaled 128"])
def test_inputs_are_staggered_and_never_constant(data):
    x = inputs.make(Spec(shape=(64, 256), data=data))
    offsets = [t.data_ptr() % 4096 for t in (*x.all, x.out)]
    assert offsets == [320 * i for i in range(5)]
    for tuned in x.tuned:
        delta = tuned.float() - x.base.float()
        assert delta.abs().max() > 0 and delta.std() < 0.01


def test_targets():
    assert Target(most=1.3).met(1.3) and not Target(most=1.3).met(1.31)
    assert Target(least=1.6).met(1.6) and not Target(least=1.6).met(1.59)


def test_a_run_reads_well():
    text = report.markdown(RUN)
    assert (
        "| ties_merge 4096x4096 bf16 n=3 | 12.34 | 13.6 | 50 % | 2.00 | <= 3.5: yes | mergekit 301x |" in text
    )
    assert "| <= 1.3 x keep (is 1.40): NO |  |" in text
    assert "| trim call 64 elements | 20 us |  |  |  | <= 15: NO |  |" in text
    assert "| ties, hot | 0.50 | cp | 0.40 | 1.25 | <= 1.6 |" in text
    assert "24.0 and 23.0 GB/s; copy 20.0 and 19.0 GB/s" in text


def test_the_chart_needs_nothing_beside_it(tmp_path):
    picture, page = chart.draw(RUN, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "data:image/png;base64," in text and "ties_merge 4096x4096 bf16 n=3" in text and "http" not in text


@pytest.mark.parametrize(
    ("slower", "said"),
    [
        ((1.1, 1.15), "(is 1.12, 1.10 to 1.15): yes"),
        ((1.21, 1.3), "(is 1.25, 1.21 to 1.30): NO"),
        ((1.1, 1.3), "(is 1.20, 1.10 to 1.30): not resolved"),
    ],
)
def test_a_row_is_held_against_another_round_by_round(slower, said):
    """The machine slows down by half in some rounds, and no ratio with it."""
    case = next(c for c in CASES if c.options.get("logits") == "masked")
    assert roofline.rounds([case]) == turns.ROUNDS > roofline.rounds([Case("softmax", case.spec)])
    plain = [1.0 + (i // 7 % 2) / 2 for i in range(turns.ROUNDS)]
    seconds = {case.target.of: plain, case.name: [a * slower[i % 2] for i, a in enumerate(plain)]}
    row = {"target": {"of": case.target.of, "word": case.target.word, "most": case.target.most}}
    roofline.judge_pairs(row, case, {name: s[:20] for name, s in seconds.items()})
    assert "met" not in row
    roofline.judge_pairs(row, case, seconds)
    assert report.target(row).endswith(said) and row["pairs"] == turns.ROUNDS
