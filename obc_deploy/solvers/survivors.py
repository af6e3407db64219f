"""Ŵ_S = (H_SS)⁻¹ (H w)_S = w_S - G_SP (G_PP)⁻¹ w_P: the best weights of a row once P is zero.

S are a row's survivors, P what was pruned and G = H⁻¹. A greedy run that prunes P one by one ends
at the same weights (OBC, arXiv 2208.11580, section 4), so levels need only their masks. The two
forms are equal; a row takes the one with the smaller system. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from obc_deploy.solvers import native_rows
from obc_deploy.solvers.inverse import true_places
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.settings import SolverSettings, until_it_fits

_PADDING = 1.2
"""A batch takes rows whose sizes lie within this factor."""


@dataclass(frozen=True)
class Selection:
    """Selected columns of some rows, padded to one width.

    Attributes:
        rows: (batch,) int64 rows of the layer.
        index: (batch, width) int64 columns; padding has arbitrary columns.
        valid: (batch, width) bool, false at padding.
    """

    rows: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor

    def submatrix(self, matrix: torch.Tensor, group_of_row: torch.Tensor) -> torch.Tensor:
        """Selected rows and columns of each row's (cols, cols) matrix; padding is the identity.

        `matrix` is (groups, cols, cols); the result (batch, width, width).
        """
        group = group_of_row[self.rows][:, None, None]
        selected = matrix[group, self.index[:, :, None], self.index[:, None, :]]
        selected.mul_(self.valid[:, :, None]).mul_(self.valid[:, None, :])
        selected.diagonal(dim1=1, dim2=2).add_((~self.valid).to(selected.dtype))
        return selected

    def values(self, full: torch.Tensor) -> torch.Tensor:
        """Selected values of a (rows, cols) matrix, 0 at padding."""
        return full[self.rows[:, None], self.index] * self.valid

    def entries(self) -> int:
        """Entries of the rows' selected matrices together."""
        rows, width = self.index.shape
        return rows * width * width

    def halves(self) -> list[Selection]:
        """The first and the second half of the rows; itself where it has one row."""
        middle = self.rows.shape[0] // 2
        if middle == 0:
            return [self]
        return [
            Selection(self.rows[part], self.index[part], self.valid[part])
            for part in (slice(0, middle), slice(middle, None))
        ]

    def put(self, full: torch.Tensor, values: torch.Tensor) -> None:
        """Write (batch, width) values back into a (rows, cols) matrix, leaving padding out."""
        rows = self.rows[:, None]
        # Padding keeps what is there: to leave it out by a mask would make the host wait.
        kept = torch.where(self.valid, values.to(full.dtype), full[rows, self.index])
        full[rows, self.index] = kept


def selections(mask: torch.Tensor, memory: int) -> Iterator[Selection]:
    """The true columns of each row of a mask, rows of like counts batched within `memory` bytes.

    Rows without any are left out.
    """
    counts, rows = mask.sum(1).sort()
    sizes: list[int] = counts.tolist()
    start = next((i for i, size in enumerate(sizes) if size), len(sizes))
    while start < len(sizes):
        widest = max(sizes[start] + 8, int(_PADDING * sizes[start]))
        end = start + 1
        while (
            end < len(sizes)
            and sizes[end] <= widest
            and (end + 1 - start) * sizes[end] ** 2 * 8 <= memory
        ):
            end += 1
        width = sizes[end - 1]
        chosen = mask[rows[start:end]]
        index = true_places(chosen)[:, :width]
        valid = torch.arange(width, device=mask.device) < counts[start:end, None]
        yield Selection(rows[start:end], index, valid)
        start = end


def best_weight(
    problem: DampedProblem, mask: torch.Tensor, settings: SolverSettings
) -> torch.Tensor:
    """The weights (rows, cols) float64 that minimise the damped error with zeros off the mask."""
    weight = problem.weight
    if native_rows.is_native(settings, weight.device):
        # What is pruned comes first.
        order, counts = mask.to(torch.uint8).argsort(1), (~mask).sum(1, keepdim=True)
        in_double = replace(settings, dtype=torch.float64)
        return native_rows.best_weights(problem, order, counts, in_double, lambda _: None)[0]
    by_survivors = (mask.sum(1) * 2 <= mask.shape[1])[:, None]
    result = torch.where(by_survivors, torch.zeros_like(weight), weight)

    groups = problem.hessian.shape[0]
    target = (weight.reshape(groups, -1, weight.shape[1]) @ problem.hessian).reshape(weight.shape)
    solve = partial(_selected_solve, problem)
    result += solve(problem.hessian, mask & by_survivors, target, settings)
    change = solve(problem.inverse, ~mask & ~by_survivors, weight, settings)
    change = (change.reshape(groups, -1, weight.shape[1]) @ problem.inverse).reshape(weight.shape)
    return (result - change).masked_fill_(~mask, 0.0)


def _selected_solve(
    problem: DampedProblem,
    matrix: torch.Tensor,
    mask: torch.Tensor,
    right: torch.Tensor,
    settings: SolverSettings,
) -> torch.Tensor:
    """x_S = (M_SS)⁻¹ b_S for each row's S, its true places of the mask; 0 elsewhere."""
    solution = torch.zeros_like(right)
    # A quarter of the memory: the submatrix, its factor and the gathering's own copies.
    batches = selections(mask, settings.on(right.device).memory // 4)

    def solve(chosen: Selection) -> None:
        submatrix = chosen.submatrix(matrix, problem.group_of_row)
        chosen.put(solution, _solve(submatrix, chosen.values(right)))

    for _ in until_it_fits(batches, solve, size=Selection.entries, halves=Selection.halves):
        pass
    return solution


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(right[:, :, None], factor).squeeze(-1)
