"""Many levels of one trace in batched torch calls: each the best for its mask."""

from __future__ import annotations

import pytest
import torch
from test_native import case, layer

from obc_deploy.solvers import SolverSettings, solve_levels
from obc_deploy.solvers.exact_obs import trace_blocks, trace_weights, worth_replaying
from obc_deploy.solvers.problems import check_problem, damp
from obc_deploy.solvers.replay import replay
from obc_deploy.solvers.survivors import best_weight

LEVELS = [0.0, *(1 - 0.8**k for k in range(1, 21)), 1.0]
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("shape", [(6, 44), (4, 100, 4), (3, 72, 1, 4), (2, 8), (4, 36, 1, 0, 1)])
@pytest.mark.parametrize("trace", [trace_weights, trace_blocks])
@pytest.mark.parametrize(("lazy", "memory"), [(None, 1 << 29), (4, 1), (12, 1 << 14)])
def test_replayed_levels_are_the_best_for_their_masks(shape, trace, lazy, memory, device):
    """Memory of one byte is one row at a time, each with a last step of its own."""
    given = layer(*case(*shape))
    problem = damp(check_problem(given, needs_hessian=True, device=torch.device(device)))
    chosen = SolverSettings(torch.float64, lazy=lazy, memory=memory, native=False, triton=False)
    traced = trace(problem, chosen, lambda _: None)
    counts = torch.stack([traced.counts(level) for level in LEVELS], 1)
    shares = [0.0]
    eliminated = counts * traced.width
    replayed = replay(problem, traced.columns, eliminated, chosen, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] <= 1.0
    for weight, count in zip(replayed, counts.unbind(1), strict=True):
        mask = traced.mask(count)
        assert torch.all(weight[~mask] == 0)
        best = best_weight(problem, mask, chosen).to(torch.float32)
        torch.testing.assert_close(weight, best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("levels", [[0.5], LEVELS[3:8]])
def test_some_levels_only(levels):
    """No level need begin where the trace does, nor end where it ends."""
    problem = damp(
        check_problem(layer(*case(5, 60)), needs_hessian=True, device=torch.device("cpu"))
    )
    chosen = SolverSettings(torch.float64, lazy=8, native=False)
    traced = trace_weights(problem, chosen, lambda _: None)
    counts = torch.stack([traced.counts(level) for level in levels], 1)
    replayed = replay(problem, traced.columns, counts, chosen, lambda _: None)
    for weight, count in zip(replayed, counts.unbind(1), strict=True):
        best = best_weight(problem, traced.mask(count), chosen).to(torch.float32)
        torch.testing.assert_close(weight, best, rtol=1e-6, atol=1e-6)


def test_devices_beside_the_cpu_replay_many_levels():
    many = [1 - 0.9**k for k in range(1, 46)]
    assert worth_replaying(many, torch.device("cuda"))
    assert not worth_replaying([0.5, 0.75, 0.9], torch.device("cuda"))
    assert not worth_replaying(many, torch.device("cpu"))


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
