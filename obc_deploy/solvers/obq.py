"""OBQ: quantize the index p with the least loss increase (q(w_p) - w_p)² / G_pp, update the rest.

    w ← w - (w_p - q(w_p)) / G_pp · G_:p        G ← G - G_:p G_p: / G_pp

The grid is fixed once, from the dense rows, or from the pruned ones where a pattern came first:
survivors have grown beyond the dense rows' range. Outlier rule: while the rounding error of some
remaining weight exceeds half its step (it lies beyond the grid's end), the worst of those goes
first. On a pruned layer only survivors take part, with G the inverse of H restricted to them, and
what was pruned stays exactly zero (OBC, arXiv 2208.11580, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from obc_deploy.solvers import native_rows, triton_steps
from obc_deploy.solvers.blocked_cholesky import factor_in_place
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.grids import Grid
from obc_deploy.solvers.inverse import DowndatedInverse, true_places
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.selections import Selection, selections
from obc_deploy.solvers.settings import SolverSettings, ieee_products, part_of, until_it_fits


def obq_codes(
    problem: DampedProblem, grid: Grid, settings: SolverSettings, progress: Progress
) -> torch.Tensor:
    """OBQ codes (rows, cols) int8 of a dense layer."""
    if native_rows.is_native(settings, problem.weight.device):
        return native_rows.quantize(problem, problem.weight, None, grid, settings, progress)
    rows, cols = problem.weight.shape
    triton = triton_steps.is_triton(settings, problem.weight.device)
    scale, zero_point = grid.per_column(cols, settings.dtype)

    def quantize(batch: slice, report: Progress) -> torch.Tensor:
        weight = problem.weight[batch].to(settings.dtype, copy=True)
        inverse = DowndatedInverse.of_rows(problem, batch, settings)
        run = QuantizationRun(
            inverse, weight, inverse.diagonal(), scale[batch], zero_point[batch],
            torch.zeros_like(weight), grid.code_min, grid.code_max,
        )  # fmt: skip
        return _quantize(run, report, triton=triton)

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
    triton = triton_steps.is_triton(settings, weight.device)
    scale, zero_point = grid.per_column(cols, settings.dtype)
    codes = zero_point.to(torch.int8)
    done = 0
    # A quarter of the memory: the restricted matrix, its factor and its inverse in float64.
    memory = settings.on(weight.device).memory // 4
    batches = selections(true_places(mask), mask.sum(1), memory)

    def solve(survivors: Selection) -> None:
        nonlocal done
        restricted = survivors.submatrix(problem.hessian, problem.group_of_row)
        diagonal = restricted.diagonal(dim1=1, dim2=2).to(settings.dtype, copy=True)
        start = torch.cholesky_inverse(factor_in_place(restricted)).to(settings.dtype)
        del restricted
        batch = survivors.rows.shape[0]
        inverse = DowndatedInverse(start, diagonal, lazy=settings.update_length(), owned=True)
        # Padding has weight 0, a grid point, and no correlations: its steps change nothing.
        values = survivors.values(weight).to(settings.dtype)
        run = QuantizationRun(
            inverse,
            values,
            inverse.diagonal(),
            scale[survivors.rows[:, None], survivors.index],
            zero_point[survivors.rows[:, None], survivors.index],
            torch.zeros_like(values),
            grid.code_min,
            grid.code_max,
        )
        report = part_of(progress, done / rows, (done + batch) / rows)
        with ieee_products(weight.device):
            survivors.put(codes, _quantize(run, report, triton=triton))
        done += batch

    for _ in until_it_fits(batches, solve, size=Selection.entries, halves=Selection.halves):
        pass
    return codes


@dataclass
class QuantizationRun:
    """How far a batch of rows has come; places are those of the inverse.

    Attributes:
        inverse: the rows' inverses.
        weight: (rows, size).
        diagonal: (rows, size), G_ii.
        scale: (rows, size) grid step of each weight.
        zero_point: (rows, size) code of zero, in the weight's dtype.
        closed: (rows, size), infinite where a place is quantized already, else 0.
        code_min: smallest code.
        code_max: largest code.
    """

    inverse: DowndatedInverse
    weight: torch.Tensor
    diagonal: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    closed: torch.Tensor
    code_min: int
    code_max: int

    def compact(self) -> None:
        """Update the inverse and drop what is closed."""
        inverse = self.inverse
        places = inverse.compact(self.closed.isinf(), size=inverse.size - inverse.kept)
        self.weight, self.closed = self.weight.gather(1, places), self.closed.gather(1, places)
        self.scale = self.scale.gather(1, places)
        self.zero_point = self.zero_point.gather(1, places)
        self.diagonal = inverse.diagonal()


def _quantize(run: QuantizationRun, progress: Progress, *, triton: bool) -> torch.Tensor:
    """Codes (rows, cols) of every column of every row, in the weight's dtype; `run` is used up."""
    codes = torch.empty_like(run.weight)
    steps, lazy = codes.shape[1], run.inverse.lazy
    take = triton_steps.quantize if triton else _quantize_some
    for start in range(0, steps, lazy):
        end = min(start + lazy, steps)
        take(run, codes, end - start)
        if end < steps:
            run.compact()
            progress(end / steps)
    return codes


def _quantize_some(run: QuantizationRun, codes: torch.Tensor, steps: int) -> None:
    """The next `steps` steps; codes go to their columns."""
    inverse, weight, diagonal, closed = run.inverse, run.weight, run.diagonal, run.closed
    scale, zero_point = run.scale, run.zero_point
    half = 0.5 * scale
    for _ in range(steps):
        code = torch.round(weight / scale).add_(zero_point)
        code.clamp_(run.code_min, run.code_max)
        miss = (code - zero_point).mul_(scale).sub_(weight)
        position = (miss * miss).div_(diagonal).add_(closed).argmin(1, keepdim=True)
        size = miss.abs().sub_(closed)
        outlier = torch.where(size > half, size, 0.0)
        worst, at = outlier.max(1, keepdim=True)
        position = torch.where(worst > 0.0, at, position)

        vector, pivot = inverse.eliminate(position)
        codes.scatter_(1, inverse.column.gather(1, position), code.gather(1, position))
        weight.addcmul_(vector, miss.gather(1, position).div_(pivot))
        diagonal.addcmul_(vector, vector, value=-1.0)
        torch.maximum(diagonal, inverse.floor, out=diagonal)
        closed.scatter_(1, position, torch.inf)
