"""The multiple-choice knapsack as an integer programme, exactly, with any number of budgets.

    minimise    Σ loss[l, i] x[l, i]            x in {0, 1},  Σ_i x[l, i] = 1
    subject to  Σ cost[l, i, b] x[l, i] + Σ change[b] y[l] <= room[b]
                y[l] >= |Σ_i sparse[l, i] x[l, i] - Σ_i sparse[l + 1, i] x[l + 1, i]|

The y, one for each two neighbours, are there only where changes between dense and sparse
neighbours cost something. HiGHS (branch and cut, through SciPy) does the solving, to a relative gap
of 0 unless told otherwise. It is deterministic for the same version and input, and the input is
brought into one order first: so are ties.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from obc_deploy.errors import BudgetError
from obc_deploy.search.budgets import Budget, Budgets, as_budgets
from obc_deploy.search.changes import Array, Chain
from obc_deploy.search.choices import Plan, SearchSpace

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_LARGEST_LOSS = 1e3
_ROOM = 1e2
"""Units for the solver, which works to 1e-6 of any unit: larger ones make it doubt its own sums."""

_CUTS = 30
"""Plans over a budget by no more than that tolerance that are ruled out one by one."""

_INFEASIBLE = 2


@dataclass(frozen=True)
class Chosen:
    """A knapsack's answer.

    Attributes:
        indices: the choice of each layer; None where nothing fits, or nothing was found in time.
        bound: no answer has a smaller sum of losses.
        infeasible: it is proved that nothing fits.
    """

    indices: tuple[int, ...] | None
    bound: float
    infeasible: bool


def solve_milp(
    space: SearchSpace, budgets: Budgets, *, gap: float = 0.0, seconds: float | None = None
) -> Plan:
    """The plan of least loss that keeps every budget.

    Args:
        space: the layers and their choices.
        budgets: one or several, e.g. "macs:3x,latency:4x".
        gap: stop at a plan that is proved to be within this share of the optimum.
        seconds: stop then and return the best plan so far, with its proved gap. The answer then
            depends on the machine's speed.

    Raises:
        BudgetError: no plan keeps the budgets (the message says what could be), a cost is unknown,
            or no plan was found in `seconds`.
    """
    from obc_deploy.search.reachable import unreachable

    limits = as_budgets(budgets)
    chosen = _solve(space, limits, None, gap, seconds)
    if chosen.infeasible:
        raise unreachable(space, limits)
    if chosen.indices is None:
        raise BudgetError(
            f"no plan for {_text(limits)} was found in {seconds:g} s; give the search more time"
        )
    levels = space.levels(limits)
    schemes = {
        one.layer: one.schemes[index] for one, index in zip(levels, chosen.indices, strict=True)
    }
    plan = space.plan(schemes, method="milp")
    distance = plan.loss - chosen.bound
    # The solver's own tolerance is about 1e-9 of the largest loss: no gap, but rounding.
    largest = max(float(np.ptp(one.losses)) for one in levels)
    proved: float | None = 0.0
    if math.isinf(distance):
        proved = None
    elif distance > 4e-9 * largest:
        proved = distance / max(abs(plan.loss), 1e-300)
    return replace(plan, gap=proved)


def least_cost(space: SearchSpace, budgets: Sequence[Budget], budget: Budget) -> float | None:
    """Least cost, in another budget's metric, of a plan that keeps `budgets`.

    With the fixed part; None where no plan keeps them.
    """
    both = (*budgets, budget)
    chosen = _solve(space, both, len(budgets), 0.0, None)
    if chosen.indices is None:
        return None
    levels = space.levels(both)
    fixed = space.fixed.get(budget.metric, 0.0)
    spent = [one.costs[index, -1] for one, index in zip(levels, chosen.indices, strict=True)]
    chain = space.chain(levels, both)
    if chain is not None:
        spent.append(chain.count(chosen.indices) * chain.cost[-1])
    return math.fsum((fixed, *map(float, spent)))


def _text(budgets: Sequence[Budget]) -> str:
    return ",".join(map(str, budgets))


def _solve(
    space: SearchSpace,
    budgets: Sequence[Budget],
    minimised: int | None,
    gap: float,
    seconds: float | None,
) -> Chosen:
    """Minimise the losses, or the cost of one of the budgets (which then limits nothing)."""
    levels = space.levels(budgets)
    rooms, rounding = space.rooms(budgets)
    chain = space.chain(levels, budgets)
    if minimised is None:
        return choose([o.losses for o in levels], [o.costs for o in levels], rooms, rounding,
                      chain=chain, gap=gap, seconds=seconds)  # fmt: skip
    change_loss = 0.0
    if chain is not None:
        change_loss = float(chain.cost[minimised])
        chain = replace(chain, cost=np.delete(chain.cost, minimised))
    return choose(
        [o.costs[:, minimised] for o in levels],
        [np.delete(o.costs, minimised, axis=1) for o in levels],
        np.delete(rooms, minimised),
        np.delete(rounding, minimised),
        chain=chain,
        change_loss=change_loss,
        gap=gap,
        seconds=seconds,
    )


def choose(
    losses: Sequence[Array],
    costs: Sequence[Array],
    rooms: Array,
    rounding: Array,
    *,
    chain: Chain | None = None,
    change_loss: float = 0.0,
    gap: float = 0.0,
    seconds: float | None = None,
    relaxed: bool = False,
) -> Chosen:
    """Pick one entry of each array, the sum of losses least, the sums of costs within the rooms.

    Args:
        losses: one (choices,) array a layer.
        costs: one (choices, budgets) array a layer.
        rooms: (budgets,).
        rounding: (budgets,) by which a sum may be over its room.
        chain: what changes between neighbours cost; None: nothing.
        change_loss: what a change adds to the sum of losses.
        gap: relative distance from the optimum to stop at.
        seconds: to stop after.
        relaxed: let choices be mixed, which is far quicker, and take the largest part of each mix.
            At most as many layers as there are budgets are mixed; the picks may be over a room.
    """
    # Everything relative to the layer's least: small numbers, and most choices go at once.
    least_loss = np.array([loss.min() for loss in losses])
    least_cost = np.array([cost.min(axis=0) for cost in costs])
    left = rooms - np.array([math.fsum(column) for column in least_cost.T])
    if (left < -rounding).any():
        return Chosen(None, math.inf, True)
    kept = [
        np.flatnonzero(((cost - least) <= left + rounding).all(axis=1))
        for cost, least in zip(costs, least_cost, strict=True)
    ]
    if not all(map(len, kept)):
        return Chosen(None, math.inf, True)

    objective = np.concatenate([x[k] - m for x, k, m in zip(losses, kept, least_loss, strict=True)])
    rows = np.concatenate([c[k] - m for c, k, m in zip(costs, kept, least_cost, strict=True)]).T
    layer_of = np.repeat(np.arange(len(kept)), list(map(len, kept)))
    starts = np.concatenate([[0], np.cumsum(list(map(len, kept)))])
    unlike = None
    if chain is not None:
        unlike = _unlike(chain, kept, starts)
        edges = len(chain.neighbours)
        objective = np.concatenate([objective, np.full(edges, change_loss)])
        rows = np.hstack([rows, np.repeat(chain.cost[:, None], edges, axis=1)])
    loss_unit = float(objective.max()) / _LARGEST_LOSS or 1.0
    units = np.where(left > rounding, left, np.maximum(rows.max(axis=1), rounding)) / _ROOM
    units[units <= 0.0] = 1.0
    offset = math.fsum(least_loss)

    allowed = np.maximum(left, 0.0) / units
    ruled_out: list[list[int]] = []
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        values, bound, status = _highs(
            objective / loss_unit, rows / units[:, None], allowed, layer_of, unlike, ruled_out,
            gap, None if deadline is None else max(deadline - time.monotonic(), 0.01), relaxed,
        )  # fmt: skip
        if status == _INFEASIBLE:
            return Chosen(None, math.inf, True)
        if values is None:
            return Chosen(None, offset + bound * loss_unit, False)
        picked = [
            int(start + np.argmax(values[start:end])) for start, end in itertools.pairwise(starts)
        ]
        indices = tuple(
            int(k[index - start]) for k, index, start in zip(kept, picked, starts[:-1], strict=True)
        )
        over = np.array([math.fsum(row[picked]) for row in rows]) - left
        if chain is not None:
            over += chain.count(indices) * chain.cost
        if relaxed or (over <= rounding).all():
            break
        # The solver's tolerance let a sum slip over its room.
        ruled_out.append(picked)
        if len(ruled_out) > _CUTS:
            allowed = np.where(over > rounding, allowed - 2 * over / units, allowed)
    return Chosen(indices, offset + bound * loss_unit, False)


def _unlike(chain: Chain, kept: Sequence[NDArray[np.intp]], starts: NDArray[np.intp]) -> csr_array:
    """(2 edges, variables): Σ sparse x of a layer minus its neighbour's, minus y; and back."""
    from scipy.sparse import csr_array, hstack, identity, vstack

    edges = len(chain.neighbours)
    apart = np.zeros((edges, int(starts[-1])))
    for row, pair in zip(apart, chain.neighbours, strict=True):
        for layer, sign in zip(pair, (1.0, -1.0), strict=True):
            row[starts[layer] : starts[layer + 1]] = sign * chain.sparse[layer][kept[layer]]
    both = vstack([csr_array(apart), csr_array(-apart)])
    return csr_array(hstack([both, vstack([-identity(edges)] * 2)]))


def _highs(
    objective: Array,
    rows: Array,
    rooms: Array,
    layer_of: NDArray[np.intp],
    unlike: csr_array | None,
    ruled_out: Sequence[Sequence[int]],
    gap: float,
    seconds: float | None,
    relaxed: bool,
) -> tuple[Array | None, float, int]:
    """Values of the variables (None where none were found), the dual bound, the status."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count, picks = len(objective), len(layer_of)
    one_each = csr_array(
        (np.ones(picks), (layer_of, np.arange(picks))), shape=(layer_of[-1] + 1, count)
    )
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    if unlike is not None:
        constraints.append(LinearConstraint(unlike, -np.inf, 0.0))
    if len(rooms):
        constraints.append(LinearConstraint(csr_array(rows), -np.inf, rooms))
    if ruled_out:
        cuts = np.zeros((len(ruled_out), count))
        for cut, picked in zip(cuts, ruled_out, strict=True):
            cut[list(picked)] = 1.0
        constraints.append(LinearConstraint(csr_array(cuts), -np.inf, layer_of[-1]))
    options = {"mip_rel_gap": gap} | ({} if seconds is None else {"time_limit": seconds})
    result = milp(
        objective, integrality=np.where(np.arange(count) < picks, 0 if relaxed else 1, 0),
        bounds=Bounds(0, 1), constraints=constraints, options=options,
    )  # fmt: skip
    bound = -math.inf
    if not relaxed and result.mip_dual_bound is not None:
        bound = float(result.mip_dual_bound)
    if result.x is None and result.status not in (1, _INFEASIBLE):
        raise BudgetError(
            f"HiGHS could not solve the choice among {count} schemes: {result.message}; "
            "try one budget with the dynamic programme"
        )
    return result.x, bound, int(result.status)
