"""One row's greedy over single columns: argmin_p w_p² / G_pp, in groups with zeros to give.

Unstructured pruning is the case of one group that gives all of its columns; N:M has groups of M
columns that give M - N zeros each (OBC, arXiv 2208.11580, section 4, algorithm 1).
"""

from __future__ import annotations

import torch

from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.inverse import DowndatedInverse


def prune_columns(
    weight: torch.Tensor,
    inverse: DowndatedInverse,
    progress: Progress,
    *,
    group: int,
    zeros: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune `zeros` of each `group` consecutive columns of every row.

    Args:
        weight: (rows, cols), used up.
        inverse: the rows' inverses, used up.
        progress: told the share of the steps done.
        group: columns in a group.
        zeros: columns pruned in each group.

    Returns:
        (rows, steps) int64 pruned column and (rows, steps) loss increase of each step.
    """
    rows, cols = weight.shape
    steps = cols // group * zeros
    order = torch.empty(steps, rows, dtype=torch.int64, device=weight.device)
    increase = weight.new_empty(steps, rows)
    diagonal = inverse.diagonal()
    closed = torch.zeros_like(weight)  # infinite where an index must not be picked any more
    given = torch.zeros(rows, cols // group, dtype=torch.int64, device=weight.device)
    for step in range(steps):
        score = (weight.square() / diagonal).add_(closed)
        position = score.argmin(1, keepdim=True)
        vector, pivot = inverse.eliminate(position)
        weight.addcmul_(vector, weight.gather(1, position) / pivot, value=-1.0)
        diagonal.addcmul_(vector, vector, value=-1.0)
        torch.maximum(diagonal, inverse.floor, out=diagonal)

        column = inverse.column.gather(1, position)
        order[step] = column.squeeze(1)
        increase[step] = score.gather(1, position).squeeze(1)
        closed.scatter_(1, position, torch.inf)
        if zeros < group:
            own = column // group
            given.scatter_add_(1, own, torch.ones_like(own))
            finished = torch.where(given.gather(1, own) == zeros, own, -1)
            closed.masked_fill_(inverse.column // group == finished, torch.inf)
        if inverse.is_full and step + 1 < steps:
            places = inverse.compact(closed.isinf())
            weight, closed = weight.gather(1, places), closed.gather(1, places)
            diagonal = inverse.diagonal()
            progress((step + 1) / steps)
    return order.T.contiguous(), increase.T.contiguous()
