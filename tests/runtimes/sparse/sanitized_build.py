r"""Build the sparse kernels with AddressSanitizer and UndefinedBehaviorSanitizer.

Usage: python sanitized_build.py FOLDER
Prints the library's path. Run Python with it so:

    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
        OBC_DEPLOY_SPARSE_LIBRARY=FOLDER/sparse_kernels.so python ...
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[3]
COMPILER = "g++"
EVERY_KERNEL = ("-DOBC_AVX_VNNI_AS_AVX512",)
"""Lets the kernels for AVX-VNNI run where there is AVX512-VNNI."""
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0")


def build(folder: Path, jobs: int = 2) -> Path:
    """The library, compiled from the sources that the package's own build has.

    Raises:
        RuntimeError: the compiler refused; with what it said.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = (
        each
        for each in project["tool"]["setuptools"]["ext-modules"]
        if each["name"] == "obc_deploy.runtimes.sparse._kernels"
    )
    flags = [*extension["extra-compile-args"], *EVERY_KERNEL, *SANITIZERS, "-fPIC"]

    def compiled(source: str) -> Path:
        to = folder / f"{Path(source).stem}.o"
        _run([COMPILER, *flags, "-c", str(ROOT / source), "-o", str(to)])
        return to

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, extension["sources"]))
    library = folder / "sparse_kernels.so"
    _run([COMPILER, *SANITIZERS, "-pthread", "-shared", *map(str, objects), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
