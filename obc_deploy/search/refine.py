"""The step past the sum of layer losses: try plans on the stitched network, keep what is better.

Three ways to make a candidate, none of which ever leaves the budgets:

    uniform         one scheme for all layers, as far as they have it: the mildest that fit, so that
                    a plan is never worse than what needs no search
    mutation        raise a few layers' levels and lower others' until all budgets hold again, as
                    EvoPress does between plans of equal cost (Sieberling et al., arXiv 2410.14649)
    coefficients    multiply each layer's loss by a random coefficient and solve the knapsack again;
                    a few coefficients at a time are drawn anew, in a neighbourhood that shrinks
                    (SPDY, Frantar and Alistarh, arXiv 2201.13096, section 3.2)

Uniform plans come first. Coefficients move a whole plan and come next; mutations mend its details
and come to dominate.
A candidate replaces the best plan only where the caller's evaluation says it is better, so the
result is never worse than the start. No plan is evaluated twice. The best of many on few samples
is often the luckiest: with `confirm`, what looks better must be better on more samples too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from obc_deploy.errors import BudgetError
from obc_deploy.schemes import Scheme
from obc_deploy.search import dynamic, milp
from obc_deploy.search.budgets import Budget, Budgets, as_budgets
from obc_deploy.search.changes import Array
from obc_deploy.search.choices import Levels, Plan, SearchSpace

_MOST_SWITCHES = 3
"""Layers that a mutation changes on purpose, at most, while it still finds better plans."""
_PATIENCE = 50
"""Evaluations without a better plan after which a mutation may change one layer more."""
_STALE = 200
"""Candidates in a row that were all known or impossible, after which the search has seen it all."""
_BUCKETS = 4_000
_SPREAD = 1.5
"""Standard deviation of the first coefficients' logarithms."""
_SMALLEST_SPREAD = 0.2
_REDRAWN = 0.3
"""Share of the coefficients that are drawn anew at first; one of them at last."""
_UNIFORM = 3
"""Uniform plans that are tried, at most."""


class Move(Enum):
    """How a candidate was made."""

    START = "start"
    UNIFORM = "uniform"
    MUTATION = "mutation"
    COEFFICIENTS = "coefficients"


ALL_MOVES = (Move.UNIFORM, Move.MUTATION, Move.COEFFICIENTS)
_ENDLESS = (Move.MUTATION, Move.COEFFICIENTS)


@dataclass(frozen=True)
class Evaluation:
    """One plan that was tried.

    Attributes:
        plan: its `evaluated` is the loss; nan where the evaluation gave no finite number.
        confirmed: its loss on more samples, where it looked better and that was asked for.
        move: how it was made.
        accepted: whether it became the best plan.
        seconds: when, from the start of the search.
    """

    plan: Plan
    move: Move
    accepted: bool
    seconds: float
    confirmed: float | None = None


@dataclass(frozen=True)
class Refinement:
    """What a refinement found.

    Attributes:
        plan: the best plan, with its calibration loss in `evaluated`; the start where nothing was
            better.
        evaluations: every plan that was tried, in order, the start first.
    """

    plan: Plan
    evaluations: tuple[Evaluation, ...]

    @property
    def start(self) -> Plan:
        """The plan that the search started from, with its calibration loss."""
        return self.evaluations[0].plan

    @property
    def seconds(self) -> float:
        """How long the search took, to the end of the last evaluation."""
        return self.evaluations[-1].seconds


def refine(
    plan: Plan,
    space: SearchSpace,
    budgets: Budgets,
    evaluate: Callable[[Plan], float],
    *,
    confirm: Callable[[Plan], float] | None = None,
    seconds: float | None = None,
    evaluations: int | None = None,
    seed: int = 0,
    moves: Collection[Move] = ALL_MOVES,
    progress: Callable[[float], None] | None = None,
) -> Refinement:
    """Look for a plan within the budgets whose evaluated loss is below the given plan's.

    Deterministic with a seed and a number of evaluations, as far as `evaluate` is. With `seconds`
    it depends on the machine's speed. The start is always evaluated; after it, none is begun that
    would end after `seconds` if it took as long as the longest so far. Ends early where no plan
    is left that was not tried.

    Args:
        plan: where to start, within the budgets.
        space: the layers and their choices.
        budgets: what every candidate keeps.
        evaluate: calibration loss of the network stitched by a plan; less is better. What is not
            finite counts as worse than anything.
        confirm: loss on more samples; asked for the start and for plans that look better, which
            must be better here too.
        seconds: time for the search, evaluations included.
        evaluations: how many plans to evaluate, the start included.
        seed: of the random choices.
        moves: the ways to make candidates, `Move.START` aside.
        progress: called with the share of the search that is done.

    Raises:
        BudgetError: the plan is over a budget, or the search is given no end or no move.
        LayerError: the plan and the space have different layers.
        SchemeError: the plan has a scheme that is not among its layer's choices.
    """
    limits = as_budgets(budgets)
    if seconds is None and evaluations is None:
        raise BudgetError("the refinement has no end: give it seconds or a number of evaluations")
    if seconds is not None and not seconds > 0.0:
        raise BudgetError(f"{seconds:g} s is no time for a refinement; give more than 0")
    if evaluations is not None and evaluations < 1:
        raise BudgetError(f"{evaluations} evaluations are too few for a refinement; 1 is the start")
    if not set(moves) & set(_ENDLESS):
        raise BudgetError("the refinement has no move: give it mutation, coefficients, or both")
    start = space.plan(plan.schemes, method=plan.method, gap=plan.gap)
    if not space.fits(start, limits):
        over = ", ".join(
            f"{metric.value} {start.costs[metric]:g} of at most {limit:g}"
            for metric, limit in space.limits(limits).items()
        )
        raise BudgetError(
            f"the plan to refine is over '{','.join(map(str, limits))}' ({over}); "
            "start from a plan that was solved for these budgets"
        )
    clock = _Clock(seconds, evaluations, progress)
    return _Search(start, space, limits, evaluate, confirm, clock, moves, seed).run()


class _Clock:
    """How much of the search is over."""

    def __init__(
        self,
        seconds: float | None,
        evaluations: int | None,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._begun = time.monotonic()
        self._seconds = seconds
        self._evaluations = evaluations
        self._progress = progress
        self._longest = 0.0
        self._count = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begun

    @property
    def left(self) -> float | None:
        """Seconds left, None where there is no end in time."""
        return None if self._seconds is None else self._seconds - self.elapsed

    @property
    def share(self) -> float:
        shares = [0.0]
        if self._evaluations is not None:
            shares.append(self._count / self._evaluations)
        if self._seconds is not None:
            shares.append(self.elapsed / self._seconds)
        return min(max(shares), 1.0)

    @property
    def over(self) -> bool:
        """Whether another evaluation would be one too many or end too late."""
        if self._evaluations is not None and self._count >= self._evaluations:
            return True
        return self.left is not None and self.left <= self._longest

    def evaluated(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)
        self._count += 1
        if self._progress is not None:
            self._progress(self.share)

    def done(self) -> None:
        if self._progress is not None:
            self._progress(1.0)


Indices: TypeAlias = tuple[int, ...]
"""A plan: the level of each layer."""


class _Search:
    """One refinement: a hill climb over plans that remembers all it evaluated."""

    def __init__(
        self,
        start: Plan,
        space: SearchSpace,
        budgets: Sequence[Budget],
        evaluate: Callable[[Plan], float],
        confirm: Callable[[Plan], float] | None,
        clock: _Clock,
        moves: Collection[Move],
        seed: int,
    ) -> None:
        self._space, self._evaluate, self._confirm, self._clock = space, evaluate, confirm, clock
        self._random = np.random.default_rng(seed)
        self._levels = space.levels(budgets)
        self._rooms, self._rounding = space.rooms(budgets)
        self._chain = space.chain(self._levels, budgets)
        self._free = np.flatnonzero([len(one.losses) > 1 for one in self._levels])
        self._moves = frozenset(moves)
        self._start = start
        self._position = self._nearest_levels(start, budgets)
        self._best, self._best_loss = start, math.inf
        self._best_confirmed = math.inf
        self._losses: dict[Indices, float] = {}
        self._records: list[Evaluation] = []
        self._stale = 0  # candidates in a row that were not evaluated
        self._failures = 0  # evaluations in a row that were no better
        self._logarithms = np.zeros(len(self._levels))  # of the coefficients
        self._weighed_loss = math.inf

    def run(self) -> Refinement:
        self._try(self._start, Move.START)
        self._weighed_loss = self._best_loss
        position = self._plan(self._position)
        if position.schemes == self._start.schemes:
            self._losses[self._position] = self._best_loss
        elif not self._clock.over:
            # The start had dominated choices: the better ones are the first candidate.
            self._try_levels(self._position, Move.MUTATION)
        for levels in self._uniform_plans() if Move.UNIFORM in self._moves else ():
            if not self._clock.over:
                self._try_levels(levels, Move.UNIFORM)
        while not self._clock.over and self._stale < _STALE and len(self._free):
            if self._next_move() is Move.COEFFICIENTS:
                self._weigh()
            else:
                self._mutate()
        self._clock.done()
        return Refinement(self._best, tuple(self._records))

    def _next_move(self) -> Move:
        if Move.MUTATION not in self._moves:
            return Move.COEFFICIENTS
        if Move.COEFFICIENTS not in self._moves:
            return Move.MUTATION
        # From half and half to mutations only.
        weigh = self._random.random() < 0.5 * (1.0 - self._clock.share)
        return Move.COEFFICIENTS if weigh else Move.MUTATION

    def _nearest_levels(self, plan: Plan, budgets: Sequence[Budget]) -> Indices:
        """The plan's levels; where its choice is dominated, the best one that costs no more."""
        found = []
        for one in self._levels:
            choice = self._space.layer(one.layer).choice(plan.schemes[one.layer])
            cost = np.array([choice.costs[budget.metric] for budget in budgets])
            no_dearer = (one.costs <= cost).all(axis=1)
            if self._chain is not None:
                no_dearer &= one.sparse == choice.scheme.skips_zeros
            found.append(int(np.argmax(no_dearer)))
        return tuple(found)

    def _plan(self, indices: Indices) -> Plan:
        method = self._start.method.removesuffix(", refined") + ", refined"
        schemes = {
            one.layer: one.schemes[index] for one, index in zip(self._levels, indices, strict=True)
        }
        return self._space.plan(schemes, method=method)

    def _try(self, plan: Plan, move: Move) -> float:
        """Evaluate a plan, record it, and keep it where it is the best so far."""
        begun = self._clock.elapsed
        loss = float(self._evaluate(plan))
        finite = math.isfinite(loss)
        plan = replace(plan, evaluated=loss if finite else math.nan)
        loss = loss if finite else math.inf
        accepted = move is Move.START or loss < self._best_loss
        confirmed = None
        if accepted and self._confirm is not None:
            confirmed = float(self._confirm(plan))
            known = confirmed if math.isfinite(confirmed) else math.inf
            accepted = move is Move.START or known < self._best_confirmed
            if accepted:
                self._best_confirmed = known
        ended = self._clock.elapsed
        if accepted:
            self._best, self._best_loss = plan, loss
        self._failures = 0 if accepted else self._failures + 1
        self._stale = 0
        self._records.append(Evaluation(plan, move, accepted, ended, confirmed))
        self._clock.evaluated(ended - begun)
        return loss

    def _try_levels(self, indices: Indices, move: Move) -> float:
        """The loss of a plan, evaluated where it is new."""
        if indices in self._losses:
            self._stale += 1
            return self._losses[indices]
        loss = self._try(self._plan(indices), move)
        self._losses[indices] = loss
        if self._records[-1].accepted:
            self._position = indices
        return loss

    # Uniform plans

    def _uniform_plans(self) -> list[Indices]:
        """The uniform plans of least loss that fit, as far as layers have their schemes."""
        schemes = {str(scheme): scheme for one in self._levels for scheme in one.schemes}
        found = {tuple(self._nearest(one, s) for one in self._levels) for s in schemes.values()}
        fitting = [levels for levels in found if self._fits(self._spent(levels))]
        return sorted(fitting, key=lambda levels: (self._plan(levels).loss, levels))[:_UNIFORM]

    @staticmethod
    def _nearest(one: Levels, scheme: Scheme) -> int:
        """A layer's level of a scheme; where it has none, its last that goes no further."""
        texts = [str(each) for each in one.schemes]
        if str(scheme) in texts:
            return texts.index(str(scheme))
        milder = [
            index
            for index, each in enumerate(one.schemes)
            if each.density >= scheme.density and each.weight_bits >= scheme.weight_bits
        ]
        return max(milder, default=0)

    # Coefficients

    def _weigh(self) -> None:
        """Draw some coefficients anew, solve, and keep them where the plan is better."""
        cooled = 1.0 - self._clock.share
        count = max(1, math.ceil(_REDRAWN * cooled * len(self._free)))
        redrawn = self._random.choice(self._free, size=count, replace=False)
        logarithms = self._logarithms.copy()
        spread = max(_SPREAD * cooled, _SMALLEST_SPREAD)
        logarithms[redrawn] += spread * self._random.standard_normal(count)
        found = self._solve(np.exp(logarithms))
        if found is None:
            self._stale += 1
            return
        levels = list(found)
        self._spend(levels, self._free)
        loss = self._try_levels(tuple(levels), Move.COEFFICIENTS)
        if loss < self._weighed_loss:
            self._logarithms, self._weighed_loss = logarithms, loss

    def _solve(self, coefficients: Array) -> Indices | None:
        """The plan of least weighed loss, or None where none was found in the time left."""
        losses = [
            (one.losses - one.losses[0]) * coefficient
            for one, coefficient in zip(self._levels, coefficients, strict=True)
        ]
        costs = [one.costs for one in self._levels]
        if len(self._rooms) == 1:
            return dynamic.choose(
                losses, [cost[:, 0] for cost in costs], float(self._rooms[0]),
                float(self._rounding[0]), chain=self._chain, buckets=_BUCKETS,
            )  # fmt: skip
        # With several, an exact answer would take longer than most evaluations. Where the mixed
        # layers' rounding is over a budget, others make room.
        found = milp.choose(
            losses, costs, self._rooms, self._rounding, chain=self._chain, relaxed=True
        ).indices
        if found is None:
            return None
        levels = list(found)
        return tuple(levels) if self._lower(levels, self._random.permutation(self._free)) else None

    # Mutations

    def _mutate(self) -> None:
        """Change a few layers' levels, and others' so that the budgets hold."""
        levels = list(self._position)
        most = min(_MOST_SWITCHES + self._failures // _PATIENCE, len(self._free))
        # The smaller of two draws: few changes at once are the likelier to help.
        count = int(self._random.integers(1, most + 1, size=2).min())
        switched = self._random.choice(self._free, size=count, replace=False)
        for layer in switched:
            levels[layer] = self._step(int(layer), levels[layer])
        others = self._random.permutation(np.setdiff1d(self._free, switched))
        if not self._lower(levels, others):
            self._stale += 1
            return
        if self._random.random() < 0.5:
            self._spend(levels, others)
        self._try_levels(tuple(levels), Move.MUTATION)

    def _step(self, layer: int, level: int) -> int:
        """Another level of a layer, 1, 2, 4, ... up or down."""
        last = len(self._levels[layer].losses) - 1
        step = 1 << int(self._random.integers(0, last.bit_length()))
        if self._random.random() < 0.5:
            step = -step
        stepped = min(max(level + step, 0), last)
        return stepped if stepped != level else min(max(level - step, 0), last)

    def _spent(self, levels: Sequence[int]) -> Array:
        """(budgets,) what the layers cost, and the changes between them."""
        costs = [one.costs[level] for one, level in zip(self._levels, levels, strict=True)]
        spent: Array = np.sum(costs, axis=0)
        if self._chain is not None:
            spent += self._chain.count(levels) * self._chain.cost
        return spent

    def _alternatives(self, levels: Sequence[int], layer: int, spent: Array) -> Array:
        """(choices, budgets) what would be spent with each of a layer's levels."""
        level, costs = levels[layer], self._levels[layer].costs
        found: Array = spent - costs[level] + costs
        if self._chain is not None:
            around = self._chain.around(levels, layer)
            found += (around - around[level])[:, None] * self._chain.cost
        return found

    def _fits(self, spent: Array) -> NDArray[np.bool_]:
        """Whether (..., budgets) costs keep all budgets."""
        kept: NDArray[np.bool_] = np.all(spent <= self._rooms + self._rounding, axis=-1)
        return kept

    def _lower(self, levels: list[int], layers: NDArray[np.intp]) -> bool:
        """Lower the first of `layers` that can make room alone, or else several, until all fits."""
        spent = self._spent(levels)
        if self._fits(spent):
            return True
        for layer in layers:
            level = levels[layer]
            lowered = self._alternatives(levels, layer, spent)[level + 1 :]
            enough = np.flatnonzero(self._fits(lowered))
            if len(enough):
                levels[layer] = level + 1 + int(enough[0])
                return True
        for layer in layers:
            level, count = levels[layer], len(self._levels[layer].losses)
            if level + 1 < count:
                levels[layer] = int(self._random.integers(level + 1, count))
                if self._fits(self._spent(levels)):
                    return True
        return False

    def _spend(self, levels: list[int], layers: NDArray[np.intp]) -> None:
        """Raise `layers` into the room that is left, the largest gain of the proxy first."""
        while True:
            spent = self._spent(levels)
            raises = []
            for layer in layers:
                level, one = levels[layer], self._levels[layer]
                raised_costs = self._alternatives(levels, layer, spent)[:level]
                possible = np.flatnonzero(self._fits(raised_costs))
                if len(possible):
                    raised = int(possible[0])
                    gain = float(one.losses[level] - one.losses[raised])
                    raises.append((gain, -int(layer), raised))
            if not raises:
                return
            _, negative, raised = max(raises)
            levels[-negative] = raised
