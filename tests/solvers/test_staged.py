"""Quantizing what pruning left: when rounding will do, and when it will not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from obc_deploy.schemes import Scheme
from obc_deploy.solvers import SolverSettings, solve, solve_levels
from obc_deploy.solvers.contract import CompressedLayer, LayerProblem
from obc_deploy.solvers.grids import Grid, find_grid
from obc_deploy.solvers.ordered_obq import ordered_obq_codes
from obc_deploy.solvers.problems import CheckedProblem, check_problem, relative_error
from obc_deploy.solvers.rounding import ROUNDING_ERROR, ROUNDING_FACTOR
from obc_deploy.solvers.rtn import rtn_codes
from obc_deploy.solvers.staged import quantize_pruned

ROWS, COLS = 12, 48


@pytest.fixture(scope="module")
def problem() -> LayerProblem:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(COLS, COLS, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(COLS, 400, generator=generator, dtype=torch.float64)
    weight = torch.randn(ROWS, COLS, generator=generator)
    return LayerProblem(weight, x @ x.T / 200.0, damping=0.01, channels=COLS, name="layer")


def both(problem: LayerProblem, text: str):
    """The pruned layer, its quantized form, and the codes of plain rounding."""
    scheme = Scheme.parse(text)
    pruned = solve(problem.weight, problem.hessian, Scheme(scheme.pattern, None), channels=COLS)
    found = quantize_pruned(problem, pruned, scheme)
    grid = find_grid(pruned.weight.double(), scheme.quantization)
    return pruned, found, rtn_codes(pruned.weight.double(), pruned.mask, grid)


@pytest.mark.parametrize("pattern", ["block4@0.75", "2:4", "unstructured@0.8"])
def test_eight_bits_are_rounded_where_pruning_lost_far_more(problem, pattern: str) -> None:
    pruned, found, rounded = both(problem, f"{pattern}+w8a8")
    assert torch.equal(found.codes.long(), rounded.long())
    assert found.error <= ROUNDING_FACTOR * pruned.error
    assert torch.equal(found.mask, pruned.mask)
    assert not found.codes[~found.mask].any()


def test_eight_bits_are_rounded_where_that_adds_less_than_activations_do(problem) -> None:
    """Hardly pruned, evenly spread: rounding is most of the error, and still next to nothing."""
    even = torch.rand(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hessian = torch.eye(COLS, dtype=torch.float64)
    spread = replace(problem, weight=even, hessian=hessian)
    pruned, found, rounded = both(spread, "unstructured@0.05+w8a8")
    assert torch.equal(found.codes.long(), rounded.long())
    assert ROUNDING_FACTOR * pruned.error < found.error <= pruned.error + ROUNDING_ERROR


def test_eight_bits_are_left_to_obq_where_little_was_pruned_and_rounding_loses_more(
    problem,
) -> None:
    pruned, found, rounded = both(problem, "unstructured@0.05+w8a8")
    assert not torch.equal(found.codes.long(), rounded.long())
    rounding = (rounded - found.zero_point) * found.scale
    assert found.error < relative_error(checked(problem), rounding)
    assert relative_error(checked(problem), rounding) > pruned.error + ROUNDING_ERROR


@pytest.mark.parametrize("pattern", ["block4@0.75", "2:4"])
def test_few_bits_are_not(problem, pattern: str) -> None:
    """OBQ is worth its time there: it is better than rounding on the same grid."""
    pruned, found, rounded = both(problem, f"{pattern}+w3")
    assert not torch.equal(found.codes.long(), rounded.long())
    grid = find_grid(pruned.weight.double(), Scheme.parse("w3").quantization)
    off = (problem.weight.double() - grid.dequantize(rounded)).double()
    dense = problem.weight.double()
    hessian = problem.hessian
    lost = float(((off @ hessian) * off).sum() / ((dense @ hessian) * dense).sum())
    assert found.error < lost


def test_eight_bits_alone_are_one_order_for_all_rows(problem) -> None:
    """As good as OBQ, which finds each row an order of its own; rounding is not."""
    _, found, rounded = both(problem, "w8a8")
    by_obq = solve(problem.weight, problem.hessian, "w8a8", channels=COLS)
    one_order = ordered_obq_codes(checked(problem), grid_of(by_obq, 8), lambda share: None)
    assert torch.equal(found.codes, one_order)
    assert found.error < 1.2 * by_obq.error
    rounding = replace(by_obq, weight=(rounded - by_obq.zero_point) * by_obq.scale)
    assert found.error < 0.6 * relative_error(checked(problem), rounding.weight)


def test_few_bits_alone_are_obq(problem) -> None:
    _, found, _ = both(problem, "w4")
    assert torch.equal(found.codes, solve(problem.weight, problem.hessian, "w4").codes)


def checked(problem: LayerProblem) -> CheckedProblem:
    return check_problem(problem, needs_hessian=True, device=torch.device("cpu"))


def grid_of(form: CompressedLayer, bits: int) -> Grid:
    most = 2 ** (bits - 1) - 1
    return Grid(form.scale, form.zero_point, -most, most)


SCHEMES = (
    "w8", "w4", "2:4+w8", "2:4+w4", "block4@0.75+w8", "block4@0.75+w3", "unstructured@0.8+w8",
    "unstructured@0.8+w6",
)  # fmt: skip
BY_OBQ = ("w4", "2:4+w4", "block4@0.75+w3")


@pytest.mark.parametrize("native", [True, False])
def test_levels_of_a_database_take_the_same_shortcuts(problem, native: bool) -> None:
    settings = SolverSettings(native=native)
    exact = solve_levels(problem, SCHEMES, settings=settings)
    found = solve_levels(problem, SCHEMES, settings=replace(settings, shortcuts=True))
    for text, by_obq, form in zip(SCHEMES, exact, found, strict=True):
        assert torch.equal(form.mask, by_obq.mask)
        assert torch.equal(form.scale, by_obq.scale)
        if text in BY_OBQ:
            assert torch.equal(form.codes, by_obq.codes)
            continue
        _, staged, rounded = both(problem, text)
        assert float((form.codes == staged.codes).float().mean()) > 0.99
        assert torch.equal(staged.codes, rounded) == (form.scheme.pattern is not None)
        assert not torch.equal(form.codes, by_obq.codes)
        if form.scheme.pattern is None:
            assert form.error < 1.2 * by_obq.error
        else:
            lost = solve_levels(problem, [Scheme(form.scheme.pattern, None)], settings=settings)[0]
            allowed = max(ROUNDING_FACTOR * lost.error, lost.error + ROUNDING_ERROR)
            assert by_obq.error < form.error <= allowed
