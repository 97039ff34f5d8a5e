"""Builds pykernels._C with CMake. A machine without a compiler still gets a working (slower) install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake configure, one target per declared extension."""

    def run(self) -> None:
        """Configure and build; without a working compiler, warn once and go on without the extension."""
        try:
            super().run()
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("PYKERNELS_REQUIRE_NATIVE") == "1":
                raise
            self.extensions = []
            print(
                f"WARNING: pykernels._C could not be built ({error}); the pure-PyTorch references will "
                "serve, which are far slower. Install a C++17 compiler and reinstall.",
                file=sys.stderr,
            )

    def get_source_files(self) -> list[str]:
        """The sources CMake reads, so that an sdist holds them."""
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()] + [
            "CMakeLists.txt"
        ]

    def build_extension(self, ext: Extension) -> None:
        """Build the CMake target named like the extension and copy it where setuptools wants it."""
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        target = ext.name.rpartition(".")[2]
        subprocess.run([*cmake(), "-S", str(ROOT), "-B", str(build), *self.configuration()], check=True)
        subprocess.run([*cmake(), "--build", str(build), "--target", target, "--parallel"], check=True)
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


setup(ext_modules=[Extension("pykernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
