"""Compiled inverses and energies against numpy, for every instruction set."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import INSTRUCTION_SETS, using

from obc_deploy import native
from obc_deploy.errors import ProblemError
from obc_deploy.solvers import LayerProblem, native_hessians
from obc_deploy.solvers.problems import check_problem, damp, relative_error
from obc_deploy.solvers.settings import torch_threads

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"the compiled solvers are missing: {native.why_missing()}"
)
CPU = torch.device("cpu")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    with using(request.param):
        yield request.param


def hessians(seed, groups, cols, samples):
    x = np.random.default_rng(seed).standard_normal((groups, cols, samples))
    return x @ x.transpose(0, 2, 1) / samples + 0.01 * np.eye(cols)


SIZES = [(1, 1), (1, 2), (3, 7), (1, 16), (2, 31), (1, 32), (1, 33), (2, 64), (1, 97), (1, 240)]


@pytest.mark.parametrize(("groups", "cols"), SIZES)
def test_inverses_and_pivots(instruction_set, groups, cols):
    given_ = hessians(cols, groups, cols, cols + 3)
    inverse, pivots = native_hessians.inverses(torch.from_numpy(given_))
    wanted = np.linalg.inv(given_)
    np.testing.assert_allclose(inverse, wanted, rtol=0, atol=1e-11 * np.abs(wanted).max())
    np.testing.assert_array_equal(inverse, inverse.mT)
    diagonal = np.linalg.cholesky(given_).diagonal(axis1=1, axis2=2)
    np.testing.assert_allclose(pivots, diagonal**2, rtol=1e-10)


@pytest.mark.parametrize(("groups", "cols"), [(1, 256), (1, 293), (2, 320), (1, 577), (3, 256)])
def test_threads_share_an_inverse_and_change_nothing(instruction_set, groups, cols):
    given_ = torch.from_numpy(hessians(cols, groups, cols, cols + 3))
    found = {}
    for threads in (1, 2, 3, 5):
        with torch_threads(threads):
            found[threads] = native_hessians.inverses(given_)
    wanted = np.linalg.inv(given_.numpy())
    np.testing.assert_allclose(found[1][0], wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
    for inverse, pivots in found.values():
        assert torch.equal(inverse, found[1][0])
        assert torch.equal(pivots, found[1][1])


@pytest.mark.parametrize(("groups", "cols"), SIZES)
@pytest.mark.parametrize("rows", [1, 5, 32, 33, 70])
def test_energies(instruction_set, groups, cols, rows):
    given_ = hessians(cols, groups, cols, 2)
    weight = np.random.default_rng(rows).standard_normal((groups * rows, cols))
    of_groups = weight.reshape(groups, rows, cols)
    wanted = np.einsum("gri,gij,grj", of_groups, given_, of_groups)
    found = {}
    for threads in (1, 2, 3):
        with torch_threads(threads):
            found[threads] = native_hessians.output_energy(
                torch.from_numpy(weight), torch.from_numpy(given_)
            )
    assert found[1] == pytest.approx(wanted, rel=1e-12)
    assert found[1] == found[2] == found[3]


@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_compiled_and_torch_agree(cols, rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((cols, cols + 4)).astype(np.float32)
    problem = LayerProblem(
        torch.from_numpy(rng.standard_normal((rows, cols)).astype(np.float32)),
        torch.from_numpy(2 * x @ x.T / x.shape[1]),
    )
    checked = check_problem(problem, needs_hessian=True, device=CPU)
    ours, torchs = damp(checked).inverse, damp(checked, compiled=False).inverse
    assert float((ours - torchs).abs().max()) <= 1e-10 * float(torchs.abs().max())
    compressed = torch.from_numpy(rng.standard_normal((rows, cols)))
    lost = (checked.weight - compressed) @ checked.hessian[0]
    wanted = float((lost * (checked.weight - compressed)).sum()) / checked.output_energy
    assert relative_error(checked, compressed) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["singular", "indefinite"])
def test_what_has_no_inverse_is_refused_alike(compiled, kind):
    x = np.random.default_rng(0).standard_normal((40, 12))
    hessian = x @ x.T
    if kind == "indefinite":
        hessian -= 0.5 * np.diag(np.diag(hessian))
    problem = LayerProblem(torch.ones(3, 40), torch.from_numpy(hessian), damping=0.0)
    checked = check_problem(problem, needs_hessian=True, device=CPU)
    with pytest.raises(
        ProblemError, match=r"singular with damping=0; (damping=|it is not positive)"
    ):
        damp(checked, compiled=compiled)


@pytest.mark.parametrize("threads", [1, 2])
def test_long_work_is_interrupted(threads):
    """A large inverse runs beside the thread that takes signals, and gives up between blocks."""
    cols = 1536
    given_ = torch.eye(cols, dtype=torch.float64)[None]
    stopped = []

    class ImpatientError(Exception):
        pass

    def impatient(*args):
        stopped.append(time.perf_counter())
        raise ImpatientError

    with pytest.MonkeyPatch.context() as patch:
        run = native.run
        patch.setattr(
            native, "run", lambda call, control, work, _: run(call, control, work, impatient)
        )
        with torch_threads(threads), pytest.raises(ImpatientError):
            native_hessians.inverses(given_)
    assert time.perf_counter() - stopped[0] < 1.0
    assert not [each for each in threading.enumerate() if each.name == "native solver"]
