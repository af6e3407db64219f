"""What tests of the compiled solvers share."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from obc_deploy import native


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request):
    with ExitStack() as stack:
        try:
            stack.enter_context(native.use_instruction_set(request.param))
        except ValueError:
            pytest.skip(f"this processor or this build lacks {request.param}")
        assert native.instruction_set() == request.param
        yield request.param
