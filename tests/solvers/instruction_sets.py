"""Instruction sets of the compiled solvers, for tests of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from obc_deploy import native

INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Tests within it run on one set; they skip where it does not work."""
    if not native.library().obc_use_instruction_set(name.encode()):
        pytest.skip(f"this processor or this build lacks {name}")
    with native.use_instruction_set(name):
        assert native.instruction_set() == name
        yield
