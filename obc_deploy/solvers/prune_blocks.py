"""One row's greedy over blocks: argmin_B w_Bᵀ (G_BB)⁻¹ w_B, four columns at a time.

With G_BB = L Lᵀ the score is |L⁻¹ w_B|², the update vectors are L⁻¹ G_B:, and the weights lose
their sum times L⁻¹ w_B (OBC, arXiv 2208.11580, section 4, "block sparsity").
"""

from __future__ import annotations

import torch

from obc_deploy.schemes import BLOCK_SIZE
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.inverse import DowndatedInverse


def prune_blocks(
    weight: torch.Tensor, inverse: DowndatedInverse, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune every block of every row.

    Args:
        weight: (rows, cols), used up.
        inverse: the rows' inverses, used up.
        progress: told the share of the steps done.

    Returns:
        (rows, blocks) int64 pruned block and (rows, blocks) loss increase of each step.
    """
    rows, cols = weight.shape
    steps = cols // BLOCK_SIZE
    order = torch.empty(steps, rows, dtype=torch.int64, device=weight.device)
    increase = weight.new_empty(steps, rows)
    within = torch.arange(BLOCK_SIZE, device=weight.device)
    closed = weight.new_zeros(rows, steps)  # infinite where a block is pruned already
    gram = inverse.diagonal_blocks(BLOCK_SIZE)
    for step in range(steps):
        whitened = whiten(gram, by_component(weight), by_component(inverse.floor))
        score = whitened.square().sum(0).add_(closed)
        block = score.argmin(1, keepdim=True)
        vectors = _eliminate(inverse, block * BLOCK_SIZE + within)
        amount = whitened.gather(2, block.expand(BLOCK_SIZE, -1, 1)).permute(1, 2, 0)
        weight.sub_((amount @ vectors).squeeze(1))
        _downdate(gram, vectors)

        order[step] = inverse.column.gather(1, block * BLOCK_SIZE).squeeze(1) // BLOCK_SIZE
        increase[step] = score.gather(1, block).squeeze(1)
        closed.scatter_(1, block, torch.inf)
        if inverse.is_full and step + 1 < steps:
            places = inverse.compact(closed.isinf(), width=BLOCK_SIZE)
            closed = closed.gather(1, places)
            weight = weight.gather(1, (places[:, :, None] * BLOCK_SIZE + within).flatten(1))
            gram = inverse.diagonal_blocks(BLOCK_SIZE)
            progress((step + 1) / steps)
    return order.T.contiguous(), increase.T.contiguous()


def by_component(values: torch.Tensor) -> torch.Tensor:
    """(rows, blocks · 4) seen as (4, rows, blocks)."""
    return values.reshape(values.shape[0], -1, BLOCK_SIZE).movedim(2, 0)


def whiten(gram: torch.Tensor, values: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """L⁻¹ v with G_BB = L Lᵀ, written out because LAPACK calls on 4x4 matrices are slow.

    Args:
        gram: (4, 4, rows, blocks) G_BB; its lower triangle is read.
        values: (4, rows, n) v; n is the number of blocks, or any where there is one block.
        floor: (4, rows, blocks) what no pivot can fall below but by rounding.
    """
    lower: list[list[torch.Tensor]] = []
    result: list[torch.Tensor] = []
    for i in range(BLOCK_SIZE):
        row: list[torch.Tensor] = []
        for j in range(i):
            entry = gram[i, j].clone()
            for k in range(j):
                entry.addcmul_(row[k], lower[j][k], value=-1.0)
            row.append(entry.mul_(lower[j][j]))
        pivot, value = gram[i, i].clone(), values[i].clone()
        for k in range(i):
            pivot.addcmul_(row[k], row[k], value=-1.0)
            value.addcmul_(row[k], result[k], value=-1.0)
        row.append(torch.maximum(pivot, floor[i]).rsqrt_())  # the inverse of L's diagonal
        lower.append(row)
        result.append(value.mul_(row[i]))
    return torch.stack(result)


def _eliminate(inverse: DowndatedInverse, position: torch.Tensor) -> torch.Tensor:
    """Take one block (rows, 4 positions) of each row out; returns V = L⁻¹ G_B:, (rows, 4, size)."""
    columns = inverse.columns(position)
    index = position[:, None, :].expand(-1, BLOCK_SIZE, -1)
    gram = columns.gather(2, index).permute(1, 2, 0)[..., None]
    floor = inverse.floor.gather(1, position).T[..., None]
    vectors = whiten(gram, columns.movedim(1, 0), floor).movedim(0, 1)
    inverse.keep(vectors)
    return vectors


def _downdate(gram: torch.Tensor, vectors: torch.Tensor) -> None:
    """Subtract the diagonal blocks of Vᵀ V from the lower triangles of `gram`."""
    parts = vectors.reshape(*vectors.shape[:2], -1, BLOCK_SIZE).permute(3, 1, 0, 2).contiguous()
    for i in range(BLOCK_SIZE):
        for j in range(i + 1):
            for vector in range(BLOCK_SIZE):
                gram[i, j].addcmul_(parts[i, vector], parts[j, vector], value=-1.0)
