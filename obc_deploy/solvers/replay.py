"""The weights of many levels of one trace, by eliminating in its order once more.

Within a block of eliminations that the inverse keeps aside, the weights after the first m of them
are w - Σ_{k<m} y_k v_k, w the weights when the block began, v_k the update vectors and y_k = w_p /
√G_pp at step k: snapshots of all rows, each at its own m, are one matrix product.
"""

from __future__ import annotations

import torch

from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.inverse import DowndatedInverse
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.settings import SolverSettings


def replay(
    problem: DampedProblem,
    order: torch.Tensor,
    counts: torch.Tensor,
    settings: SolverSettings,
    progress: Progress,
) -> torch.Tensor:
    """Batched torch calls for what `native_rows.best_weights` is on the CPU.

    Args:
        problem: the layer.
        order: (rows, cols) int64, the columns in the order in which they are eliminated.
        counts: (rows, levels) columns that a row eliminates for each level.
        settings: precision and memory.
        progress: told the share of the work done.

    Returns:
        (levels, rows, cols) float32.
    """
    rows, cols = problem.weight.shape
    weights = problem.weight.new_empty(counts.shape[1], rows, cols, dtype=torch.float32)
    # The host must know which levels end where; it is told once.
    at_host = counts.cpu()

    def take(batch: slice, report: Progress) -> None:
        run = DowndatedInverse.of_rows(problem, batch, settings)
        start_weight = problem.weight[batch].to(settings.dtype, copy=True)
        _replay_batch(
            run, start_weight, order[batch], counts[batch], at_host[batch],
            weights[:, batch], report,
        )  # fmt: skip

    settings.over_rows(rows, cols, problem.weight.device, take, progress)
    return weights


def _replay_batch(
    inverse: DowndatedInverse,
    weight: torch.Tensor,
    columns: torch.Tensor,
    eliminated: torch.Tensor,
    at_host: torch.Tensor,
    weights: torch.Tensor,
    progress: Progress,
) -> None:
    """Fill `weights`, (levels, rows, cols); `eliminated`, (rows, levels), counts columns."""
    last = int(at_host.max())
    for start in range(0, max(last, 1), inverse.lazy):
        end = min(start + inverse.lazy, last)
        place = columns.new_empty(weights.shape[1:])
        here = torch.arange(inverse.size, device=place.device).expand_as(inverse.column)
        place.scatter_(1, inverse.column, here)
        places = place.gather(1, columns[:, start:end])
        before, amounts = weight.clone(), weight.new_empty(weight.shape[0], end - start)
        for k in range(end - start):
            position = places[:, k : k + 1]
            vector, pivot = inverse.eliminate(position)
            amount = torch.div(weight.gather(1, position), pivot, out=amounts[:, k : k + 1])
            weight.addcmul_(vector, amount, value=-1.0)

        turn = torch.arange(end - start, device=place.device)
        gone_at = torch.full_like(inverse.column, end - start)
        gone_at.scatter_(1, places, turn.expand_as(places))
        ends_here = (at_host >= start) & ((at_host < end) | (at_host == last))
        for level in ends_here.any(0).nonzero().flatten().tolist():
            taken = eliminated[:, level : level + 1] - start
            part = torch.where(turn < taken, amounts, 0.0)[:, None, :]
            snapshot = torch.baddbmm(
                before[:, None, :], part, inverse.vectors[:, : end - start], alpha=-1.0
            ).squeeze(1)
            snapshot.masked_fill_(gone_at < taken, 0.0)
            full = torch.zeros_like(weights[level])
            full.scatter_(1, inverse.column, snapshot.to(torch.float32))
            reached = (taken >= 0) & (taken <= end - start)
            torch.where(reached, full, weights[level], out=weights[level])
        if end < last:
            order = inverse.compact(gone_at < end - start, size=inverse.size - inverse.kept)
            weight = weight.gather(1, order)
            progress(end / last)
