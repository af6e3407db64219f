"""Small search spaces that brute force can go through."""

from __future__ import annotations

import itertools
from itertools import pairwise

from hypothesis import strategies as st

from obc_deploy.schemes import Scheme, Unstructured
from obc_deploy.search import ChangeCosts, Choice, LayerChoices, Metric, SearchSpace

METRICS = (Metric.MACS, Metric.SIZE, Metric.LATENCY)


def scheme(index, count, *, kinds=False):
    """The first is dense; the others prune, or every second one quantizes where there are kinds."""
    if index == 0:
        return Scheme()
    if kinds and index % 2 == 0:
        return Scheme.parse(f"w{index}a8")
    return Scheme(Unstructured(index / count))


def space_of(rows, *, metrics=METRICS, fixed=None, changes=None):
    """rows: for each layer its choices as (loss, cost, ...); the first one is dense."""
    layers = tuple(
        LayerChoices(
            f"layer{number}",
            tuple(
                Choice(
                    scheme(index, len(row), kinds=changes is not None),
                    loss,
                    dict(zip(metrics, costs, strict=True)),
                )
                for index, (loss, *costs) in enumerate(row)
            ),
        )
        for number, row in enumerate(rows)
    )
    return SearchSpace(layers, fixed=fixed or {}, changes=changes)


@st.composite
def spaces(draw, whole=False, metrics=METRICS, changing=None):
    """With changes between dense and sparse neighbours, without, or (None) with or without."""
    cost = st.integers(0, 30).map(float) if whole else st.floats(0.01, 30.0)
    dense = st.integers(20, 40).map(float) if whole else st.floats(20.0, 40.0)
    loss = st.integers(1, 20).map(float) if draw(st.booleans()) else st.floats(1e-3, 20.0)
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        others = st.tuples(loss, *[cost] * len(metrics))
        row = [(0.0, *(draw(dense) for _ in metrics))]
        rows.append(row + draw(st.lists(others, max_size=4)))
    fixed = {metrics[0]: float(draw(st.integers(0, 10)))} if draw(st.booleans()) else {}
    changes = None
    if draw(st.booleans()) if changing is None else changing:
        order = draw(st.permutations([f"layer{number}" for number in range(len(rows))]))
        apart = draw(st.sets(st.integers(0, len(rows))))
        neighbours = [pair for place, pair in enumerate(pairwise(order)) if place not in apart]
        change = st.integers(0, 8).map(float) if whole else st.floats(0.0, 8.0)
        changes = ChangeCosts(tuple(neighbours), {metric: draw(change) for metric in metrics})
    return space_of(rows, metrics=metrics, fixed=fixed, changes=changes)


def all_plans(space, budgets=()):
    """Every plan that keeps the budgets."""
    for picks in itertools.product(*(layer.choices for layer in space.layers)):
        names = (layer.name for layer in space.layers)
        plan = space.plan(dict(zip(names, (pick.scheme for pick in picks), strict=True)))
        if not budgets or space.fits(plan, budgets):
            yield plan
