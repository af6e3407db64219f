"""Rows that prune the same blocks: which two, of those that a sparse kernel computes together.

A pair has one mask, so one inverse G, and a block B of it costs the sum of what it costs each row,

    Σ_r w_rBᵀ (G_BB)⁻¹ w_rB

Pruning has to give up more the less the two rows agree. Before it starts they agree on Σ_B min over
the two of these costs, the largest of which pair first. That is as good as what the rows prune by
themselves says of them, and takes no solving.
"""

from __future__ import annotations

import torch

from obc_deploy.errors import SchemeError
from obc_deploy.schemes import BLOCK_SIZE
from obc_deploy.solvers.problems import DampedProblem

WINDOW = 16
"""Rows in a row that may be paired: `kBandWindow` of the sparse kernels."""


def block_costs(problem: DampedProblem) -> torch.Tensor:
    """(rows, blocks) float64: what pruning a block first would cost each row, w_Bᵀ (G_BB)⁻¹ w_B."""
    rows, cols = problem.weight.shape
    groups = problem.inverse.shape[0]
    shape = (groups, cols // BLOCK_SIZE, BLOCK_SIZE, cols // BLOCK_SIZE, BLOCK_SIZE)
    blocks = problem.inverse.reshape(shape).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    weight = problem.weight.reshape(groups, rows // groups, -1, BLOCK_SIZE)
    solved: torch.Tensor = torch.linalg.solve(blocks[:, None], weight[..., None]).squeeze(-1)
    return (weight * solved).sum(-1).reshape(rows, -1)


def pairs_of(costs: torch.Tensor, *, groups: int = 1) -> torch.Tensor:
    """Rows two by two, those that agree most on what is cheap first; a window's are its own.

    Args:
        costs: (rows, blocks), 0 or more.
        groups: of as many rows each, that do not mix.

    Returns:
        (rows / 2, 2) int64.

    Raises:
        SchemeError: a group has an odd number of rows.
    """
    rows_of_group = costs.shape[0] // groups
    if rows_of_group % 2:
        raise SchemeError(
            f"blocks that two output channels share need an even number of them, and {groups} "
            f"group(s) have {rows_of_group} each: use 'block4@S'"
        )
    pairs: list[tuple[int, int]] = []
    for group in range(groups):
        last = (group + 1) * rows_of_group
        for first in range(group * rows_of_group, last, WINDOW):
            pairs += _pairs_of_window(costs[first : min(first + WINDOW, last)], first)
    return torch.tensor(pairs, device=costs.device)


def _pairs_of_window(costs: torch.Tensor, first: int) -> list[tuple[int, int]]:
    rows = costs.shape[0]
    agreed = torch.minimum(costs[:, None], costs[None]).sum(-1).tolist()
    candidates = [(agreed[a][b], a, b) for a in range(rows) for b in range(a + 1, rows)]
    free, pairs = set(range(rows)), []
    for _, a, b in sorted(candidates, key=lambda pair: -pair[0]):
        if a in free and b in free:
            free -= {a, b}
            pairs.append((first + a, first + b))
    return pairs
