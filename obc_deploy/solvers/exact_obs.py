"""ExactOBS: prune the index p with the least loss increase w_p² / G_pp, update the rest, repeat.

    w ← w - (w_p / G_pp) G_:p        G ← G - G_:p G_p: / G_pp        G = H⁻¹, one for each row

Blocks B of four: loss increase w_Bᵀ (G_BB)⁻¹ w_B. Unstructured and block patterns trace every row
to its end; the k smallest increases of the whole layer say how long a prefix of its own trace each
row takes. N:M picks the cheapest index among groups that still have zeros to give (OBC, arXiv
2208.11580, section 4). Only orders are kept: the weights of any level follow from its mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch

from obc_deploy.schemes import BLOCK_SIZE, NM, Block4, Pattern
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.inverse import DowndatedInverse
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.prune_blocks import prune_blocks
from obc_deploy.solvers.prune_columns import prune_columns
from obc_deploy.solvers.settings import SolverSettings, part_of

_Pruner = Callable[[torch.Tensor, DowndatedInverse, Progress], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Trace:
    """What each row prunes, in order.

    Attributes:
        order: (rows, steps) int64; the column, or the block of columns, pruned at each step.
        increase: (rows, steps) loss increase of each step.
        width: columns pruned at a step.
    """

    order: torch.Tensor
    increase: torch.Tensor
    width: int

    def mask(self, sparsity: float) -> torch.Tensor:
        """(rows, cols) bool, false at the ceil(sparsity · all) cheapest steps of the layer."""
        rows, steps = self.order.shape
        count = zeros_of(rows * steps, sparsity)
        cheapest = torch.argsort(self.increase.flatten(), dim=0, stable=True)[:count]
        taken = torch.bincount(cheapest // steps, minlength=rows)
        stays = torch.arange(steps, device=taken.device) >= taken[:, None]
        mask = torch.empty_like(stays).scatter_(1, self.order, stays)
        return mask.repeat_interleave(self.width, dim=1)


def zeros_of(total: int, sparsity: float) -> int:
    """ceil(total · sparsity), reading the sparsity as the decimal number it is written as."""
    return math.ceil(total * Fraction(str(sparsity)))


def exact_obs_masks(
    problem: DampedProblem,
    patterns: Sequence[Pattern],
    settings: SolverSettings,
    progress: Progress,
) -> list[torch.Tensor]:
    """The ExactOBS masks (rows, cols) of several patterns of one layer.

    All unstructured levels share one trace, and so do all block levels.
    """
    shared: dict[type, Trace] = {}
    masks: list[torch.Tensor] = []
    for done, pattern in enumerate(patterns):
        share = part_of(progress, done / len(patterns), (done + 1) / len(patterns))
        if isinstance(pattern, NM):
            masks.append(_nm_mask(problem, pattern, settings, share))
            continue
        kind = type(pattern)
        if kind not in shared:
            blocks = isinstance(pattern, Block4)
            run = trace_blocks if blocks else trace_weights
            shared[kind] = run(problem, settings, share)
        masks.append(shared[kind].mask(pattern.sparsity))
    progress(1.0)
    return masks


def trace_weights(problem: DampedProblem, settings: SolverSettings, progress: Progress) -> Trace:
    """The order in which each row prunes all of its weights, one by one."""
    cols = problem.weight.shape[1]
    pruner = partial(prune_columns, group=cols, zeros=cols)
    return Trace(*_all_rows(problem, settings, progress, pruner), width=1)


def trace_blocks(problem: DampedProblem, settings: SolverSettings, progress: Progress) -> Trace:
    """The order in which each row prunes all of its blocks of four columns."""
    return Trace(*_all_rows(problem, settings, progress, prune_blocks), width=BLOCK_SIZE)


def _nm_mask(
    problem: DampedProblem, pattern: NM, settings: SolverSettings, progress: Progress
) -> torch.Tensor:
    pruner = partial(prune_columns, group=pattern.m, zeros=pattern.m - pattern.n)
    order, _ = _all_rows(problem, settings, progress, pruner)
    mask = torch.ones(problem.weight.shape, dtype=torch.bool, device=order.device)
    return mask.scatter_(1, order, False)


def _all_rows(
    problem: DampedProblem, settings: SolverSettings, progress: Progress, pruner: _Pruner
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and loss increase of all rows, a batch that fits the memory at a time."""
    rows, cols = problem.weight.shape

    def trace(batch: slice, report: Progress) -> tuple[torch.Tensor, torch.Tensor]:
        weight = problem.weight[batch].to(settings.dtype, copy=True)
        inverse = DowndatedInverse.of_rows(problem, batch, settings)
        return pruner(weight, inverse, report)

    traces = settings.over_rows(rows, cols, problem.weight.device, trace, progress)
    orders, increases = zip(*traces, strict=True)
    return torch.cat(orders), torch.cat(increases)
