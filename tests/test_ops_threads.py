"""Calls from many threads at once, from forked children, and with the interpreter lock released."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import pykernels as pk
from tests.cases import make

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
pytestmark = pytest.mark.skipif(
    os.environ.get("PYKERNELS_BACKEND") == "ref",
    reason="about the kernels' threads: torch's own do not survive a fork",
)


def products(b: torch.Tensor, t: list[torch.Tensor]) -> torch.Tensor:
    """A layer's, which torch's threads work on where they can."""
    rows = b.view(-1)[: min(8, len(b) // 64) * 64].view(-1, 64)
    weight = t[0][: len(b) // 64 * 64].view(-1, 64)
    return pk.lora_linear(rows, weight, weight[:1], weight[:, :1], scaling=0.5)


OPS = (
    lambda b, t: pk.linear_merge([b, *t], 1.0),
    lambda b, t: pk.ties_merge(b, t, density=0.2),
    lambda b, t: pk.ties_merge(b, t, density=0.5, tie="keep", elect="plain"),
    lambda b, t: pk.dare_merge(b, t, density=0.2, seed=1, rescale="l1", consensus="ties"),
    lambda b, t: pk.kth_magnitude(b, t, 0.2),
    lambda b, t: pk.elect_sign(t, 1.0),
    products,
)


def test_32_threads_at_once_get_the_right_bits():
    shapes = [(n, m) for n in (64, 4097, 70_001, 140_003) for m in (1, 3)]
    inputs = [make("ties", n, m, torch.bfloat16) for n, m in shapes]
    with native.use_threads(1):
        wanted = [[op(*i) for op in OPS] for i in inputs]
    barrier, interval = threading.Barrier(32), sys.getswitchinterval()

    def work(seed: int) -> bool:
        barrier.wait()
        right = True
        for step in range(24):
            i, o = (seed + step) % len(inputs), (seed * 7 + step) % len(OPS)
            with native.use_threads(1 + (seed + step) % 3):
                right &= torch.equal(OPS[o](*inputs[i]), wanted[i][o])
        return right

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(32) as pool:
            assert all(pool.map(work, range(32)))
    finally:
        sys.setswitchinterval(interval)


def test_settings_of_one_thread_do_not_reach_another():
    seen = []
    with pk.use_backend("ref"), native.use_threads(7):
        thread = threading.Thread(target=lambda: seen.append((native.threads(), pk.backends._forced.get())))
        thread.start()
        thread.join()
        assert native.threads() == 7
    assert seen == [(torch.get_num_threads(), os.environ.get("PYKERNELS_BACKEND"))]
    with (
        pytest.raises(ValueError, match="the number of threads must be at least 1, got 0"),
        native.use_threads(0),
    ):
        pass


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"this machine has .*, got 'mmx'"), native.use_isa("mmx"):
        pass


def test_own_threads_are_kept_for_a_block_of_one_thread_and_change_no_bit():
    base, tuned = make("gaussian", 140_003, 3, torch.bfloat16)
    wanted = [op(base, tuned) for op in OPS]
    with native.own_threads():
        with native.own_threads():
            pass
        assert native._C.own_threads(True)
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(native._C.own_threads, False).result()
        assert all(torch.equal(op(base, tuned), w) for op, w in zip(OPS, wanted, strict=True))
    assert not native._C.own_threads(False)


FORKED_FIRST = """
import multiprocessing, torch

def work():
    import pykernels
    raise SystemExit(0 if (pykernels.linear_merge([ones, ones], 1.0).numpy() == 1).all() else 1)

torch.set_num_threads(2)
ones = torch.ones(1 << 20)
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join(40)
raise SystemExit(child.exitcode if child.exitcode is not None else (child.kill(), 3)[1])
"""


def test_a_child_that_imports_the_package_after_torch_used_its_threads():
    """Torch's own operations would wait in it for ever."""
    assert subprocess.run([sys.executable, "-c", FORKED_FIRST], timeout=60).returncode == 0


def wait(child: int, seconds: float) -> int | None:
    """Exit code of a child process, or None when it does not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_can_call_the_kernels():
    base, tuned = make("gaussian", 140_003, 3, torch.bfloat16)
    wanted = [op(base, tuned).view(torch.uint8).numpy().tobytes() for op in OPS]  # the parent's pool is up
    child = os.fork()
    if child == 0:
        try:
            same = [
                op(base, tuned).view(torch.uint8).numpy().tobytes() == w
                for op, w in zip(OPS, wanted, strict=True)
            ]
            os._exit(0 if all(same) else 1)
        finally:
            os._exit(2)
    assert wait(child, 30) == 0
    assert torch.equal(OPS[1](base, tuned), OPS[1](base, tuned))


@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_forked_while_kernels_run():
    base, tuned = make("gaussian", 2**20, 3, torch.bfloat16)
    wanted = OPS[1](base, tuned).view(torch.uint8).numpy().tobytes()
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            pk.ties_merge(base, tuned, density=0.2)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        codes = []
        for _ in range(5):
            child = os.fork()
            if child == 0:
                try:
                    merged = OPS[1](base, tuned).view(torch.uint8).numpy().tobytes()
                    os._exit(0 if merged == wanted else 1)
                finally:
                    os._exit(2)
            codes.append(wait(child, 30))
    finally:
        stop.set()
        for t in threads:
            t.join()
    assert codes == [0] * 5


def test_other_threads_run_while_a_kernel_does():
    base, tuned = make("gaussian", 2**22, 3, torch.bfloat16)

    def longest_pause() -> tuple[float, float]:
        """(the longest time that this thread stood still, the time of the kernel in another)."""
        took = []

        def work() -> None:
            start = time.perf_counter()
            with native.use_threads(1):
                native.dare_merge(
                    torch.empty_like(base),
                    base,
                    tuned,
                    [9] * 3,
                    [0, 1, 2],
                    5,
                    [1.0] * 3,
                    None,
                    None,
                    1.0,
                    None,
                )
            took.append(time.perf_counter() - start)

        thread = threading.Thread(target=work)
        thread.start()
        last, pause = time.perf_counter(), 0.0
        while thread.is_alive():
            now = time.perf_counter()
            last, pause = now, max(pause, now - last)
        return pause, took[0]

    tries = [longest_pause() for _ in range(10)]
    assert any(pause < took / 2 for pause, took in tries), (
        tries
    )  # held, the lock would cost every pause all of it


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fifty_thousand_small_calls_leak_nothing():
    base, tuned = make("gaussian", 64, 3, torch.bfloat16)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(calls: int) -> None:
        for i in range(calls):
            pk.ties_merge(base, tuned, density=0.2)
            if i % 10 == 0:
                with pytest.raises(ValueError, match="density"):
                    pk.ties_merge(base, tuned, density=2.0)

    run(2000)
    before = resident()
    run(50_000)
    assert resident() - before < 5 << 20
