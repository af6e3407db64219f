"""Weights of many levels at once, in batched torch calls: each the best for its mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import CUDA
from test_native import case, layer

from obc_deploy.solvers import SolverSettings, solve_levels
from obc_deploy.solvers.best_weights import best_weight, best_weights
from obc_deploy.solvers.exact_obs import trace_blocks, trace_weights
from obc_deploy.solvers.problems import check_problem, damp

LEVELS = [0.0, *(1 - 0.8**k for k in range(1, 21)), 1.0]
SHAPES = [(6, 44), (4, 100, 4), (3, 72, 1, 4), (2, 8), (4, 36, 1, 0, 1), (6, 1)]


def problem_of(shape, device="cpu"):
    given = layer(*case(*shape))
    return damp(check_problem(given, needs_hessian=True, device=torch.device(device)))


def torch_settings(dtype=torch.float64, memory=1 << 29):
    return SolverSettings(dtype, memory=memory, native=False, triton=False)


def solved_rows(problem, mask):
    """(H_SS)⁻¹ (H w)_S of each row, by numpy."""
    expected = np.zeros(mask.shape)
    for row, (keep, weight) in enumerate(zip(mask.cpu().numpy(), problem.weight, strict=True)):
        matrix = problem.hessian[problem.group_of_row[row]].cpu().numpy()
        right = (matrix @ weight.cpu().numpy())[keep]
        expected[row, keep] = np.linalg.solve(matrix[np.ix_(keep, keep)], right)
    return torch.from_numpy(expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [LEVELS, LEVELS[3:8], [0.5], [0.0], [1.0]])
@pytest.mark.parametrize("memory", [1 << 29, 1, 1 << 14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_levels_of_any_order_are_the_best_for_their_masks(shape, levels, memory, dtype):
    """Memory of one byte is one row at a time."""
    check_levels(shape, levels, torch_settings(dtype, memory), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_levels_are_the_best_on_cuda(shape):
    check_levels(shape, LEVELS, torch_settings(), "cuda")


def check_levels(shape, levels, settings, device):
    """Levels of a random order, each against a solve of its own."""
    problem = problem_of(shape, device)
    rows, cols = problem.weight.shape
    made = torch.Generator().manual_seed(4)
    order = torch.rand(rows, cols, generator=made).argsort(1)
    # Each row at its own pace, so that a level is early in some rows and late in others.
    pace = torch.linspace(0.5, 2.0, rows)[:, None]
    counts = (torch.tensor(levels) ** pace * cols).round().long()
    shares = [0.0]
    found = best_weights(problem, order.to(device), counts.to(device), settings, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] <= 1.0
    assert found.dtype == settings.dtype
    rank = order.argsort(1)
    for weight, count in zip(found.cpu(), counts.unbind(1), strict=True):
        mask = rank >= count[:, None]
        assert torch.all(weight[~mask] == 0)
        tolerance = {"rtol": 1e-8, "atol": 1e-11} if settings.dtype == torch.float64 else {}
        expected = solved_rows(problem, mask).to(settings.dtype)
        torch.testing.assert_close(weight, expected, **tolerance)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_weights_of_any_mask(shape, device):
    """One row keeps nothing, one everything, the others what chance leaves."""
    problem = problem_of(shape, device)
    mask = torch.rand(problem.weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0], mask[1] = False, True
    found = best_weight(problem, mask.to(device), torch_settings(torch.float32))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.cpu(), solved_rows(problem, mask), rtol=1e-8, atol=1e-11)
    assert torch.equal(found[1], problem.weight[1])


@pytest.mark.parametrize("trace", [trace_weights, trace_blocks])
@pytest.mark.parametrize("shape", [(6, 44), (4, 100, 4), (2, 8)])
def test_a_trace_ends_at_the_best_weights(trace, shape):
    """What the greedy run itself would hold after its last step, level by level."""
    problem = problem_of(shape)
    traced = trace(problem, torch_settings(), lambda _: None)
    counts = torch.stack([traced.counts(level) for level in LEVELS], 1)
    found = best_weights(
        problem, traced.columns, counts * traced.width, torch_settings(), lambda _: None
    )
    lost = problem.weight - found
    hessian = problem.hessian[problem.group_of_row]
    losses = torch.einsum("lri,rij,lrj->lr", lost, hessian, lost)
    before = torch.nn.functional.pad(traced.increase.cumsum(1), (1, 0))
    torch.testing.assert_close(losses, before.gather(1, counts).T, rtol=1e-7, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["unstructured", "block4"])
def test_a_database_on_cuda_is_the_cpus(kind):
    texts = [f"{kind}@{1 - 0.9**k:.6f}" for k in range(1, 30)]
    problem = layer(*case(16, 192))
    there = solve_levels(problem, texts, dtype="float64", device="cuda")
    here = solve_levels(problem, texts, dtype="float64")
    for found, expected in zip(there, here, strict=True):
        torch.testing.assert_close(found.mask, expected.mask)
        torch.testing.assert_close(found.weight, expected.weight, rtol=1e-5, atol=1e-6)
