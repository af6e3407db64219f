"""The reverse of a budget: the most that can be saved within a loss of accuracy.

Accuracy falls with the factor that is saved, not strictly but nearly so; the largest factor whose
plan keeps the accuracy is found by bisection of the factor's logarithm, between the plan of least
loss and the cheapest one. Every probe is a whole compression, evaluated on labelled samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from obc_deploy.compression import CompressedModel
from obc_deploy.errors import BudgetError, CalibrationError
from obc_deploy.planning import FoundPlan, Planner
from obc_deploy.search import Budget, Metric, best_reachable

DEFAULT_PROBES = 7
"""Compressions at most; six halve the range to a few per cent of its logarithm."""
_CLOSE = 1.03
"""Factors this near to each other are not told apart."""
_INSIDE = 0.999
"""Share of the best reachable factor that is probed first: at its very end sums round over it."""

Make = Callable[[FoundPlan], CompressedModel]
"""Compresses by a plan and evaluates; the manifest has the accuracy."""


@dataclass(frozen=True)
class Probe:
    """One factor that was tried.

    Attributes:
        factor: how many times less than dense the plan costs.
        drop: accuracy lost, in points of a hundred.
        kept: whether that was allowed.
    """

    factor: float
    drop: float
    kept: bool


@dataclass(frozen=True)
class WithinDrop:
    """What was found.

    Attributes:
        model: the fastest compressed model within the drop; None where the dense one wins.
        probes: everything that was tried, in order.
    """

    model: CompressedModel | None
    probes: tuple[Probe, ...]


def fastest_within(
    planner: Planner,
    allowed: float,
    make: Make,
    *,
    metric: Metric = Metric.LATENCY,
    probes: int = DEFAULT_PROBES,
) -> WithinDrop:
    """The plan that saves most of a metric and loses at most `allowed` points of accuracy.

    Args:
        planner: finds plans.
        allowed: points of a hundred, 0 or more.
        make: compresses by a plan and evaluates.
        metric: what is to be saved.
        probes: compressions at most.

    Raises:
        BudgetError: `allowed` is negative or not finite.
        CalibrationError: `make` evaluated nothing.
    """
    if not (math.isfinite(allowed) and allowed >= 0.0):
        raise BudgetError(f"a drop of {allowed:g} points; give 0 or more, such as --max-drop 1.0")
    tried: list[Probe] = []
    best: CompressedModel | None = None

    def keeps(plan: FoundPlan) -> bool:
        nonlocal best
        model = make(plan)
        accuracy = model.manifest.accuracy
        if accuracy is None:
            raise CalibrationError("--max-drop needs labelled samples: add --eval DATA")
        drop = 100.0 * (accuracy.dense - accuracy.compressed)
        kept = drop <= allowed + 1e-9
        tried.append(Probe(plan.factors.get(metric, math.inf), drop, kept))
        if kept:
            best = model
        return kept

    safe = planner.least_lossy()
    if not keeps(safe):
        return WithinDrop(None, tuple(tried))
    low = max(1.0, safe.factors.get(metric, math.inf))
    reachable = best_reachable(planner.space, Budget(metric, 2.0))
    high = _INSIDE * next(iter(reachable.values()))
    if math.isfinite(high) and high > low * _CLOSE:
        if keeps(planner.find(Budget(metric, high))):
            return WithinDrop(best, tuple(tried))
        while len(tried) < probes and high > low * _CLOSE:
            middle = math.sqrt(low * high)
            found = planner.find(Budget(metric, middle))
            if keeps(found):
                low = max(middle, found.factors[metric])
            else:
                high = middle
    return WithinDrop(best, tuple(tried))
