"""Budgets: how many times less than the dense network a plan may cost.

    budgets := budget ("," budget)*
    budget  := metric ":" FACTOR "x"                        macs:3x, bops:12x, size:6x, latency:4x

A budget `metric:Fx` allows at most dense cost / F of that metric. Several budgets hold at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from obc_deploy.errors import BudgetError


class Metric(Enum):
    """What a network costs, for one sample."""

    MACS = "macs"
    """Multiply-accumulates with a weight that is left."""
    BOPS = "bops"
    """MACs times the wider of weight and activation bits: OBC's count, linear in the bits."""
    BIT_OPERATIONS = "bit_operations"
    """MACs times weight bits times activation bits."""
    SIZE = "size"
    """Bytes of the weights."""
    LATENCY = "latency"
    """Milliseconds, measured on the machine and the runtime that the plan is for."""


_METRICS = ", ".join(metric.value for metric in Metric)
GRAMMAR = (
    "a budget is a metric and how many times less than dense it may cost, e.g. 'macs:3x' "
    f"(metrics: {_METRICS}; several joined by commas)"
)

_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?")


@dataclass(frozen=True)
class Budget:
    """At most 1 / `factor` of the dense network's cost.

    Attributes:
        metric: what is limited.
        factor: how many times less than dense, above 1.
    """

    metric: Metric
    factor: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise BudgetError(f"factor {self.factor} of budget '{self.metric.value}' is not finite")
        if self.factor <= 1.0:
            raise BudgetError(
                f"budget '{self}' asks for {self.factor:g} times less than dense; a factor is "
                f"above 1, e.g. '{self.metric.value}:2x' for half the cost"
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read one budget's text.

        Raises:
            BudgetError: the text does not follow the grammar, or its factor is not above 1.
        """
        name, colon, factor = (part.strip() for part in text.strip().partition(":"))
        if not colon:
            raise BudgetError(f"cannot read budget '{text}': {GRAMMAR}")
        metric = next((metric for metric in Metric if metric.value == name), None)
        if metric is None:
            raise BudgetError(f"no metric '{name}' in budget '{text}'; the metrics are {_METRICS}")
        if not factor.endswith("x") or not _NUMBER.fullmatch(factor[:-1]):
            raise BudgetError(
                f"'{factor}' in budget '{text}' is not a number of times less than dense; "
                f"write e.g. '{name}:3x'"
            )
        return cls(metric, float(factor[:-1]))

    def __str__(self) -> str:
        return f"{self.metric.value}:{repr(float(self.factor)).removesuffix('.0')}x"

    def limit(self, dense: float) -> float:
        """The most that may be spent, in the metric's unit, where the dense network costs `dense`.

        Raises:
            BudgetError: the dense cost is not finite, or not above 0.
        """
        if not math.isfinite(dense) or dense <= 0.0:
            raise BudgetError(
                f"budget '{self}' needs a dense {self.metric.value} cost above 0, got {dense:g}; "
                "measure the dense network first"
            )
        return dense / self.factor


Budgets: TypeAlias = str | Budget | Iterable[str | Budget]
"""One budget or several, as text or as instances."""


def as_budgets(budgets: Budgets) -> tuple[Budget, ...]:
    """Budgets from themselves, from comma separated text, or from a list of either.

    Raises:
        BudgetError: a text that cannot be read, no budget at all, or two for one metric.
    """
    parts = (budgets,) if isinstance(budgets, str | Budget) else tuple(budgets)
    found: list[Budget] = []
    for part in parts:
        texts = part.split(",") if isinstance(part, str) else (part,)
        found += (text if isinstance(text, Budget) else Budget.parse(text) for text in texts)
    if not found:
        raise BudgetError(f"no budget given: {GRAMMAR}")
    for index, budget in enumerate(found):
        for other in found[:index]:
            if other.metric is budget.metric:
                stricter = max(budget, other, key=lambda one: one.factor)
                raise BudgetError(
                    f"'{other}' and '{budget}' both limit {budget.metric.value}; "
                    f"keep the stricter one, '{stricter}'"
                )
    return tuple(found)
