"""All other tests of this folder once more, on a build that stops at the first bad access."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sanitized_build

from obc_deploy.runtimes import sparse

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What makes Python load the sanitized build."""
    return sanitized_build.environment(
        "obc_deploy.runtimes.sparse._kernels",
        sparse.LIBRARY_VARIABLE,
        tmp_path_factory.mktemp("sanitized"),
    )


def test_nothing_reads_or_writes_beyond_its_memory(environment):
    tests = sorted(each.name for each in FOLDER.glob("test_*.py") if each != Path(__file__))
    assert len(tests) >= 7
    assert sanitized_build.passed(tests, FOLDER, environment) > 200


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
    assert sanitized_build.catches(code, environment)
