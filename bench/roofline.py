"""The harness: interleaved calls on rotating inputs, medians, and the control that every row is divided by.

The control ("ideal") is the XOR of all inputs of the row with a non-temporal store of one output, over
the same buffers in the same loop: what memory allows. It is printed before and after the rows too, as a
machine that somebody else uses moves under the benchmark.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pykernels import _C, native
from pykernels.bench import lora_calls, lora_rows, peers, softmax_calls, turns
from pykernels.bench.cases import CASES, Case
from pykernels.bench.inputs import LOGITS, LORA, Inputs, Spec, make, sets

COPY_BYTES = 128 << 20
_ASLEEP = 0.015
"""Seconds after which a thread that waits for work has stopped to do so at a core's cost."""

Row = dict[str, Any]
Timed = Mapping[str, Callable[[int], Any]]


def interleave(calls: Timed, rounds: int, settle: Callable[[int], Any]) -> dict[str, list[float]]:
    """Seconds of every call in every round, the calls taking turns. A call gets the round's number.

    ``settle`` runs untimed before every call: whatever ran before would otherwise leave its dirty lines in
    the cache, to be written back at the next call's cost. It is repeated until torch's threads sleep, which
    keep a core busy for milliseconds after their work (libgomp waits so). A call may have a
    ``setting`` (it gives a context): it is entered and the call run once, untimed.
    """
    for call in calls.values():
        call(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(1, rounds + 1):
        for name, call in calls.items():
            with ExitStack() as stack:
                if setting := getattr(call, "setting", None):
                    stack.enter_context(setting())
                    call(i - 1)
                awake = time.perf_counter() + _ASLEEP
                settle(i + 1)
                while time.perf_counter() < awake:
                    settle(i + 1)
                start = time.perf_counter()
                call(i)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rounds(cases: Sequence[Case]) -> int:
    """More repetitions for short calls, as one of them says less; as many as a verdict on pairs takes
    where logits of one kind are held against those of another."""
    if any("logits" in case.options for case in cases):
        return turns.ROUNDS
    nbytes = max(case.nbytes for case in cases)
    return 15 if nbytes < 200 << 20 else 9 if nbytes < 1 << 30 else 5


class Setting:
    """A call that runs under another thread count or instruction set."""

    def __init__(self, case: Case, call: Callable[[int], Any]) -> None:
        self.case, self.call = case, call

    def __call__(self, i: int) -> Any:
        """The call alone; the harness has entered the setting."""
        return self.call(i)

    @contextmanager
    def setting(self) -> Iterator[None]:
        """The row's threads and instruction set, put back afterwards."""
        before = torch.get_num_threads()
        with ExitStack() as stack:
            if self.case.isa:
                stack.enter_context(native.use_isa(self.case.isa))
            torch.set_num_threads(self.case.threads or before)
            try:
                yield
            finally:
                torch.set_num_threads(before)


def control(inputs: Sequence[Inputs], case: Case) -> Callable[[int], None]:
    """The ideal for this row's inputs: as many tensors read as the op reads, one written.

    Of a merge of adapters it is the weight read and written in place.
    """
    if case.spec.data == LORA:
        return lambda i: lora_calls.read_modify_write(inputs[i % len(inputs)])
    threads = torch.get_num_threads()
    reads = _reads(case)

    def run(i: int) -> None:
        x = inputs[i % len(inputs)]
        native.ideal(x.out, x.all[reads], threads)

    return run


def copy() -> Callable[[int], Any]:
    """A plain copy of 128 MiB through torch; its bandwidth counts the read and the write."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8)
    target = torch.ones_like(source)
    return lambda i: target.copy_(source)


def measure_group(cases: Sequence[Case], inputs: Sequence[Inputs]) -> Iterator[Row]:
    """All rows that share inputs, in one loop with their control and the copy; then their peers."""
    timed: dict[str, Callable[[int], Any]] = {"copy": copy()}
    for case in cases:
        timed.setdefault(_control_of(case), control(inputs, case))
        plain = [case.call(x) for x in inputs]
        call: Callable[[int], Any] = lambda i, plain=plain: plain[i % len(plain)]()  # noqa: E731
        timed[case.name] = Setting(case, call) if case.isa or case.threads else call
    seconds = interleave(timed, rounds(cases), control(inputs, Case("linear_merge")))
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    copy_rate = 2 * COPY_BYTES / middle["copy"]
    for case in cases:
        ideal = middle[_control_of(case)]
        took = middle[case.name]
        row = _row(case, took * 1e3, "ms") | {
            "best": min(seconds[case.name]) * 1e3,
            "gbs": case.nbytes / took / 1e9,
            "of_copy": case.nbytes / took / copy_rate,
            "x_ideal": took / ideal,
        }
        bounds = {"ideal": ideal, "copy": case.nbytes / copy_rate, "ms": 1e-3}
        judge(row, case, took / (middle | bounds).get(case.target.of, float("nan")))
        judge_pairs(row, case, seconds)
        row["peers"] = [peers.measure(peer, case, inputs[0]) for peer in peers.of(case)]
        yield row


def _control_of(case: Case) -> str:
    """Rows that read the same tensors share a control."""
    if case.spec.data == LORA:
        return "ideal in place"
    return f"ideal {case.op}" if case.op in _READS else "ideal"


def _reads(case: Case) -> slice:
    """The tensors of a set that the row's control reads: of logits one, or two where there are two."""
    if case.spec.data == LOGITS:
        return slice(0, 2 if case.spec.n == 1 else 1)
    return _READS.get(case.op, slice(None))


_READS = {"trim": slice(1, 2), "drop_rescale": slice(1, 2), "elect_sign": slice(1, None)}


def judge(row: Row, case: Case, ratio: float) -> None:
    """Hold the row against its target; a ratio to a row that did not run stays open."""
    if ratio == ratio:
        row["ratio"] = ratio
        if case.target.most is not None or case.target.least is not None:
            row["met"] = case.target.met(ratio)


def judge_pairs(row: Row, case: Case, seconds: Mapping[str, Sequence[float]]) -> None:
    """Hold the row against another one of its loop round by round, where there are rounds enough."""
    others = seconds.get(case.target.of, ())
    if case.target.most is None or len(others) < turns.ROUNDS:
        return
    found = turns.middle([a / b for a, b in zip(seconds[case.name], others, strict=True)])
    row |= found.record("ratio") | {"met": found.within(case.target.most, least=False)}


def measure_call(case: Case) -> Row:
    """Microseconds of one call on 64 elements: the median of 200 means of 50 calls."""
    call = case.call(make(case.spec))
    for _ in range(100):
        call()
    means = []
    for _ in range(200):
        start = time.perf_counter()
        for _ in itertools.repeat(None, 50):
            call()
        means.append((time.perf_counter() - start) / 50 * 1e6)
    row = _row(case, statistics.median(means), "us")
    judge(row, case, row["value"])
    return row


def measure_cached(case: Case) -> Row:
    """Microseconds of a call and of its peers' on one set of inputs: medians of 40 means of 20, by turns."""
    x = make(case.spec)
    found = peers.of(case)
    calls = {"": softmax_calls.bound(case.op, x, case.options)}
    calls |= {peer.name: peer.theirs(case, x) for peer in found}
    means: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(40):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in itertools.repeat(None, 20):
                call()
            means[name].append((time.perf_counter() - start) / 20 * 1e6)
    middle = {name: statistics.median(m) for name, m in means.items()}
    row = _row(case, middle[""], "us")
    row["peers"] = [
        {"name": p.name, "ms": middle[p.name] / 1e3, "x": middle[p.name] / middle[""], "least": p.least}
        for p in found
    ]
    for peer in row["peers"]:
        peer["met"] = peer["x"] >= peer["least"]
    return row


def measure_turns(case: Case) -> Row:
    """A call and what it is held against, by turns; all compared with float64 first."""
    over = case.kind == "over"
    layer = lora_rows.layer_of(make(case.spec), case.options)
    found = (lora_rows.measure_over if over else lora_rows.measure)(layer, case.options, case.peers)
    row = _row(case, found.pop("value"), "us" if over else "ms") | found
    if over and case.target.most is not None:
        beyond = turns.Middle(row["value"], row["low"], row["high"], row["pairs"])
        row |= {"ratio": row["value"], "met": beyond.within(case.target.most, least=False)}
    return row


def measure_memory(case: Case, inputs: Inputs) -> Row:
    """MiB by which the resident high-water mark grows during one call, inputs and output being resident."""
    call = case.call(inputs)
    gc.collect()
    _libc_trim()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
    before = _status("VmRSS")
    call()
    row = _row(case, max(0.0, (_status("VmHWM") - before) / 1024), "MiB")
    judge(row, case, row["value"])
    return row


def run(select: Callable[[Case], bool], *, with_peers: bool = True) -> Iterator[Row]:
    """Measure the selected cases, row by row. Memory first: later a heap has holes to hide growth in."""
    chosen = [c for c in CASES if select(c) and runs_here(c)]
    if not with_peers:
        chosen = [Case(**{**vars(c), "peers": {}}) for c in chosen]
    memory = [c for c in chosen if c.kind == "memory"]
    if memory:
        x = make(memory[0].spec)
        yield from (measure_memory(case, x) for case in memory)
        del x
    by_spec: dict[Spec, list[Case]] = {}
    for case in chosen:
        if case.kind == "time":
            by_spec.setdefault(case.spec, []).append(case)
    for spec, group in by_spec.items():
        yield from measure_group(group, sets(spec))
    yield from (measure_call(case) for case in chosen if case.kind == "call")
    yield from (measure_cached(case) for case in chosen if case.kind == "cache")
    yield from (measure_turns(case) for case in chosen if case.kind in ("turns", "over"))


def runs_here(case: Case) -> bool:
    """Whether the machine has the row's instruction set and threads."""
    if case.isa and (case.isa == _C.isa() or case.isa not in native.isas()):
        return False
    return case.threads is None or case.threads < torch.get_num_threads()


def controls() -> dict[str, float]:
    """GB/s of the copy and of the control on base + 3 tuned, 4096 x 4096 bf16."""
    spec = Spec()
    x = make(spec)
    case = Case("linear_merge", spec)
    ideal = control([x], case)
    seconds = interleave({"copy": copy(), "ideal": ideal}, 7, ideal)
    nbytes = {"copy": 2 * COPY_BYTES, "ideal": case.nbytes}
    return {name: nbytes[name] / statistics.median(s) / 1e9 for name, s in seconds.items()}


def _row(case: Case, value: float, unit: str) -> Row:
    return {"name": case.name, "op": case.op, "kind": case.kind, "value": value, "unit": unit} | {
        "target": {k: v for k, v in asdict(case.target).items() if v is not None}
    }


def _status(key: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key + ":"))
    return int(line.split()[1])


def _libc_trim() -> None:
    """Give freed heap back, where the C library can, so that growth is seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
