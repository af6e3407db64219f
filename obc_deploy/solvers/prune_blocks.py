"""One row's greedy over blocks: argmin_B w_Bᵀ (G_BB)⁻¹ w_B, four columns at a time.

With G_BB = L Lᵀ the score is |L⁻¹ w_B|², the update vectors are L⁻¹ G_B:, and the weights lose
their sum times L⁻¹ w_B (OBC, arXiv 2208.11580, section 4, "block sparsity"). Rows that share a
mask share G as well; their scores are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from obc_deploy.schemes import BLOCK_SIZE
from obc_deploy.solvers import triton_steps
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.inverse import DowndatedInverse


@dataclass
class BlockRun:
    """How far a batch of rows has come; places are those of the inverse.

    Attributes:
        inverse: the rows' inverses.
        weight: (together, rows, size); those at one place share a mask.
        gram: (4, 4, rows, blocks left), G_BB; the lower triangles are kept up to date.
        closed: (rows, blocks left), infinite where a block is pruned already, else 0.
    """

    inverse: DowndatedInverse
    weight: torch.Tensor
    gram: torch.Tensor
    closed: torch.Tensor

    def compact(self) -> None:
        """Update the inverse and drop what is closed."""
        inverse = self.inverse
        size = (inverse.size - inverse.kept) // BLOCK_SIZE
        places = inverse.compact(self.closed.isinf(), width=BLOCK_SIZE, size=size)
        self.closed = self.closed.gather(1, places)
        within = torch.arange(BLOCK_SIZE, device=places.device)
        columns = (places[:, :, None] * BLOCK_SIZE + within).flatten(1)
        self.weight = self.weight.gather(2, columns.expand(len(self.weight), -1, -1))
        self.gram = inverse.diagonal_blocks(BLOCK_SIZE)


def prune_blocks(
    weight: torch.Tensor, inverse: DowndatedInverse, progress: Progress, *, triton: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune every block of every row.

    Args:
        weight: (rows, cols), used up; or (together, rows, cols) of rows that share masks.
        inverse: the rows' inverses, used up.
        progress: told the share of the steps done.
        triton: whether a Triton kernel takes the steps between two updates of the inverse.

    Returns:
        (rows, blocks) int64 pruned block and (rows, blocks) loss increase of each step.
    """
    if weight.ndim == 2:
        weight = weight[None]
    _, rows, cols = weight.shape
    steps = cols // BLOCK_SIZE
    order = torch.empty(steps, rows, dtype=torch.int64, device=weight.device)
    increase = weight.new_empty(steps, rows)
    closed = weight.new_zeros(rows, steps)
    run = BlockRun(inverse, weight, inverse.diagonal_blocks(BLOCK_SIZE), closed)
    take = triton_steps.prune_blocks if triton else _prune
    at_once = inverse.lazy // BLOCK_SIZE
    for start in range(0, steps, at_once):
        end = min(start + at_once, steps)
        take(run, order[start:end], increase[start:end])
        if end < steps:
            run.compact()
            progress(end / steps)
    return order.T.contiguous(), increase.T.contiguous()


def _prune(run: BlockRun, order: torch.Tensor, increase: torch.Tensor) -> None:
    """As many steps as `order` and `increase`, (steps, rows), have room for."""
    inverse, weight = run.inverse, run.weight
    within = torch.arange(BLOCK_SIZE, device=weight.device)
    floor = by_component(inverse.floor)
    for place, cost in zip(order, increase, strict=True):
        whitened = whiten(run.gram, by_component(weight), floor)
        torch.min(whitened.square().sum((0, 1)).add_(run.closed), 1, out=(cost, place))
        block = place[:, None]
        vectors = _eliminate(inverse, block * BLOCK_SIZE + within)
        chosen = whitened.gather(3, block.expand(*whitened.shape[:2], -1, 1))
        amount = chosen.squeeze(3).permute(2, 1, 0)  # (rows, together, 4)
        weight.sub_((amount @ vectors).movedim(1, 0))
        _downdate(run.gram, vectors)
        run.closed.scatter_(1, block, torch.inf)
    columns = inverse.column.gather(1, order.T * BLOCK_SIZE)
    order.copy_((columns // BLOCK_SIZE).T)  # from places to blocks of the layer


def by_component(values: torch.Tensor) -> torch.Tensor:
    """(..., rows, blocks · 4) seen as (4, ..., rows, blocks)."""
    return values.reshape(*values.shape[:-1], -1, BLOCK_SIZE).movedim(-1, 0)


def whiten(gram: torch.Tensor, values: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """L⁻¹ v with G_BB = L Lᵀ, written out because LAPACK calls on 4x4 matrices are slow.

    Args:
        gram: (4, 4, rows, blocks) G_BB; its lower triangle is read.
        values: (4, ..., rows, n) v; n is the number of blocks, or any where there is one block.
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
