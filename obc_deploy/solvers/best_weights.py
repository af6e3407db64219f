"""Ŵ_S = w_S - G_SP (G_PP)⁻¹ w_P = (H_SS)⁻¹ (H w)_S: a row's best weights once P is zero.

S are the row's survivors, P what was pruned and G = H⁻¹. A greedy run that prunes P one by one ends
at the same weights (OBC, arXiv 2208.11580, section 4), so levels of a trace need only their masks.
What they prune lies within each other, and the leading part of a Cholesky factor is the factor of
the leading part: one factorization of G in the row's order serves all levels that prune less than
half of the row, one of H in the reverse order the others. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from obc_deploy.solvers import native_rows
from obc_deploy.solvers.blocked_cholesky import (
    backward_in_place,
    factor_in_place,
    forward_in_place,
)
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.inverse import true_places
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.selections import Selection, selections
from obc_deploy.solvers.settings import SolverSettings, part_of, until_it_fits

_Write = Callable[[Selection, torch.Tensor, torch.Tensor], None]


def best_weights(
    problem: DampedProblem,
    order: torch.Tensor,
    counts: torch.Tensor,
    settings: SolverSettings,
    progress: Progress,
) -> torch.Tensor:
    """The best weights of each row once a prefix of its order is zero, for many prefixes at once.

    Args:
        problem: the layer.
        order: (rows, cols) int64, a permutation of the columns in each row.
        counts: (rows, levels) int64, length of the prefix for each level, ascending.
        settings: precision of the result, and memory.
        progress: told the share of the work done.

    Returns:
        (levels, rows, cols) in the settings' dtype.
    """
    weight = problem.weight
    if native_rows.is_native(settings, weight.device):
        return native_rows.best_weights(problem, order, counts, settings, progress)
    cols = weight.shape[1]
    groups = problem.hessian.shape[0]
    early = 2 * counts < cols
    # A row of which nothing survives, or nothing is pruned, has no system to solve.
    found = weight.to(settings.dtype).repeat(counts.shape[1], 1, 1)
    found.masked_fill_(~early.T[:, :, None], 0.0)

    def put(chosen: Selection, levels: torch.Tensor, weights: torch.Tensor) -> None:
        """Write (batch, levels, cols) weights where `levels` (rows, levels) is true."""
        here = levels[chosen.rows].T[:, :, None]
        before = found[:, chosen.rows]
        found[:, chosen.rows] = torch.where(here, weights.transpose(0, 1).to(before.dtype), before)

    def after_pruned(chosen: Selection, amounts: torch.Tensor, pruned: torch.Tensor) -> None:
        # One matrix for all rows, or each row's own.
        group = 0 if groups == 1 else problem.group_of_row[chosen.rows]
        inverse = problem.inverse[group]
        left = (weight[chosen.rows][:, None, :] - amounts @ inverse).masked_fill_(pruned, 0.0)
        put(chosen, early, left)

    def of_survivors(chosen: Selection, weights: torch.Tensor, _: torch.Tensor) -> None:
        put(chosen, ~early, weights)

    target = (weight.reshape(groups, -1, cols) @ problem.hessian).reshape(weight.shape)
    pruned, left = torch.where(early, counts, 0), torch.where(early, 0, cols - counts)
    first, second = part_of(progress, 0.0, 0.5), part_of(progress, 0.5, 1.0)
    _solve_prefixes(problem, problem.inverse, weight, order, pruned, settings, after_pruned, first)
    _solve_prefixes(
        problem, problem.hessian, target, order.flip(1), left, settings, of_survivors, second
    )
    return found


def best_weight(
    problem: DampedProblem, mask: torch.Tensor, settings: SolverSettings
) -> torch.Tensor:
    """The weights (rows, cols) float64 that minimise the damped error with zeros off the mask."""
    order, counts = true_places(~mask), (~mask).sum(1, keepdim=True)
    in_double = replace(settings, dtype=torch.float64)
    return best_weights(problem, order, counts, in_double, lambda _: None)[0]


def _solve_prefixes(
    problem: DampedProblem,
    matrix: torch.Tensor,
    right: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    settings: SolverSettings,
    write: _Write,
    progress: Progress,
) -> None:
    """x_P = (M_PP)⁻¹ b_P for the prefixes P of each row's order that `counts` says.

    Args:
        problem: the layer.
        matrix: (groups, cols, cols), M.
        right: (rows, cols), b.
        order: (rows, cols) columns.
        counts: (rows, levels) lengths.
        settings: memory.
        write: takes rows, their x (batch, levels, cols), 0 beyond P, and which columns P are.
        progress: told the share of the rows done.
    """
    rows, cols = right.shape
    levels = counts.shape[1]
    # A quarter of the memory: the submatrix, its factor and the gathering's own copies. What all
    # levels take counts too, and each row's own matrix where rows do not share one.
    least = max(math.isqrt(levels * cols), cols if matrix.shape[0] > 1 else 0)
    memory = settings.on(right.device).memory // 4
    batches = selections(order, counts.amax(1), memory, least=least)
    done = 0

    def solve(chosen: Selection) -> None:
        nonlocal done
        factor = factor_in_place(chosen.submatrix(matrix, problem.group_of_row))
        half = forward_in_place(factor, chosen.values(right)[:, :, None])
        width = half.shape[1]
        inside = torch.arange(width, device=half.device)[:, None] < counts[chosen.rows][:, None, :]
        # Substitution goes from the last unknown to the first: zeros at the end stay zeros.
        solved = backward_in_place(factor, half * inside)
        at = chosen.index[:, None, :].expand(-1, levels, -1)
        full = solved.new_zeros(at.shape[0], levels, cols)
        prefix = torch.zeros_like(full, dtype=torch.bool)
        write(chosen, full.scatter_(2, at, solved.mT), prefix.scatter_(2, at, inside.mT))
        done += at.shape[0]
        progress(done / rows)

    for _ in until_it_fits(batches, solve, size=Selection.entries, halves=Selection.halves):
        pass
