"""The tests of the compiled rows once more, on a build that stops at the first bad access."""

from __future__ import annotations

from pathlib import Path

import pytest
import sanitized_build

from obc_deploy import native

FOLDER = Path(__file__).parent
TESTS = ("test_native.py", "test_native_hessians.py")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What makes Python load the sanitized build."""
    return sanitized_build.environment(
        "obc_deploy.native._rows", native.LIBRARY_VARIABLE, tmp_path_factory.mktemp("sanitized")
    )


def test_nothing_reads_or_writes_beyond_its_memory(environment):
    # The sanitizer needs more address space than that test leaves to a process.
    unlimited = ["-k", "not test_memory_that_is_not_there"]
    assert sanitized_build.passed([*unlimited, *TESTS], FOLDER, environment) > 400


def test_the_sanitizer_is_at_work(environment):
    # A name where there is nothing, read by the very library that the tests above load.
    code = (
        "from obc_deploy import native; import ctypes; "
        "native.library().obc_use_instruction_set(ctypes.c_char_p(8))"
    )
    assert sanitized_build.catches(code, environment)
