"""OBQ with one order for all rows, against OBQ's own update with that order in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import CUDA
from hypothesis import given, settings
from hypothesis import strategies as st

from obc_deploy.errors import ProblemError
from obc_deploy.schemes import Quantization
from obc_deploy.solvers import LayerProblem, native_hessians
from obc_deploy.solvers.grids import find_grid
from obc_deploy.solvers.ordered_obq import ordered_obq_codes
from obc_deploy.solvers.problems import check_problem, damp, relative_error


def made(rows, cols, groups=1, *, samples=None, seed=0, dead=()):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, cols, samples or 2 * cols + 3)) * rng.uniform(
        0.3, 2, (cols, 1)
    )
    x[:, list(dead)] = 0.0
    weight = rng.standard_normal((groups * rows, cols)).astype(np.float32)
    hessian = 2 / x.shape[2] * x @ x.transpose(0, 2, 1)
    return LayerProblem(torch.from_numpy(weight), torch.from_numpy(hessian), name="conv7")


def solved(problem, grid, device="cpu"):
    checked = check_problem(problem, needs_hessian=True, device=torch.device(device))
    return ordered_obq_codes(checked, grid, lambda share: None)


def reference(problem, grid):
    """Row by row: w ← w - (w_p - q) / G_pp · G_:p, G ← G - G_:p G_p: / G_pp, p in falling H_pp."""
    checked = check_problem(problem, needs_hessian=True, device=torch.device("cpu"))
    damped = damp(checked, compiled=False)
    scale, zero = (each.numpy() for each in grid.per_column(damped.weight.shape[1], torch.float64))
    codes = np.zeros(damped.weight.shape)
    for row, w in enumerate(damped.weight.numpy().copy()):
        group = int(damped.group_of_row[row])
        left = damped.inverse[group].numpy().copy()
        for p in np.argsort(-damped.hessian[group].diagonal().numpy(), kind="stable"):
            code = np.clip(
                np.round(w[p] / scale[row, p]) + zero[row, p], grid.code_min, grid.code_max
            )
            codes[row, p] = code
            q = (code - zero[row, p]) * scale[row, p]
            w -= (w[p] - q) / left[p, p] * left[:, p]
            left -= np.outer(left[:, p], left[p]) / left[p, p]
            left[p, p] = 1.0
            w[p] = q
    return torch.from_numpy(codes).to(torch.int8)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("text", [(8, None, False), (4, None, True), (8, 4, True), (3, 8, False)])
@pytest.mark.parametrize(
    ("rows", "cols", "groups"), [(5, 24, 1), (3, 72, 1), (2, 8, 6), (4, 136, 2)]
)
def test_codes_are_those_of_the_updates_one_by_one(rows, cols, groups, text, device):
    bits, group, asymmetric = text
    problem = made(rows, cols, groups, seed=cols + bits, dead=(1, 5))
    grid = find_grid(problem.weight, Quantization(bits, group=group, asymmetric=asymmetric))
    found = solved(problem, grid, device).cpu()
    assert float((found == reference(problem, grid)).float().mean()) > 0.999
    zero = grid.per_column(cols, torch.float64)[1]
    assert torch.equal(found[:, [1, 5]].double(), zero[:, [1, 5]])


@given(st.integers(1, 40), st.integers(1, 12), st.integers(2, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_errors_are_below_roundings(cols, rows, bits, seed):
    problem = made(rows, cols, seed=seed)
    checked = check_problem(problem, needs_hessian=True, device=torch.device("cpu"))
    grid = find_grid(checked.weight, Quantization(bits))
    found = ordered_obq_codes(checked, grid, lambda share: None)
    assert int(found.min()) >= grid.code_min
    assert int(found.max()) <= grid.code_max
    rounded = relative_error(checked, grid.dequantize(grid.round(checked.weight)))
    # Each code is the best for what it is told; later ones may, rarely, be unlucky for it.
    assert relative_error(checked, grid.dequantize(found)) <= 1.5 * rounded + 1e-12


def test_uncorrelated_inputs_are_rounded():
    weight = torch.randn(6, 100)
    problem = LayerProblem(weight, torch.diag(torch.rand(100, dtype=torch.float64) + 0.1))
    grid = find_grid(weight, Quantization(8))
    assert torch.equal(solved(problem, grid), grid.round(weight))


def test_progress_ends_at_one_and_a_singular_hessian_is_named():
    shares = []
    problem = made(3, 150)
    checked = check_problem(problem, needs_hessian=True, device=torch.device("cpu"))
    ordered_obq_codes(checked, find_grid(problem.weight, Quantization(8)), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    singular = LayerProblem(
        problem.weight, torch.ones(150, 150, dtype=torch.float64), damping=0.0, name="conv7"
    )
    with pytest.raises(ProblemError, match=r"layer 'conv7': the Hessian is singular.*damping="):
        solved(singular, find_grid(problem.weight, Quantization(8)))


def test_no_inverse_is_made():
    problem = made(3, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_hessians, "inverses", None)
        solved(problem, find_grid(problem.weight, Quantization(8)))
