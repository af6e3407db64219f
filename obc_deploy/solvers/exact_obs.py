"""ExactOBS: prune the index p with the least loss increase w_p² / G_pp, update the rest, repeat.

    w ← w - (w_p / G_pp) G_:p        G ← G - G_:p G_p: / G_pp        G = H⁻¹, one for each row

Blocks B of four: loss increase w_Bᵀ (G_BB)⁻¹ w_B. Unstructured and block patterns trace every row
to its end; the k smallest increases of the whole layer say how long a prefix of its own trace each
row takes. N:M picks the cheapest index among groups that still have zeros to give (OBC, arXiv
2208.11580, section 4). Only orders are kept: the weights of any level follow from its mask
(`best_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial

import torch

from obc_deploy.schemes import BLOCK_SIZE, NM, Block4, Pattern
from obc_deploy.solvers import native_rows, triton_steps
from obc_deploy.solvers.best_weights import best_weight, best_weights
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.inverse import DowndatedInverse
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.prune_blocks import prune_blocks
from obc_deploy.solvers.prune_columns import prune_columns
from obc_deploy.solvers.settings import SolverSettings, part_of
from obc_deploy.solvers.shared_blocks import block_costs, pairs_of

_DOUBLE = 2.0
"""How much longer an operation takes in double precision than in single."""

_Pruner = Callable[[torch.Tensor, DowndatedInverse, Progress], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Trace:
    """What each row prunes, in order; rows with one mask are a unit, others units by themselves.

    Attributes:
        order: (units, steps) integer; the column, or the block of columns, pruned at each step.
        increase: (units, steps) loss increase of each step.
        width: columns pruned at a step.
        together: (units, n) int64, the rows of each unit; None where units are the rows.
    """

    order: torch.Tensor
    increase: torch.Tensor
    width: int
    together: torch.Tensor | None = None

    def counts(self, sparsity: float) -> torch.Tensor:
        """(rows,) int64: each row's share of the ceil(sparsity · all) cheapest steps."""
        units, steps = self.order.shape
        count = zeros_of(units * steps, sparsity)
        return self._of_rows(torch.bincount(self._unit_by_cost[:count], minlength=units))

    @cached_property
    def _unit_by_cost(self) -> torch.Tensor:
        """The unit of every step of the layer, cheapest first."""
        cheapest = torch.argsort(self.increase.flatten(), dim=0, stable=True)
        return cheapest // self.order.shape[1]

    @property
    def columns(self) -> torch.Tensor:
        """(rows, steps · width) int64: the columns in the order in which they are pruned."""
        within = torch.arange(self.width, device=self.order.device)
        order = self._of_rows(self.order).to(torch.int64)
        return (order[:, :, None] * self.width + within).flatten(1)

    def mask(self, counts: torch.Tensor) -> torch.Tensor:
        """(rows, cols) bool, false where the first `counts` steps of each row prune."""
        order = self._of_rows(self.order).to(torch.int64)
        stays = torch.arange(order.shape[1], device=counts.device) >= counts[:, None]
        mask = torch.empty_like(stays).scatter_(1, order, stays)
        return mask.repeat_interleave(self.width, dim=1)

    def _of_rows(self, units: torch.Tensor) -> torch.Tensor:
        """What is said of each unit, (units, ...), said of each row."""
        if self.together is None:
            return units
        rows = units.new_empty(self.together.numel(), *units.shape[1:])
        rows[self.together] = units[:, None]
        return rows


def zeros_of(total: int, sparsity: float) -> int:
    """ceil(total · sparsity), reading the sparsity as the decimal number it is written as."""
    return math.ceil(total * Fraction(str(sparsity)))


@dataclass(frozen=True)
class PrunedRows:
    """One pattern's outcome.

    Attributes:
        mask: (rows, cols) bool, true at survivors.
        weight: (rows, cols) float64 or float32, the best weights for the mask.
    """

    mask: torch.Tensor
    weight: torch.Tensor


def exact_obs(
    problem: DampedProblem,
    patterns: Sequence[Pattern],
    settings: SolverSettings,
    progress: Progress,
) -> list[PrunedRows]:
    """ExactOBS for several patterns of one layer, in the order asked for.

    All unstructured levels share one trace, and so do all block levels of one kind.
    """
    kinds = list(dict.fromkeys(pattern_kind(pattern) for pattern in patterns))
    found: dict[Pattern, PrunedRows] = {}
    for done, kind in enumerate(kinds):
        share = part_of(progress, done / len(kinds), (done + 1) / len(kinds))
        of_kind = list(dict.fromkeys(each for each in patterns if pattern_kind(each) == kind))
        if isinstance(of_kind[0], NM):
            found[of_kind[0]] = _nm(problem, of_kind[0], settings, share)
        else:
            run: Callable[[DampedProblem, SolverSettings, Progress], Trace] = trace_weights
            if isinstance(of_kind[0], Block4):
                run = trace_blocks if of_kind[0].together == 1 else trace_shared_blocks
            levels = [pattern.sparsity for pattern in of_kind if not isinstance(pattern, NM)]
            tracing = 1.0 / (1.0 + _DOUBLE * factored_share(levels))
            trace = run(problem, settings, part_of(share, 0.0, tracing))
            pruned = _weigh(problem, trace, levels, settings, part_of(share, tracing, 1.0))
            found.update(zip(of_kind, pruned, strict=True))
    progress(1.0)
    return [found[pattern] for pattern in patterns]


def sparsity_of(pattern: Pattern) -> float:
    """Share of the weights that a pattern prunes."""
    return (pattern.m - pattern.n) / pattern.m if isinstance(pattern, NM) else pattern.sparsity


def pattern_kind(pattern: Pattern) -> object:
    """Equal for patterns that share a trace."""
    if isinstance(pattern, Block4):
        return pattern.kind
    return pattern if isinstance(pattern, NM) else type(pattern)


def factored_share(levels: Sequence[float]) -> float:
    """Work of two factorizations that serve all levels between them, in cols³ / 3 a row."""
    early = max((level for level in levels if level < 0.5), default=0.0)
    late = min((level for level in levels if level >= 0.5), default=1.0)
    return float(early**3 + (1.0 - late) ** 3)


def _weigh(
    problem: DampedProblem,
    trace: Trace,
    levels: Sequence[float],
    settings: SolverSettings,
    progress: Progress,
) -> list[PrunedRows]:
    """Masks and weights of levels of a trace, in the order asked for."""
    ascending = sorted(levels)
    counts = torch.stack([trace.counts(level) for level in ascending], 1)
    weights = best_weights(problem, trace.columns, counts * trace.width, settings, progress)
    pruned = {
        level: PrunedRows(trace.mask(count), weight)
        for level, count, weight in zip(ascending, counts.unbind(1), weights, strict=True)
    }
    return [pruned[level] for level in levels]


def trace_weights(problem: DampedProblem, settings: SolverSettings, progress: Progress) -> Trace:
    """The order in which each row prunes all of its weights, one by one."""
    cols = problem.weight.shape[1]
    if native_rows.is_native(settings, problem.weight.device):
        traced = native_rows.prune_columns(problem, settings, progress, group=cols, zeros=cols)
    else:
        traced = _columns(problem, settings, progress, group=cols, zeros=cols)
    return Trace(*traced, width=1)


def trace_blocks(problem: DampedProblem, settings: SolverSettings, progress: Progress) -> Trace:
    """The order in which each row prunes all of its blocks of four columns."""
    if native_rows.is_native(settings, problem.weight.device):
        traced = native_rows.prune_blocks(problem, settings, progress, width=BLOCK_SIZE)
    else:
        triton = triton_steps.is_triton(settings, problem.weight.device)
        traced = _all_rows(problem, settings, progress, partial(prune_blocks, triton=triton))
    return Trace(*traced, width=BLOCK_SIZE)


def trace_shared_blocks(
    problem: DampedProblem, settings: SolverSettings, progress: Progress
) -> Trace:
    """The order in which each pair of rows prunes all of its blocks of four columns."""
    together = pairs_of(block_costs(problem), groups=problem.inverse.shape[0])
    if native_rows.is_native(settings, problem.weight.device):
        traced = native_rows.prune_blocks(
            problem, settings, progress, width=BLOCK_SIZE, together=together
        )
    else:
        units = problem.of_rows(together[:, 0])
        others = problem.weight[together[:, 1]]
        traced = _all_rows(units, settings, progress, prune_blocks, others)
    return Trace(*traced, width=BLOCK_SIZE, together=together)


def _columns(
    problem: DampedProblem,
    settings: SolverSettings,
    progress: Progress,
    *,
    group: int,
    zeros: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    triton = triton_steps.is_triton(settings, problem.weight.device)
    pruner = partial(prune_columns, group=group, zeros=zeros, triton=triton)
    return _all_rows(problem, settings, progress, pruner)


def _nm(
    problem: DampedProblem, pattern: NM, settings: SolverSettings, progress: Progress
) -> PrunedRows:
    if native_rows.is_native(settings, problem.weight.device):
        return PrunedRows(*native_rows.prune_and_weigh(problem, pattern, settings, progress))
    zeros = pattern.m - pattern.n
    order, _ = _columns(problem, settings, progress, group=pattern.m, zeros=zeros)
    mask = torch.ones(problem.weight.shape, dtype=torch.bool, device=order.device)
    mask.scatter_(1, order.to(torch.int64), False)
    return PrunedRows(mask, best_weight(problem, mask, settings))


def _all_rows(
    problem: DampedProblem,
    settings: SolverSettings,
    progress: Progress,
    pruner: _Pruner,
    others: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and loss increase of all rows, a batch that fits the memory at a time.

    `others` are rows that share masks with the problem's, and are pruned with them.
    """
    rows, cols = problem.weight.shape

    def trace(batch: slice, report: Progress) -> tuple[torch.Tensor, torch.Tensor]:
        weight = problem.weight[batch].to(settings.dtype, copy=True)
        if others is not None:
            weight = torch.stack([weight, others[batch].to(settings.dtype)])
        inverse = DowndatedInverse.of_rows(problem, batch, settings)
        return pruner(weight, inverse, report)

    traces = settings.over_rows(rows, cols, problem.weight.device, trace, progress)
    orders, increases = zip(*traces, strict=True)
    return torch.cat(orders), torch.cat(increases)
