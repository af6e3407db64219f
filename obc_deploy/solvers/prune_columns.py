"""One row's greedy over single columns: argmin_p w_p² / G_pp, in groups with zeros to give.

Unstructured pruning is the case of one group that gives all of its columns; N:M has groups of M
columns that give M - N zeros each (OBC, arXiv 2208.11580, section 4, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from obc_deploy.solvers import triton_steps
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.inverse import DowndatedInverse


@dataclass
class ColumnRun:
    """How far a batch of rows has come; places are those of the inverse.

    Attributes:
        inverse: the rows' inverses.
        weight: (rows, size).
        diagonal: (rows, size), G_ii.
        closed: (rows, size), infinite where a place must not be picked any more, else 0.
        given: (rows, groups) int64, zeros that each group gave.
        group: columns in a group.
        zeros: columns pruned in each group.
    """

    inverse: DowndatedInverse
    weight: torch.Tensor
    diagonal: torch.Tensor
    closed: torch.Tensor
    given: torch.Tensor
    group: int
    zeros: int

    def compact(self) -> None:
        """Update the inverse and drop what is closed."""
        inverse = self.inverse
        # Groups of several zeros close when they are full, in each row at other steps.
        size = inverse.size - inverse.kept if self.zeros == self.group else None
        places = inverse.compact(self.closed.isinf(), size=size)
        self.weight, self.closed = self.weight.gather(1, places), self.closed.gather(1, places)
        self.diagonal = inverse.diagonal()


def prune_columns(
    weight: torch.Tensor,
    inverse: DowndatedInverse,
    progress: Progress,
    *,
    group: int,
    zeros: int,
    triton: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune `zeros` of each `group` consecutive columns of every row.

    Args:
        weight: (rows, cols), used up.
        inverse: the rows' inverses, used up.
        progress: told the share of the steps done.
        group: columns in a group.
        zeros: columns pruned in each group.
        triton: whether a Triton kernel takes the steps between two updates of the inverse.

    Returns:
        (rows, steps) int64 pruned column and (rows, steps) loss increase of each step.
    """
    rows, cols = weight.shape
    steps = cols // group * zeros
    order = torch.empty(steps, rows, dtype=torch.int64, device=weight.device)
    increase = weight.new_empty(steps, rows)
    given = torch.zeros(rows, cols // group, dtype=torch.int64, device=weight.device)
    run = ColumnRun(
        inverse, weight, inverse.diagonal(), torch.zeros_like(weight), given, group, zeros
    )
    take = triton_steps.prune_columns if triton else _prune
    for start in range(0, steps, inverse.lazy):
        end = min(start + inverse.lazy, steps)
        take(run, order[start:end], increase[start:end])
        if end < steps:
            run.compact()
            progress(end / steps)
    return order.T.contiguous(), increase.T.contiguous()


def _prune(run: ColumnRun, order: torch.Tensor, increase: torch.Tensor) -> None:
    """As many steps as `order` and `increase`, (steps, rows), have room for."""
    inverse, weight, diagonal, closed = run.inverse, run.weight, run.diagonal, run.closed
    score = torch.empty_like(weight)
    group_of_place = inverse.column // run.group
    for place, cost in zip(order, increase, strict=True):
        torch.mul(weight, weight, out=score).div_(diagonal).add_(closed)
        torch.min(score, 1, out=(cost, place))
        position = place[:, None]
        vector, pivot = inverse.eliminate(position)
        weight.addcmul_(vector, weight.gather(1, position).div_(pivot), value=-1.0)
        diagonal.addcmul_(vector, vector, value=-1.0)
        torch.maximum(diagonal, inverse.floor, out=diagonal)
        closed.scatter_(1, position, torch.inf)
        if run.zeros < run.group:
            own = group_of_place.gather(1, position)
            run.given.scatter_add_(1, own, torch.ones_like(own))
            finished = torch.where(run.given.gather(1, own) == run.zeros, own, -1)
            closed.masked_fill_(group_of_place == finished, torch.inf)
    order.copy_(inverse.column.gather(1, order.T).T)  # from places to columns
