"""Builds the compiled modules with CMake. A machine without a compiler still gets a working (slower) install.

``pykernels._C`` always; ``pykernels._cuda`` where there is an nvcc (``CUDACXX``, on the PATH, or NVIDIA's
wheels); ``pykernels._cuda_emulated``, the CUDA kernels on the host for tests, with PYKERNELS_EMULATED=1.
PYKERNELS_REQUIRE_NATIVE=1 and PYKERNELS_REQUIRE_CUDA=1 make a failure an error, PYKERNELS_CUDA=0 leaves CUDA
out. CUDAARCHS=90-real compiles for one device alone, in a third of the time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MANY_CORES = 8
"""From so many on all modules are built at once: each waits long for its slowest file alone."""
CPU, CUDA, EMULATED = "pykernels._C", "pykernels._cuda", "pykernels._cuda_emulated"
MEANWHILE = {
    CPU: "the references will serve, which are far slower. Install a C++17 compiler and reinstall.",
    CUDA: "Triton's kernels will serve on GPUs.",
    EMULATED: "the CUDA kernels cannot be tested without a device.",
}
REQUIRED = {CPU: "PYKERNELS_REQUIRE_NATIVE", CUDA: "PYKERNELS_REQUIRE_CUDA", EMULATED: "PYKERNELS_EMULATED"}


def asked(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable) == "1"


def nvcc() -> Path | None:
    """The CUDA compiler: the one that CUDACXX names, that of the PATH, or that of NVIDIA's wheels."""
    if named := os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return Path(named)
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return next(iter(sorted(wheels.glob("cu*/bin/nvcc"), reverse=True)), None)


def modules() -> list[str]:
    """What is to be built here."""
    chosen = [CPU]
    if os.environ.get("PYKERNELS_CUDA") != "0" and (nvcc() or asked(REQUIRED[CUDA])):
        chosen.append(CUDA)
    return chosen + [EMULATED] * asked(REQUIRED[EMULATED])


class CMakeBuild(build_ext):
    """One CMake configuration per declared extension, so that none can take another down."""

    def run(self) -> None:
        """Build what can be built; what cannot is left out with a warning, unless it is required."""
        at_once = len(self.extensions) if (os.cpu_count() or 1) >= MANY_CORES else 1
        with ThreadPoolExecutor(at_once) as pool:
            built = list(pool.map(self.attempt, self.extensions))
        self.extensions = [e for e, done in zip(self.extensions, built, strict=True) if done]

    def attempt(self, extension: Extension) -> bool:
        """Whether a module could be built; one that is required must."""
        try:
            self.build_extension(extension)
        except (OSError, subprocess.CalledProcessError) as error:
            if asked(REQUIRED[extension.name]):
                raise
            text = f"WARNING: {extension.name} could not be built ({error}); {MEANWHILE[extension.name]}"
            print(text, file=sys.stderr)
            return False
        return True

    def get_source_files(self) -> list[str]:
        """The sources CMake reads, so that an sdist holds them."""
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()] + [
            "CMakeLists.txt"
        ]

    def build_extension(self, ext: Extension) -> None:
        """Build the CMake target named like the extension and copy it where setuptools wants it."""
        target = ext.name.rpartition(".")[2]
        # An editable build's own folder is new every time: what stands in ours is built once.
        room = (
            ROOT / "build" / sys.implementation.cache_tag if self.inplace else Path(self.build_temp).resolve()
        )
        build = room / target
        build.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        options = self.configuration() + ([f"-DPK{target.upper()}=ON"] if ext.name != CPU else [])
        if ext.name == CUDA:
            compiler = nvcc()
            if compiler is None:
                raise OSError("no nvcc: set CUDACXX, or install NVIDIA's wheels (see constraints.txt)")
            environment["CUDACXX"] = str(compiler)  # as an option it would have everything built again
            # NVIDIA's wheels keep libraries where their own nvcc does not look.
            environment["LIBRARY_PATH"] = (
                f"{compiler.parent.parent / 'lib'}:{os.environ.get('LIBRARY_PATH', '')}"
            )
        subprocess.run([*cmake(), "-S", str(ROOT), "-B", str(build), *options], check=True, env=environment)
        make = [*cmake(), "--build", str(build), "--target", target, "--parallel"]
        subprocess.run(make, check=True, env=environment)
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(f".{out.name}")  # a process may have the old one mapped
        shutil.copy2(next(build.glob(f"{target}.*so")), fresh)
        fresh.replace(out)

    def configuration(self) -> list[str]:
        """Explicit paths: an isolated build puts pybind11 and ninja in a new folder every time."""
        import pybind11

        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if ninja := shutil.which("ninja"):
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        return options


def cmake() -> list[str]:
    """The cmake command: the one of this interpreter's environment first."""
    beside = Path(sys.executable).with_name("cmake")
    return [str(beside)] if beside.exists() else ["cmake"]


setup(
    ext_modules=[Extension(name, sources=[]) for name in modules()],
    cmdclass={"build_ext": CMakeBuild},
)
