"""What a search chooses from, and what it found: one scheme a layer, at a loss and at costs.

    minimise  Σ loss(layer, choice)   subject to   fixed + Σ cost(layer, choice) <= dense / factor

for every budget at once: a multiple-choice knapsack. The sum of the layers' losses is a proxy for
the loss of the whole network. Some runtimes fuse neighbours where both skip zeros or neither does;
there each change between the two along the network costs something on top (`ChangeCosts`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from obc_deploy.costs import LayerCost
from obc_deploy.errors import BudgetError, LayerError, SchemeError
from obc_deploy.schemes import Scheme, as_scheme
from obc_deploy.search.budgets import Budget, Metric
from obc_deploy.search.changes import Array, Chain, ChangeCosts

ROUNDING = 1e-9
"""Share of a limit by which a sum may be over it: what floating point sums owe, no more."""


@dataclass(frozen=True)
class Choice:
    """One thing that may be done to a layer.

    Attributes:
        scheme: what is done.
        loss: what it adds to the loss proxy; any finite number, the same unit for all layers.
        costs: what the layer then costs, by metric, in the metric's unit.
    """

    scheme: Scheme
    loss: float
    costs: Mapping[Metric, float]

    def __post_init__(self) -> None:
        if not math.isfinite(self.loss):
            raise LayerError(
                f"loss {self.loss} of scheme '{self.scheme}' is not finite; leave the scheme out"
            )
        for metric, cost in self.costs.items():
            if not math.isfinite(cost) or cost < 0.0:
                raise LayerError(
                    f"{metric.value} cost {cost} of scheme '{self.scheme}' is not a number of 0 or "
                    "more; measure it again"
                )


@dataclass(frozen=True)
class LayerChoices:
    """Everything that may be done to one layer; one of it will be.

    Attributes:
        name: the layer's name.
        choices: at least one, each scheme once, all with costs in the same metrics.
    """

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise LayerError(f"layer '{self.name}' has no choice; give it 'dense' at least")
        seen: set[str] = set()
        for choice in self.choices:
            if str(choice.scheme) in seen:
                raise LayerError(
                    f"layer '{self.name}' has scheme '{choice.scheme}' twice; keep the better one"
                )
            seen.add(str(choice.scheme))
            if choice.costs.keys() != self.choices[0].costs.keys():
                raise LayerError(
                    f"layer '{self.name}': '{choice.scheme}' has costs in "
                    f"{_names(choice.costs)}, '{self.choices[0].scheme}' in "
                    f"{_names(self.choices[0].costs)}; give all choices the same metrics"
                )

    @property
    def metrics(self) -> frozenset[Metric]:
        """The metrics that the choices have costs in."""
        return frozenset(self.choices[0].costs)

    @property
    def dense(self) -> Choice | None:
        """The choice that does nothing, where there is one."""
        return next((choice for choice in self.choices if choice.scheme.is_dense), None)

    def choice(self, scheme: Scheme | str) -> Choice:
        """The choice of a scheme.

        Raises:
            SchemeError: the layer has no such choice.
        """
        # By the text: it is what files and tables know a scheme by, and it rounds sparsities.
        text = str(as_scheme(scheme))
        for choice in self.choices:
            if str(choice.scheme) == text:
                return choice
        few = ", ".join(str(choice.scheme) for choice in self.choices[:5])
        more = ", ..." if len(self.choices) > 5 else ""
        raise SchemeError(f"layer '{self.name}' has no choice '{scheme}'; it can be {few}{more}")


@dataclass(frozen=True)
class Plan:
    """A scheme for every layer.

    Attributes:
        schemes: layer name to scheme, in the network's order.
        loss: the proxy, Σ of the layers' losses.
        costs: by metric, the fixed parts included.
        method: how it was found ("milp", "dynamic", "milp, refined", "given").
        gap: proved bound on the proxy's distance from the optimum, relative to the proxy (0 where
            optimal); None where nothing was proved.
        evaluated: loss of the stitched network on calibration data, where it was evaluated.
    """

    schemes: Mapping[str, Scheme]
    loss: float
    costs: Mapping[Metric, float]
    method: str
    gap: float | None = None
    evaluated: float | None = None


@dataclass(frozen=True)
class Levels:
    """One layer's choices as arrays, least loss first, dominated ones left out.

    Attributes:
        layer: the layer's name.
        schemes: of each level.
        losses: (levels,).
        costs: (levels, budgets), in the budgets' order.
        sparse: (levels,), whether there are zeros to skip; all False where changes cost nothing.
    """

    layer: str
    schemes: tuple[Scheme, ...]
    losses: Array
    costs: Array
    sparse: NDArray[np.bool_]


@dataclass(frozen=True)
class SearchSpace:
    """A network's layers with their choices.

    Attributes:
        layers: in the network's order.
        fixed: what the network costs beside its layers, by metric (latency that no layer owns);
            0 where not named. May be negative: the table of layers may overcount.
        dense: what the dense network costs altogether, by metric; where not named, the sum of the
            'dense' choices and the fixed part.
        changes: what changes between dense and sparse neighbours cost; None: nothing.
    """

    layers: tuple[LayerChoices, ...]
    fixed: Mapping[Metric, float] = field(default_factory=dict)
    dense: Mapping[Metric, float] = field(default_factory=dict)
    changes: ChangeCosts | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise LayerError("no layers to choose schemes for; the network needs at least one")
        seen: set[str] = set()
        for layer in self.layers:
            if layer.name in seen:
                raise LayerError(f"layer '{layer.name}' is there twice; give each layer once")
            seen.add(layer.name)
        for metric, cost in self.fixed.items():
            if not math.isfinite(cost):
                raise BudgetError(
                    f"the fixed part {cost} of {metric.value} is not finite; measure it again"
                )
        for pair in () if self.changes is None else self.changes.neighbours:
            for name in pair:
                self.layer(name)

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that all layers have costs in."""
        common = frozenset.intersection(*(layer.metrics for layer in self.layers))
        return tuple(metric for metric in Metric if metric in common)

    def layer(self, name: str) -> LayerChoices:
        """A layer by its name.

        Raises:
            LayerError: there is none of that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise LayerError(
            f"no layer '{name}' to choose for; the layers are "
            f"{', '.join(layer.name for layer in self.layers)}"
        )

    def dense_cost(self, metric: Metric) -> float:
        """What the dense network costs.

        Raises:
            BudgetError: it is neither given nor the sum of 'dense' choices.
        """
        if metric in self.dense:
            return self.dense[metric]
        costs = []
        for layer in self.layers:
            choice = layer.dense
            if choice is None or metric not in choice.costs:
                raise BudgetError(
                    f"layer '{layer.name}' has no 'dense' choice with a {metric.value} cost, so "
                    "what the dense network costs is unknown; give it (dense=...)"
                )
            costs.append(choice.costs[metric])
        return math.fsum((*costs, self.fixed.get(metric, 0.0)))

    def limits(self, budgets: Sequence[Budget]) -> dict[Metric, float]:
        """The most a plan may cost in each budget's metric, fixed part included.

        Raises:
            BudgetError: a layer, or the dense network, has no cost in a budget's metric.
        """
        for budget in budgets:
            for layer in self.layers:
                if budget.metric not in layer.metrics:
                    raise BudgetError(
                        f"budget '{budget}' needs the {budget.metric.value} of every layer, and "
                        f"'{layer.name}' has only {_names(layer.metrics)}; measure it, or drop "
                        "the budget"
                    )
        return {budget.metric: budget.limit(self.dense_cost(budget.metric)) for budget in budgets}

    def plan(
        self,
        schemes: Mapping[str, Scheme | str],
        *,
        method: str = "given",
        gap: float | None = None,
        evaluated: float | None = None,
    ) -> Plan:
        """The plan that gives each layer its scheme, with its loss and its costs.

        Raises:
            LayerError: a layer has no scheme, or a name is no layer's.
            SchemeError: a scheme is not among its layer's choices.
        """
        for name in schemes:
            self.layer(name)
        chosen = {}
        for layer in self.layers:
            if layer.name not in schemes:
                raise LayerError(f"the plan has no scheme for layer '{layer.name}'; add one")
            chosen[layer.name] = layer.choice(schemes[layer.name])
        found = {name: choice.scheme for name, choice in chosen.items()}
        changes = self.changes or ChangeCosts((), {})
        count = changes.count(found)
        return Plan(
            schemes=found,
            loss=math.fsum(choice.loss for choice in chosen.values()),
            costs={
                metric: math.fsum(
                    (
                        self.fixed.get(metric, 0.0),
                        count * changes.costs.get(metric, 0.0),
                        *(choice.costs[metric] for choice in chosen.values()),
                    )
                )
                for metric in self.metrics
            },
            method=method,
            gap=gap,
            evaluated=evaluated,
        )

    def fits(self, plan: Plan, budgets: Sequence[Budget]) -> bool:
        """Whether a plan keeps every budget (to the rounding of a sum of floats)."""
        return all(
            plan.costs[metric] <= limit + ROUNDING * limit
            for metric, limit in self.limits(budgets).items()
        )

    def levels(self, budgets: Sequence[Budget]) -> tuple[Levels, ...]:
        """The layers' choices as arrays, in one order whatever order they were given in.

        Layers are sorted by name; levels by loss, then costs, then the scheme's text. So ties
        between equally good plans are always broken alike.
        """
        metrics = list(self.limits(budgets))
        together = self.changes is not None and any(map(self.changes.costs.get, metrics))
        found = []
        for layer in sorted(self.layers, key=lambda one: one.name):
            rows = sorted(
                layer.choices,
                key=lambda one: (one.loss, *(one.costs[m] for m in metrics), str(one.scheme)),
            )
            keys = np.array(
                [(one.loss, *(one.costs[m] for m in metrics)) for one in rows], dtype=np.float64
            )
            sparse = np.array([together and one.scheme.skips_zeros for one in rows], dtype=np.bool_)
            # A worse choice may be worth taking where it is like its neighbours.
            dominated = np.zeros(len(rows), dtype=np.bool_)
            for alike in (sparse, ~sparse):
                dominated[alike] = _dominated(keys[alike])
            kept = np.flatnonzero(~dominated)
            found.append(
                Levels(
                    layer=layer.name,
                    schemes=tuple(rows[index].scheme for index in kept),
                    losses=keys[kept, 0],
                    costs=keys[kept, 1:],
                    sparse=sparse[kept],
                )
            )
        return tuple(found)

    def chain(self, levels: Sequence[Levels], budgets: Sequence[Budget]) -> Chain | None:
        """What changes between these levels of neighbours cost; None where they cost nothing."""
        if self.changes is None:
            return None
        cost = np.array([self.changes.costs.get(budget.metric, 0.0) for budget in budgets])
        if not cost.any():
            return None
        places = {one.layer: place for place, one in enumerate(levels)}
        neighbours = tuple((places[one], places[other]) for one, other in self.changes.neighbours)
        return Chain(neighbours, tuple(one.sparse for one in levels), cost)

    def rooms(self, budgets: Sequence[Budget]) -> tuple[Array, Array]:
        """What the layers together may cost, (budgets,), and the rounding allowed, (budgets,)."""
        limits = self.limits(budgets)
        rooms = [limit - self.fixed.get(metric, 0.0) for metric, limit in limits.items()]
        return np.array(rooms), ROUNDING * np.array(list(limits.values()))


def counted_costs(cost: LayerCost) -> dict[Metric, float]:
    """A layer's counted costs: all metrics but latency."""
    return {
        Metric.MACS: float(cost.macs_left),
        Metric.BOPS: float(cost.bops),
        Metric.BIT_OPERATIONS: float(cost.bit_operations),
        Metric.SIZE: float(cost.weight_bytes),
    }


def _names(metrics: Iterable[Metric]) -> str:
    found = set(metrics)
    return ", ".join(metric.value for metric in Metric if metric in found) or "no metric"


def _dominated(keys: Array) -> NDArray[np.bool_]:
    """Which rows another row is no worse than anywhere, and better somewhere or earlier."""
    no_worse = (keys[:, None, :] <= keys[None, :, :]).all(-1)  # [a, b]: a is no worse than b
    same = no_worse & no_worse.T
    earlier = np.triu(np.ones(same.shape, dtype=bool), 1)
    found: NDArray[np.bool_] = np.any(no_worse & (~same | earlier), axis=0)
    return found
