"""All other tests of this folder once more, on a build that stops at the first bad access."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized_build

FOLDER = Path(__file__).parent

TESTS_ALONE = (
    "import os, pytest, sys; code = pytest.main(sys.argv[1:]); "
    "sys.stdout.flush(); sys.stderr.flush(); os._exit(code)"
)
"""Without the process' end, where a thread of ONNX Runtime's own may read what it has freed."""


def sanitizer_library(name: str) -> str:
    """Path of the compiler's runtime library, or a skip."""
    if not shutil.which(sanitized_build.COMPILER):
        pytest.skip(f"there is no {sanitized_build.COMPILER}")
    found = subprocess.run(
        [sanitized_build.COMPILER, f"-print-file-name={name}"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler's {name} is not installed")
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What makes Python load the sanitized build."""
    preloaded = [sanitizer_library("libasan.so"), sanitizer_library("libstdc++.so")]
    library = sanitized_build.build(tmp_path_factory.mktemp("sanitized"))
    return {
        **os.environ,
        # The C++ library too: what it throws is then seen through the sanitizer.
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OBC_DEPLOY_SPARSE_LIBRARY": str(library),
        "OMP_NUM_THREADS": "1",
    }


def test_nothing_reads_or_writes_beyond_its_memory(environment):
    tests = sorted(each.name for each in FOLDER.glob("test_*.py") if each != Path(__file__))
    assert len(tests) >= 7
    done = subprocess.run(
        [sys.executable, "-c", TESTS_ALONE, "-qs", "--noconftest", "-pno:cacheprovider", *tests],
        cwd=FOLDER, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = (done.stdout + done.stderr)[-6000:]
    assert "ERROR: AddressSanitizer" not in report, report
    assert "runtime error" not in report, report
    assert done.returncode == 0, report
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 200


def test_kernels_for_avx_vnni_run_wherever_any_vnni_is(environment):
    code = "from sparse_models import instruction_sets; print(*instruction_sets())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=FOLDER, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    tested = done.stdout.split()
    assert "portable" in tested
    assert ("avx2_vnni" in tested) == (tested[-1] in {"avx2_vnni", "avx512_vnni"})


def test_the_sanitizer_is_at_work(environment):
    # Freed memory, read through the very library that the tests above load.
    code = (
        "from obc_deploy.runtimes import sparse; import ctypes; "
        "library = ctypes.CDLL(str(sparse.library_path())); "
        "library.obc_sparse_use_instruction_set(ctypes.c_char_p(8))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 99
    assert "ERROR: AddressSanitizer" in done.stderr
