"""Devices by their names: what is refused and why, what the command line prints, CUDA's order of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import pykernels
from pykernels.cli import REFUSED, main
from pykernels.engine import device as devices
from pykernels.engine.device import Cuda, cuda_missing, open_devices
from pykernels.engine.run import merge
from tests.checkpoints import recipe, write_models
from tests.stand_in import StandIn, install


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a fine-tune."""
    path = tmp_path_factory.mktemp("models")
    write_models(path, tuned=1)
    (path / "recipe.yml").write_text(yaml.safe_dump(recipe(path, "ties", tuned=1)))
    return path


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two CUDA devices, of which the second is the current one."""
    monkeypatch.setattr(devices, "cuda_missing", lambda: None)
    monkeypatch.setattr(devices, "Cuda", lambda index: StandIn(index))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(
    "name, found",
    [
        ("cpu", []),
        ("cuda", ["cuda:1"]),
        ("cuda:0", ["cuda:0"]),
        ("cuda:1, cuda:0", ["cuda:1", "cuda:0"]),
    ],
)
def test_names(two: None, name: str, found: list[str]) -> None:
    assert [device.name for device in open_devices(name)] == found


@pytest.mark.parametrize(
    "name, words",
    [
        ("gpu", 'device must be "cpu", "cuda", or such as "cuda:0,cuda:1", got \'gpu\''),
        ("", 'device must be "cpu"'),
        ("cpu,cuda:0", 'device must be "cpu"'),
        ("cuda:-1", 'device must be "cpu"'),
        ("cuda:x", 'device must be "cpu"'),
        ("cuda:0,", 'device must be "cpu"'),
        (0, 'device must be "cpu"'),
        ("cuda:2", "there is no cuda:2, the devices are cuda:0, cuda:1"),
        ("cuda:0,cuda:0", "cuda:0 is named twice"),
        ("cuda,cuda:1", "cuda:1 is named twice"),
    ],
)
def test_names_that_are_refused(two: None, name: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_devices(name)


def fails(text: str) -> Callable[[], None]:
    """A call that raises."""

    def call() -> None:
        raise RuntimeError(text)

    return call


def test_torch_without_cuda(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"device cuda: this torch \(.*\) was built without CUDA"):
        merge(recipe(home, "ties", tuned=1), tmp_path / "out", device="cuda")
    result = CliRunner().invoke(
        main, ["merge", f"{home}/recipe.yml", f"{tmp_path}/out", "--device", "cuda:1"]
    )
    assert result.exit_code == REFUSED and "device cuda:1: this torch" in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fails("Found no NVIDIA driver on your system.\nMore words"))
    assert cuda_missing() == "torch finds no CUDA device: Found no NVIDIA driver on your system."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert cuda_missing() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_missing() is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"device_memory": "1GB"}, "device_memory is for a merge on devices"),
        ({"device": "cuda:0", "device_memory": "2GB"}, r"device_memory must be at most what cuda:0 has free"),
        ({"device": "cuda:0", "device_memory": "10KB"}, "device_memory must be at least"),
        ({"device": "cuda:0", "device_memory": "much"}, "device_memory must be a size such as"),
        ({"device": "cuda:0", "memory": "10KB"}, "memory must be at least 1000000 bytes"),
    ],
)
def test_memory_that_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    made = install(monkeypatch)
    with pytest.raises(ValueError, match=words):
        merge(recipe(home, "ties", tuned=1), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not made[0].allocated


def test_a_forced_backend_that_cannot_run_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    monkeypatch.setattr("pykernels.backends._runs_on", lambda name: "elsewhere")
    with pykernels.use_backend("cpu"), pytest.raises(ValueError, match="backend cpu was forced and does not"):
        merge(recipe(home, "ties", tuned=1), tmp_path / "out", device="cuda:0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--device-memory", "300KB"], []], ids=["stated", "default"])
def test_the_command_line_says_what_was_taken(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    install(monkeypatch)
    arguments = ["merge", f"{home}/recipe.yml", f"{tmp_path}/out", "--device", "cuda:0,cuda:1", *options]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert dry.exit_code == 0 and "cuda:1 (host memory): merges with backend cpu" in dry.stdout
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    allowed = "0.300 MB (--device-memory)" if options else "0.54 GB (half of what was free)"
    assert f"held of at most {allowed}" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("busy: reading ") and "; limited by " in last and "copying down" in last
    quiet = CliRunner().invoke(main, [*arguments, "--overwrite", "--quiet"])
    assert quiet.output == ""


class Recorder:
    """CUDA's streams and events as far as their calls go; copies happen at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.streams = 0
        self.current = "default"

    def stream(self, device: torch.device) -> Any:
        """Streams are numbered: up, compute, down."""
        name = ("up", "compute", "down")[self.streams]
        self.streams += 1
        return type("Stream", (), {
            "name": name,
            "wait_event": lambda s, event: self.calls.append(f"{name} waits for {event.name}"),
            "synchronize": lambda s: self.calls.append(f"synchronize {name}"),
        })()  # fmt: skip

    def event(self, **options: bool) -> Any:
        """An event that remembers where it was recorded."""
        assert options == {"enable_timing": True, "blocking": True}
        recorder = self

        class Event:
            name = "nothing"

            def record(self, stream: Any) -> None:
                self.name = f"{stream.name} {len(recorder.calls)}"
                recorder.calls.append(f"record {self.name}")

            def synchronize(self) -> None:
                recorder.calls.append(f"wait for {self.name}")

            def elapsed_time(self, other: Any) -> float:
                return 2500.0

        return Event()

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """The current stream."""
        self.current, before = stream.name, self.current
        yield
        self.current = before


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """torch.cuda without a device."""
    made, real = Recorder(), torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", made.stream)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.on(type("S", (), {"name": "default"})))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device=None, pin_memory=False: real(n, dtype=dtype))
    return made


def test_cuda_in_the_order_of_its_calls(recorder: Recorder) -> None:
    device = Cuda(3)
    assert (device.name, device.model, device.torch_device) == (
        "cuda:3",
        "NVIDIA H200",
        torch.device("cuda:3"),
    )
    assert device.free() == 1200
    there, here = device.allocate(8), device.pinned(8)
    there.zero_()
    up = device.upload(there, here.fill_(7))
    assert there.tolist() == [7] * 8 and up.wait() == 2.5
    streams: list[str] = []
    assert device.merge(lambda: streams.append(recorder.current), up) == 2.5
    assert device.download(here, there.add_(1)).wait() == 2.5 and here.tolist() == [8] * 8
    device.synchronize()
    assert streams == ["compute"] and recorder.current == "default"
    assert recorder.calls == [
        "record up 0", "record up 1", "wait for up 1",
        "compute waits for up 1", "record compute 4", "record compute 5", "wait for compute 5",
        "record down 7", "record down 8", "wait for down 8",
        "synchronize up", "synchronize compute", "synchronize down",
    ]  # fmt: skip


def test_cuda_has_not_the_memory(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match="cuda:0 could not give 5 bytes in one piece, 1200 are free"):
        Cuda(0).allocate(5)


def test_a_merge_follows_an_upload_to_the_same_device(recorder: Recorder) -> None:
    with pytest.raises(TypeError, match="a merge follows an upload"):
        Cuda(0).merge(lambda: None, object())  # type: ignore[arg-type]
