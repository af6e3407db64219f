"""OBQ: quantize the index p with the least loss increase (q(w_p) - w_p)² / G_pp, update the rest.

    w ← w - (w_p - q(w_p)) / G_pp · G_:p        G ← G - G_:p G_p: / G_pp

The grid is fixed once, from the dense rows, or from the pruned ones where a pattern came first:
survivors have grown beyond the dense rows' range. Outlier rule: while the rounding error of some
remaining weight exceeds half its step (it lies beyond the grid's end), the worst of those goes
first. On a pruned layer only survivors take part, with G the inverse of H restricted to them, and
what was pruned stays exactly zero (OBC, arXiv 2208.11580, section 5).
"""

from __future__ import annotations

import torch

from obc_deploy.solvers import native_rows
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.grids import Grid
from obc_deploy.solvers.inverse import DowndatedInverse
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.settings import SolverSettings, part_of, until_it_fits
from obc_deploy.solvers.survivors import Selection, selections


def obq_codes(
    problem: DampedProblem, grid: Grid, settings: SolverSettings, progress: Progress
) -> torch.Tensor:
    """OBQ codes (rows, cols) int8 of a dense layer."""
    if native_rows.is_native(settings, problem.weight.device):
        return native_rows.quantize(problem, problem.weight, None, grid, settings, progress)
    rows, cols = problem.weight.shape
    scale, zero_point = grid.per_column(cols, settings.dtype)

    def quantize(batch: slice, report: Progress) -> torch.Tensor:
        weight = problem.weight[batch].to(settings.dtype, copy=True)
        inverse = DowndatedInverse.of_rows(problem, batch, settings)
        return _quantize(weight, inverse, scale[batch], zero_point[batch], grid, report)

    codes = settings.over_rows(rows, cols, problem.weight.device, quantize, progress)
    return torch.cat(codes).to(torch.int8)


def obq_codes_of_survivors(
    problem: DampedProblem,
    weight: torch.Tensor,
    mask: torch.Tensor,
    grid: Grid,
    settings: SolverSettings,
    progress: Progress,
) -> torch.Tensor:
    """OBQ codes (rows, cols) int8 of a pruned layer; what was pruned gets its zero point's code.

    Args:
        problem: the layer.
        weight: (rows, cols) float64 pruned weights, best for their mask.
        mask: (rows, cols) bool, true at survivors.
        grid: grids of the pruned rows.
        settings: precision and memory.
        progress: told the share of the rows done.
    """
    if native_rows.is_native(settings, weight.device):
        return native_rows.quantize(problem, weight, mask, grid, settings, progress)
    rows, cols = weight.shape
    scale, zero_point = grid.per_column(cols, settings.dtype)
    codes = zero_point.to(torch.int8)
    done = 0
    # A quarter of the memory: the restricted matrix, its factor and its inverse in float64.
    batches = selections(mask, settings.on(weight.device).memory // 4)

    def solve(survivors: Selection) -> None:
        nonlocal done
        restricted = survivors.submatrix(problem.hessian, problem.group_of_row)
        diagonal = restricted.diagonal(dim1=1, dim2=2).to(settings.dtype)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(restricted)).to(settings.dtype)
        del restricted
        batch = survivors.rows.shape[0]
        # Padding has weight 0, a grid point, and no correlations: its steps change nothing.
        found = _quantize(
            survivors.values(weight).to(settings.dtype),
            DowndatedInverse(inverse, diagonal, lazy=settings.update_length()),
            scale[survivors.rows[:, None], survivors.index],
            zero_point[survivors.rows[:, None], survivors.index],
            grid,
            part_of(progress, done / rows, (done + batch) / rows),
        )
        survivors.put(codes, found)
        done += batch

    for _ in until_it_fits(batches, solve, size=Selection.entries, halves=Selection.halves):
        pass
    return codes


def _quantize(
    weight: torch.Tensor,
    inverse: DowndatedInverse,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    progress: Progress,
) -> torch.Tensor:
    """Codes (rows, cols) of every column of every row; `weight` and `inverse` are used up."""
    steps = weight.shape[1]
    codes = torch.empty_like(weight)
    diagonal = inverse.diagonal()
    closed = torch.zeros_like(weight)  # infinite where an index is quantized already
    for step in range(steps):
        code = torch.round(weight / scale).add_(zero_point)
        code.clamp_(grid.code_min, grid.code_max)
        miss = (code - zero_point).mul_(scale).sub_(weight)
        position = (miss.square() / diagonal).add_(closed).argmin(1, keepdim=True)
        size = miss.abs().sub_(closed)
        outlier = torch.where(size > 0.5 * scale, size, 0.0)
        worst, at = outlier.max(1, keepdim=True)
        position = torch.where(worst > 0.0, at, position)

        vector, pivot = inverse.eliminate(position)
        codes.scatter_(1, inverse.column.gather(1, position), code.gather(1, position))
        weight.addcmul_(vector, miss.gather(1, position) / pivot)
        diagonal.addcmul_(vector, vector, value=-1.0)
        torch.maximum(diagonal, inverse.floor, out=diagonal)
        closed.scatter_(1, position, torch.inf)
        if inverse.is_full and step + 1 < steps:
            places = inverse.compact(closed.isinf())
            weight, closed = weight.gather(1, places), closed.gather(1, places)
            scale, zero_point = scale.gather(1, places), zero_point.gather(1, places)
            diagonal = inverse.diagonal()
            progress((step + 1) / steps)
    return codes
