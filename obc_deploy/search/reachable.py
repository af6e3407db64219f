"""What could be reached at best and which layers are in the way: the answer to a budget too far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from obc_deploy.errors import BudgetError
from obc_deploy.search.budgets import Budget, Budgets, as_budgets
from obc_deploy.search.choices import ROUNDING, SearchSpace
from obc_deploy.search.milp import least_cost

_NAMED = 3
"""Layers that a message names."""


def best_reachable(space: SearchSpace, budgets: Budgets) -> dict[Budget, float]:
    """How many times less than dense each budget's metric can cost when no other budget counts.

    `math.inf` where it can cost nothing at all.
    """
    return {
        budget: _factor(space, budget, _cheapest(space, budget)) for budget in as_budgets(budgets)
    }


def unreachable(space: SearchSpace, budgets: Sequence[Budget]) -> BudgetError:
    """The error for budgets that no plan keeps: the best reachable of each, and what limits it."""
    limits = space.limits(budgets)
    alone = best_reachable(space, tuple(budgets))
    missed = [
        budget
        for budget in budgets
        if _cheapest(space, budget) > limits[budget.metric] * (1.0 + ROUNDING)
    ]
    if missed:
        wanted = ",".join(str(budget) for budget in missed)
        best = ", ".join(_shown(budget, alone[budget]) for budget in budgets)
        why = "; ".join(_obstacle(space, budget) for budget in missed)
        return BudgetError(
            f"budget '{wanted}' cannot be met: the best reachable is {best}, because {why}; "
            "ask for less, or give these layers more schemes"
        )
    parts = []
    for budget in budgets:
        others = [other for other in budgets if other is not budget]
        cost = least_cost(space, others, budget)
        beside = (
            "nothing beside the others, which exclude each other"
            if cost is None
            else f"{_shown(budget, _factor(space, budget, cost))} beside the others"
        )
        parts.append(f"{_shown(budget, alone[budget])} alone and {beside}")
    wanted = ",".join(str(budget) for budget in budgets)
    return BudgetError(
        f"budgets '{wanted}' cannot be met together: the best reachable is {'; '.join(parts)}; "
        "ask for less of one of them"
    )


def _cheapest(space: SearchSpace, budget: Budget) -> float:
    """Cost of the cheapest plan, fixed part included."""
    space.limits([budget])
    if space.changes is not None and space.changes.costs.get(budget.metric):
        cost = least_cost(space, (), budget)
        assert cost is not None  # no budget, so every plan keeps all of them
        return cost
    least = (min(one.costs[budget.metric] for one in layer.choices) for layer in space.layers)
    return math.fsum((space.fixed.get(budget.metric, 0.0), *least))


def _factor(space: SearchSpace, budget: Budget, cost: float) -> float:
    return space.dense_cost(budget.metric) / cost if cost > 0.0 else math.inf


def _shown(budget: Budget, factor: float) -> str:
    """A factor as a budget's text, rounded down so that it can really be asked for."""
    if math.isinf(factor):
        return f"{budget.metric.value} without end"
    digits = 2 if factor >= 1.1 else 4
    text = f"{math.floor(factor * 10**digits) / 10**digits:.{digits}f}"
    return f"{budget.metric.value}:{text.rstrip('0').rstrip('.')}x"


def _obstacle(space: SearchSpace, budget: Budget) -> str:
    """What the cheapest plan's cost is made of: layers without a choice first, then the largest."""
    metric = budget.metric
    cheapest = _cheapest(space, budget)
    least = {layer.name: min(o.costs[metric] for o in layer.choices) for layer in space.layers}
    stuck: dict[str, list[str]] = {}
    for layer in space.layers:
        texts = {str(choice.scheme) for choice in layer.choices}
        if len(texts) == 1 and least[layer.name] > 0.0:
            stuck.setdefault(texts.pop(), []).append(layer.name)

    def share(cost: float) -> str:
        return f"{cost / cheapest:.0%}" if cheapest > 0.0 else "all"

    def names(layers: Sequence[str]) -> str:
        ranked = sorted(layers, key=lambda name: -least[name])
        more = f" and {len(ranked) - _NAMED} more" if len(ranked) > _NAMED else ""
        return ", ".join(ranked[:_NAMED]) + more

    parts = [
        f"{names(layers)} can only be '{scheme}' ({share(sum(least[n] for n in layers))} of the "
        f"{metric.value} left)"
        for scheme, layers in stuck.items()
    ]
    fixed = space.fixed.get(metric, 0.0)
    if fixed > 0.0:
        parts.append(f"{share(fixed)} of the {metric.value} left belongs to no layer")
    between = cheapest - fixed - math.fsum(least.values())
    if space.changes is not None and between > ROUNDING * cheapest:
        parts.append(
            f"{share(between)} is what dense and sparse layers next to one another cost more"
        )
    bound = {name for layers in stuck.values() for name in layers}
    free = [name for name in least if least[name] > 0.0 and name not in bound]
    if free:
        largest = max(free, key=lambda name: least[name])
        scheme = min(space.layer(largest).choices, key=lambda one: one.costs[metric]).scheme
        parts.append(f"'{scheme}' is the cheapest for '{largest}' ({share(least[largest])} of it)")
    return " and ".join(parts) or f"no plan costs less than {cheapest:g}"
