"""The multiple-choice knapsack of one budget by dynamic programming, as SPDY does.

    best[l, t] = min over choices i of  best[l - 1, t - ceil(cost[l, i] / width)] + loss[l, i]

The room that a layer's cheapest choice leaves is cut into `buckets` of equal width, and costs are
rounded up to whole buckets: a plan that fits the buckets fits the budget. A second pass with costs
rounded *down* bounds what rounding can have lost. Whole-numbered costs whose greatest common
divisor makes few enough buckets are not rounded at all, and the plan is then optimal.

Where changes between dense and sparse neighbours cost something, layers are taken along the chain
and `best` is kept twice: for a dense last layer and for a sparse one.

Source: SPDY (Frantar and Alistarh, arXiv 2201.13096), section 3.1, with 10,000 buckets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from obc_deploy.errors import BudgetError
from obc_deploy.search.budgets import Budgets, as_budgets
from obc_deploy.search.changes import Array, Chain
from obc_deploy.search.choices import Plan, SearchSpace

DEFAULT_BUCKETS = 10_000
"""How many buckets SPDY cuts its budget into."""

_WHOLE = 1e-9
"""Share of a bucket that a cost may be over a whole number of them and not be rounded up."""


def solve_dynamic(space: SearchSpace, budget: Budgets, *, buckets: int = DEFAULT_BUCKETS) -> Plan:
    """The plan of least loss whose costs, rounded up to whole buckets, keep the one budget.

    Never over the budget. Its gap is what a second pass, with costs rounded down, proves.

    Args:
        space: the layers and their choices.
        budget: exactly one, e.g. "macs:3x".
        buckets: how finely the room is cut. Work and memory grow with it.

    Raises:
        BudgetError: several budgets, no plan that keeps it (the message says what could be), an
            unknown cost, or too few buckets.
    """
    from obc_deploy.search.reachable import unreachable

    limits = as_budgets(budget)
    if len(limits) != 1:
        raise BudgetError(
            f"the dynamic programme takes one budget, not {','.join(map(str, limits))}; "
            "solve several with the integer programme (solve_milp)"
        )
    if buckets < 1:
        raise BudgetError(f"{buckets} buckets cannot hold a budget; {DEFAULT_BUCKETS} are usual")
    levels = space.levels(limits)
    rooms, rounding = space.rooms(limits)
    losses = [one.losses for one in levels]
    costs = [one.costs[:, 0] for one in levels]
    room, slack = float(rooms[0]), float(rounding[0])
    chain = space.chain(levels, limits)
    indices = choose(losses, costs, room, slack, chain=chain, buckets=buckets)
    relaxed = choose(losses, costs, room, slack, chain=chain, buckets=buckets, round_down=True)
    if relaxed is None:
        raise unreachable(space, limits)
    if indices is None:
        raise BudgetError(
            f"{buckets} buckets are too coarse for a budget as tight as '{limits[0]}'; take more, "
            "or the integer programme (solve_milp)"
        )
    schemes = {one.layer: one.schemes[index] for one, index in zip(levels, indices, strict=True)}
    plan = space.plan(schemes, method="dynamic")
    bound = math.fsum(float(loss[index]) for loss, index in zip(losses, relaxed, strict=True))
    gap = max(plan.loss - bound, 0.0) / max(abs(plan.loss), 1e-300)
    return replace(plan, gap=gap)


def choose(
    losses: Sequence[Array],
    costs: Sequence[Array],
    room: float,
    rounding: float,
    *,
    chain: Chain | None = None,
    buckets: int = DEFAULT_BUCKETS,
    round_down: bool = False,
) -> tuple[int, ...] | None:
    """Pick one entry of each array, the sum of losses least, the rounded costs within the room.

    Of equally good picks, the one that fills fewest buckets, and then the layers' earlier entries.

    Args:
        losses: one (choices,) array a layer.
        costs: one (choices,) array a layer.
        room: what the costs may sum to.
        rounding: by which a sum of floats may be over it.
        chain: what changes between neighbours cost; None: nothing.
        buckets: at most this many are used.
        round_down: round costs down: the sum of losses is then a lower bound, the room not kept.

    Returns:
        The index of each layer's entry; None where nothing fits the rounded room.
    """
    least = [float(cost.min()) for cost in costs]
    left = room - math.fsum(least)
    if left < -rounding:
        return None
    extra = [cost - low for cost, low in zip(costs, least, strict=True)]
    if chain is None:
        order: Sequence[int] = range(len(costs))
        kinds = [np.zeros(len(cost), dtype=np.intp) for cost in costs]
    else:
        order = chain.order
        kinds = [sparse.astype(np.intp) for sparse in chain.sparse]
        extra.append(chain.cost)
    needed, total = _in_buckets(extra, max(left, 0.0), rounding, buckets, round_down)
    change = 0 if chain is None else int(needed.pop()[0])

    # best[kind]: of the layers so far, the last of them dense (0) or sparse (1).
    best = np.zeros((1 if chain is None else 2, total + 1))
    taken: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    for layer in order:
        changed = np.zeros(best.shape, dtype=np.bool_)
        if chain is not None:
            best, changed = _with_changes(best, change if layer in chain.followers else 0)
        after = np.full(best.shape, np.inf)
        which = np.zeros(best.shape, dtype=np.int32)
        for index, loss in enumerate(losses[layer]):
            need, kind = int(needed[layer][index]), int(kinds[layer][index])
            if need > total:
                continue
            reached = best[kind, : total + 1 - need] + loss
            better = reached < after[kind, need:]
            np.copyto(after[kind, need:], reached, where=better)
            which[kind, need:][better] = index
        taken.append((which, changed))
        best = after
    last = int(np.argmin(best[:, total]))
    if math.isinf(best[last, total]):
        return None
    kind, spent = last, int(np.argmax(best[last] <= best[last, total]))
    indices = [0] * len(costs)
    for layer, (which, changed) in zip(reversed(order), reversed(taken), strict=True):
        index = int(which[kind, spent])
        indices[layer] = index
        spent -= int(needed[layer][index])
        if chain is not None and changed[kind, spent]:
            spent -= change if layer in chain.followers else 0
            kind = 1 - kind
    return tuple(indices)


def _with_changes(best: Array, change: int) -> tuple[Array, NDArray[np.bool_]]:
    """(kinds, buckets) least losses before a layer of each kind, and where they take a change."""
    other = np.full(best.shape, np.inf)
    if change < best.shape[1]:
        other[:, change:] = best[::-1, : best.shape[1] - change]
    changed = other < best
    return np.where(changed, other, best), changed


def _in_buckets(
    extra: Sequence[Array], left: float, rounding: float, buckets: int, round_down: bool
) -> tuple[list[NDArray[np.int64]], int]:
    """Costs in buckets, a layer at a time, and how many buckets there are."""
    nothing = left <= rounding
    if nothing:
        return [np.where(cost <= left + rounding, 0, 1).astype(np.int64) for cost in extra], 0
    width, total = left / buckets, buckets
    everything = np.concatenate(list(extra))
    if bool((everything == np.floor(everything)).all()) and everything.max() < 2.0**53:
        divisor = math.gcd(*(int(cost) for cost in np.unique(everything)))
        whole = math.floor(left + rounding) // divisor if divisor else 0
        if divisor and whole <= buckets:
            width, total = float(divisor), whole
    rounded: Callable[[Array], Array] = (
        (lambda share: np.floor(share + _WHOLE)) if round_down else
        (lambda share: np.ceil(share - _WHOLE))
    )  # fmt: skip
    # What is over the room needs one bucket more than there are, however much it is over.
    return [
        np.minimum(rounded(np.minimum(cost / width, total + 1.0)), total + 1).astype(np.int64)
        for cost in extra
    ], total
