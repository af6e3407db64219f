r"""Build a native library with AddressSanitizer and UndefinedBehaviorSanitizer, and test it so.

Usage: python sanitized_build.py EXTENSION FOLDER
EXTENSION is a name in pyproject.toml, such as obc_deploy.native._rows. Prints the library's path.
Run Python with it so:

    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
        OBC_DEPLOY_NATIVE_LIBRARY=FOLDER/sanitized.so python ...
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = "g++"
EVERY_KERNEL = "-DOBC_AVX_VNNI_AS_AVX512"
"""Lets the sparse kernels for AVX-VNNI run where there is AVX512-VNNI."""
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0")
TESTS_ALONE = (
    "import os, pytest, sys; code = pytest.main(sys.argv[1:]); "
    "sys.stdout.flush(); sys.stderr.flush(); os._exit(code)"
)
"""Without the process' end, where a thread of a runtime's own may read what it has freed."""


def build(extension: str, folder: Path, jobs: int = 2) -> Path:
    """The library, compiled from the sources that the package's own build has.

    Raises:
        RuntimeError: the compiler refused; with what it said.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (settings,) = (
        each for each in project["tool"]["setuptools"]["ext-modules"] if each["name"] == extension
    )
    flags = [*settings["extra-compile-args"], EVERY_KERNEL, *SANITIZERS, "-fPIC"]

    def compiled(source: str) -> Path:
        to = folder / f"{Path(source).stem}.o"
        _run([COMPILER, *flags, "-c", str(ROOT / source), "-o", str(to)])
        return to

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, settings["sources"]))
    library = folder / "sanitized.so"
    _run([COMPILER, *SANITIZERS, "-pthread", "-shared", *map(str, objects), "-o", str(library)])
    return library


def environment(extension: str, variable: str, folder: Path) -> dict[str, str]:
    """What makes Python load a sanitized build of an extension, built now; or a skip.

    Args:
        extension: its name in pyproject.toml.
        variable: of the environment, which names another build of the library.
        folder: empty, for the build.
    """
    preloaded = [_runtime_library("libasan.so"), _runtime_library("libstdc++.so")]
    return {
        **os.environ,
        # The C++ library too: what it throws is then seen through the sanitizer.
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        variable: str(build(extension, folder)),
    }


def passed(tests: Sequence[str], folder: Path, environment: dict[str, str]) -> int:
    """How many of a folder's tests passed on a sanitized build; none failed."""
    done = subprocess.run(
        [sys.executable, "-c", TESTS_ALONE, "-qs", "--noconftest", "-pno:cacheprovider", *tests],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = (done.stdout + done.stderr)[-6000:]
    assert "ERROR: AddressSanitizer" not in report, report
    assert "runtime error" not in report, report
    assert done.returncode == 0, report
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found.group(1)) if found else 0


def catches(reading: str, environment: dict[str, str]) -> bool:
    """Whether the sanitizer stops code that reads memory it may not."""
    done = subprocess.run(
        [sys.executable, "-c", reading],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode == 99 and "ERROR: AddressSanitizer" in done.stderr


def _runtime_library(name: str) -> str:
    """Path of the compiler's runtime library, or a skip."""
    if not shutil.which(COMPILER):
        pytest.skip(f"there is no {COMPILER}")
    found = subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler's {name} is not installed")
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2])))
