"""Neighbours that are not alike: where a layer with zeros to skip follows one without.

A runtime that computes neighbours as one where all or none of them skip zeros pays at each change
between the two along the network. So a layer's best level depends on what its neighbours have, and
a plan costs

    fixed + Σ cost(layer, choice) + cost of a change · neighbours of which one only skips zeros
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from obc_deploy.errors import BudgetError, LayerError
from obc_deploy.schemes import Scheme, changes_between
from obc_deploy.search.budgets import Metric

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class ChangeCosts:
    """What a plan costs more wherever a layer with zeros is next to one without.

    Attributes:
        neighbours: names of a layer and the next one. A layer has at most one on either side.
        costs: of one change, by metric; 0 where not named.
    """

    neighbours: tuple[tuple[str, str], ...]
    costs: Mapping[Metric, float]

    def __post_init__(self) -> None:
        for metric, cost in self.costs.items():
            if not math.isfinite(cost) or cost < 0.0:
                raise BudgetError(
                    f"{metric.value} cost {cost} of a change between dense and sparse layers is "
                    "not a number of 0 or more; measure it again"
                )
        following = dict(self.neighbours)
        if len(following) < len(self.neighbours) or len(set(following.values())) < len(following):
            raise LayerError("a layer has two neighbours on one side; give one at most")
        for start in following:
            name = start
            while name in following:
                name = following[name]
                if name == start:
                    raise LayerError(f"layer '{start}' is its own neighbour's neighbour in a ring")

    def count(self, schemes: Mapping[str, Scheme]) -> int:
        """Changes where the layers have these schemes."""
        return sum(
            changes_between((schemes[one], schemes[other])) for one, other in self.neighbours
        )


@dataclass(frozen=True)
class Chain:
    """Changes between neighbours, for layers that go by their places in a list.

    Attributes:
        neighbours: places of a layer and the next one.
        sparse: for each layer in the list, (choices,) whether it has zeros to skip.
        cost: (budgets,) of one change.
    """

    neighbours: tuple[tuple[int, int], ...]
    sparse: tuple[NDArray[np.bool_], ...]
    cost: Array

    @cached_property
    def order(self) -> tuple[int, ...]:
        """All places, each right behind the one that it follows where it follows one."""
        following = dict(self.neighbours)
        found: list[int] = []
        for start in sorted(set(range(len(self.sparse))) - set(following.values())):
            found.append(start)
            while found[-1] in following:
                found.append(following[found[-1]])
        return tuple(found)

    @cached_property
    def followers(self) -> frozenset[int]:
        """Places of layers that follow a neighbour."""
        return frozenset(second for _, second in self.neighbours)

    def count(self, indices: Sequence[int]) -> int:
        """Changes where each layer in the list has the choice of that index."""
        return sum(
            bool(self.sparse[one][indices[one]] != self.sparse[other][indices[other]])
            for one, other in self.neighbours
        )

    def around(self, indices: Sequence[int], layer: int) -> NDArray[np.int64]:
        """(choices,) changes to the neighbours of a layer, for each choice that it may have."""
        found = np.zeros(len(self.sparse[layer]), dtype=np.int64)
        for pair in self.neighbours:
            if layer in pair:
                other = pair[0] if pair[1] == layer else pair[1]
                found += self.sparse[layer] != self.sparse[other][indices[other]]
        return found
