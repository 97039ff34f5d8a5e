"""What ``bench/device.sh`` does, step by step: each has its own time, and whatever happens is on record.

Standard library only: it runs before anything is built, by whatever Python the machine has.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 580.0
"""Seconds of all steps together."""
TAIL = 40
"""Lines of a step's output that stay on record when it did not pass."""
NO_DEVICE = 3
RUN = "run.json"
"""The record so far, in the folder of work: the last step judges it."""
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected|xfailed)\b")
_PATIENCE = 45
"""Seconds of one test, after which its process ends: a kernel that waits for ever must not hold the rest."""
_REFUSED = re.compile(
    r"Device not supported|Unable to find (?:a )?compute-sanitizer|not supported on this|ERR_NVGPUCTRPERM"
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One command and the seconds it may take. ``result``: a JSON file that it writes, kept under its name.

    ``needs``: steps that must have passed first. ``tool``: an executable without which it is left out.
    ``always``: runs whatever steps were named.
    """

    name: str
    command: Sequence[str]
    seconds: float
    needs: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    result: Path | None = None
    tool: str | None = None
    always: bool = False
    absent: str = ""  # why there is nothing to do here


def steps(work: Path) -> list[Step]:
    """All steps, in order. ``work``: where they leave what nobody needs afterwards."""
    python = sys.executable
    wheels = sorted(str(path) for path in (ROOT / "wheels").glob("*.whl"))
    pip = [python, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check"]
    ready, architecture = ("device", "build"), _architecture()

    def pytest(workers: int, only: str) -> list[str]:
        """A file that cannot be collected, and a fault that ends a process, must not keep the others."""
        command = [python, "-m", "pytest", "--import-mode=importlib", "--continue-on-collection-errors"]
        command += ["-p", "no:cacheprovider", "-m", only]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(workers), "--max-worker-restart", "200"]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", str(_PATIENCE), "--timeout-method", "thread"]
        return [*command, "tests"]

    def bench(name: str, seconds: float) -> Step:
        out = work / f"{name}.json"
        command = [python, "-m", "pykernels.bench.gpu", name]
        options = ["--out", str(out), "--seconds", f"{seconds - 12:g}"]
        return Step(name, [*command, *options], seconds, ready, result=out)

    def sanitizer(tool: str, backend: str, name: str, seconds: float) -> Step:
        found = shutil.which("compute-sanitizer", path=_search_path()) or "compute-sanitizer"
        cases = [python, "-m", "pykernels.bench.sanitize_cases", "--backend", backend]
        # torch and Triton ask CUDA things that it may refuse, which is no error of a kernel.
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [found, "--tool", tool, *quiet, "--error-exitcode", "9", *cases]
        # Without its cache torch asks the driver for each tensor, so that one byte past its end is seen.
        return Step(name, command, seconds, ready, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, tool=found)

    probe = [python, "bench/device_probe.py", str(work / "probe.json")]
    ncu = shutil.which("ncu", path=_search_path()) or "ncu"
    counts = [python, "-m", "pykernels.bench.gpu_traffic", ncu, "--seconds", "18"]
    targets = [python, "-m", "pykernels.bench.gpu_targets"]
    return [
        Step("wheels", [*pip, "--no-index", "--no-compile", "--target", str(work / "site"), *wheels], 5,
             absent="" if wheels else "no folder wheels", always=True),
        Step("device", probe, 40, result=work / "probe.json", always=True),
        Step("build", [*pip, "--no-build-isolation", "-e", "."], 95, ("device",),
             {"PYKERNELS_REQUIRE_NATIVE": "1", "PYKERNELS_REQUIRE_CUDA": "1"} | architecture),
        # "long": what is compiled ahead of time for three architectures needs no device.
        Step("tests", pytest(15, "not long"), 120, ready, {"OMP_NUM_THREADS": "2"} | architecture),
        sanitizer("memcheck", "cuda", "memcheck", 40),
        sanitizer("racecheck", "cuda", "racecheck", 30),
        bench("table", 30),
        bench("softmax", 55),
        bench("lora", 80),
        Step("traffic", [*counts, "--out", str(work / "traffic.json")], 25, ready, tool=ncu,
             result=work / "traffic.json"),
        bench("peers", 20),
        bench("llama", 30),
        Step("targets", [*targets, str(work / RUN), str(work / "targets.json")], 5, ready,
             result=work / "targets.json"),
        Step("large", pytest(3, "large"), 25, ready, {"PYKERNELS_LARGE": "1"}),
        sanitizer("memcheck", "triton", "memcheck-triton", 25),
    ]  # fmt: skip


def run(plan: Sequence[Step], record: Record, save: Any, log: Path, limit: float = LIMIT) -> int:
    """Run the steps; ``save(record)`` after each. Returns the exit status."""
    end = time.monotonic() + limit
    record["steps"] = []
    for step in plan:
        why = _unable(step, record["steps"])
        left = end - time.monotonic()
        if not why and left < 5:
            why = "out of time"
        done = {"status": "left out", "why": why} if why else execute(step, min(step.seconds, left), log)
        done |= _keep_result(step, record)
        record["steps"].append({"name": step.name, **done})
        save(record)
        told = f" ({why})" if why else f", {done['seconds']:.0f} s" + done.get("result", "")
        print(f"{step.name}: {done['status']}{told}", flush=True)
    status = {s["name"]: s["status"] for s in record["steps"]}
    if status.get("device") not in (None, "passed"):
        return NO_DEVICE
    return int(any(s in ("failed", "timeout") for s in status.values()))


def _keep_result(step: Step, record: Record) -> Record:
    """Put what a step wrote on record; what is half-written fails that step and stops no other."""
    if step.result is None or not step.result.exists():
        return {}
    try:
        record[step.name] = json.loads(step.result.read_text())
    except (ValueError, OSError) as error:
        return {"status": "failed", "result": f"; {step.result.name} cannot be read: {error}"}
    return {}


def _unable(step: Step, done: Sequence[Record]) -> str:
    """Why a step cannot run, or nothing. A step that was not asked for stands in nobody's way."""
    if step.absent:
        return step.absent
    status = {s["name"]: s["status"] for s in done}
    for need in step.needs:
        if status.get(need, "passed") != "passed":
            return "no device" if need == "device" else f"{need}: {status[need]}"
    if step.tool and not shutil.which(step.tool):
        return f"{step.tool} is not installed"
    return ""


def execute(step: Step, seconds: float, log: Path) -> Record:
    """One step's status, exit code, seconds and, unless it passed, the end of what it printed."""
    if step.result is not None:
        step.result.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("ab") as out:
        out.write(f"== {step.name}: {scrub(' '.join(step.command))}\n".encode())
        out.flush()
        begin = out.tell()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, **step.environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = _wait(process, seconds)
    printed = scrub(log.read_bytes()[begin:].decode(errors="replace"))
    status = "passed" if code == 0 else "timeout" if code is None else "failed"
    if status == "failed" and step.tool and _REFUSED.search(printed):
        status = "refused"
    done: Record = {"status": status, "rc": code, "seconds": round(time.monotonic() - start, 1)}
    lines = printed.splitlines()
    if counts := {word: int(n) for n, word in _COUNT.findall(" ".join(lines[-3:]))}:
        done["counts"] = counts
    if status != "passed":
        done["tail"] = lines[-TAIL:]
    return done


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; None where the time ran out, with the step and all it started ended.

    An interrupt comes first: pytest then says how far it got.
    """
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    for how, patience in ((signal.SIGINT, 5.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    return None


def scrub(text: str) -> str:
    """Text without the names of this machine's folders: a record may be committed."""
    places = {str(ROOT): ".", sys.prefix: "<python>", sys.base_prefix: "<python>"}
    places |= {str(Path.home()): "~", tempfile.gettempdir(): "<temporary>"}
    for place, word in sorted(places.items(), key=lambda item: -len(item[0])):
        if len(place) > 1:
            text = text.replace(place, word)
    return text


def _architecture() -> dict[str, str]:
    """What has the build compile for this device alone; nothing where nobody knows."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=15).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"CUDAARCHS": said.replace(".", "") + "-real"} if re.fullmatch(r"\d+\.\d", said) else {}


def _search_path() -> str:
    """Where executables are looked for: CUDA's folder too."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return os.pathsep.join((os.environ.get("PATH", ""), f"{home}/bin"))


def commit() -> str:
    """The commit, with a + where files differ; PYKERNELS_COMMIT where there is no checkout."""
    if given := os.environ.get("PYKERNELS_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def chosen(plan: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The named steps and those that always run. ValueError for an unknown name."""
    known = [step.name for step in plan]
    for name in names:
        if name not in known:
            raise ValueError(f"device.sh: steps are {', '.join(known)}; got {name!r}")
    return [step for step in plan if step.always or not names or step.name in names]


def main(names: Sequence[str]) -> int:
    """Run the named steps, or all; write device.json and device.log."""
    work = ROOT / "build" / "device"
    out = Path(os.environ.get("OUT") or work)
    shutil.rmtree(work / "site", ignore_errors=True)
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = _search_path()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(work / "site"), os.environ.get("PYTHONPATH")))
    )
    os.environ |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    log = out / "device.log"
    log.unlink(missing_ok=True)

    def save(record: Record) -> None:
        text = json.dumps(record, indent=1) + "\n"
        for path in (work / RUN, out / "device.json"):
            path.write_text(text)

    try:
        plan = chosen(steps(work), names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    record: Record = {"kind": "device", "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    return run(plan, record, save, log)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
