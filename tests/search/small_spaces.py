"""Small search spaces that brute force can go through."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from obc_deploy.schemes import Scheme, Unstructured
from obc_deploy.search import Choice, LayerChoices, Metric, SearchSpace

METRICS = (Metric.MACS, Metric.SIZE, Metric.LATENCY)


def scheme(index, count):
    return Scheme() if index == 0 else Scheme(Unstructured(index / count))


def space_of(rows, *, metrics=METRICS, fixed=None):
    """rows: for each layer its choices as (loss, cost, ...); the first one is dense."""
    layers = tuple(
        LayerChoices(
            f"layer{number}",
            tuple(
                Choice(scheme(index, len(row)), loss, dict(zip(metrics, costs, strict=True)))
                for index, (loss, *costs) in enumerate(row)
            ),
        )
        for number, row in enumerate(rows)
    )
    return SearchSpace(layers, fixed=fixed or {})


@st.composite
def spaces(draw, whole=False, metrics=METRICS):
    cost = st.integers(0, 30).map(float) if whole else st.floats(0.01, 30.0)
    dense = st.integers(20, 40).map(float) if whole else st.floats(20.0, 40.0)
    loss = st.integers(1, 20).map(float) if draw(st.booleans()) else st.floats(1e-3, 20.0)
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        others = st.tuples(loss, *[cost] * len(metrics))
        row = [(0.0, *(draw(dense) for _ in metrics))]
        rows.append(row + draw(st.lists(others, max_size=4)))
    fixed = {metrics[0]: float(draw(st.integers(0, 10)))} if draw(st.booleans()) else {}
    return space_of(rows, metrics=metrics, fixed=fixed)


def all_plans(space, budgets=()):
    """Every plan that keeps the budgets."""
    for picks in itertools.product(*(layer.choices for layer in space.layers)):
        names = (layer.name for layer in space.layers)
        plan = space.plan(dict(zip(names, (pick.scheme for pick in picks), strict=True)))
        if not budgets or space.fits(plan, budgets):
            yield plan
