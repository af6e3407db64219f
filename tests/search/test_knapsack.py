"""Integer programme and dynamic programme against brute force and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_spaces import METRICS, all_plans, space_of, spaces

from obc_deploy.costs import layer_cost
from obc_deploy.errors import BudgetError, LayerError, SchemeError
from obc_deploy.search import (
    Budget,
    ChangeCosts,
    LayerChoices,
    Metric,
    SearchSpace,
    best_reachable,
    counted_costs,
    solve_dynamic,
    solve_milp,
)

FACTORS = st.sampled_from([1.1, 1.5, 2.0, 3.0, 5.0, 20.0])


def least(plans):
    return min((plan.loss for plan in plans), default=None)


@settings(max_examples=120, deadline=None)
@given(spaces(), st.integers(1, 3), st.lists(FACTORS, min_size=3, max_size=3))
def test_milp_is_brute_force(space, count, factors):
    budgets = tuple(map(Budget, METRICS[:count], factors))
    expected = least(all_plans(space, budgets))
    if expected is None:
        with pytest.raises(BudgetError, match="cannot be met"):
            solve_milp(space, budgets)
        return
    plan = solve_milp(space, budgets)
    assert space.fits(plan, budgets)
    assert plan.loss == pytest.approx(expected, abs=1e-6)
    assert plan.gap == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=120, deadline=None)
@given(spaces(whole=True, metrics=METRICS[:1]), FACTORS)
def test_dynamic_is_brute_force_on_whole_costs(space, factor):
    budget = Budget(Metric.MACS, factor)
    expected = least(all_plans(space, (budget,)))
    if expected is None:
        with pytest.raises(BudgetError, match="cannot be met"):
            solve_dynamic(space, budget)
        return
    plan = solve_dynamic(space, budget)
    assert plan.loss == pytest.approx(expected, abs=1e-9)
    assert plan.gap == pytest.approx(0.0, abs=1e-12)
    assert solve_milp(space, budget).loss == pytest.approx(expected, abs=1e-6)


@settings(max_examples=120, deadline=None)
@given(spaces(metrics=METRICS[:1]), FACTORS, st.sampled_from([3, 10, 100, 5000]))
def test_dynamic_is_within_its_buckets(space, factor, buckets):
    budget = Budget(Metric.MACS, factor)
    plans = list(all_plans(space, (budget,)))
    if not plans:
        with pytest.raises(BudgetError, match="cannot be met"):
            solve_dynamic(space, budget, buckets=buckets)
        return
    # Rounding takes less than a bucket a layer and a change: nothing that leaves so much room is
    # better.
    least_costs = [min(c.costs[Metric.MACS] for c in layer.choices) for layer in space.layers]
    limit = space.limits((budget,))[Metric.MACS]
    width = (limit - math.fsum((space.fixed.get(Metric.MACS, 0.0), *least_costs))) / buckets
    rounded = len(space.layers) * (1 if space.changes is None else 2)
    tight = limit - width * rounded
    held = [one.loss for one in plans if one.costs[Metric.MACS] <= tight]
    if space.changes is not None and not held:
        # Rounding up may then leave no room for the changes that even the cheapest plan has.
        try:
            plan = solve_dynamic(space, budget, buckets=buckets)
        except BudgetError:
            return
    else:
        plan = solve_dynamic(space, budget, buckets=buckets)
    assert space.fits(plan, (budget,))
    assert plan.loss <= min(held, default=math.inf) + 1e-9
    best = least(plans)
    assert best - 1e-9 <= plan.loss
    assert plan.loss * (1.0 - plan.gap) <= best + 1e-9


@settings(max_examples=80, deadline=None)
@given(spaces(), st.lists(FACTORS, min_size=3, max_size=3))
def test_levels_leave_out_only_what_no_plan_needs(space, factors):
    budgets = tuple(map(Budget, METRICS, factors))
    dense = {budget.metric: space.dense_cost(budget.metric) for budget in budgets}
    kept = {one.layer: set(map(str, one.schemes)) for one in space.levels(budgets)}
    layers = tuple(
        LayerChoices(
            layer.name, tuple(one for one in layer.choices if str(one.scheme) in kept[layer.name])
        )
        for layer in space.layers
    )
    fewer = SearchSpace(layers, space.fixed, dense, space.changes)
    assert least(all_plans(fewer, budgets)) == least(all_plans(space, budgets))


@settings(max_examples=40, deadline=None)
@given(spaces(whole=True), FACTORS, st.randoms(use_true_random=False))
def test_order_of_the_input_breaks_no_tie(space, factor, shuffle):
    def turned(values):
        return tuple(shuffle.sample(values, len(values)))

    other = SearchSpace(
        turned([LayerChoices(one.name, turned(one.choices)) for one in space.layers]),
        space.fixed,
        changes=space.changes,
    )
    for solve, budgets in (
        (solve_milp, (Budget(Metric.MACS, factor), Budget(Metric.SIZE, factor))),
        (solve_dynamic, (Budget(Metric.MACS, factor),)),
    ):
        if any(all_plans(space, budgets)):
            assert solve(space, budgets).schemes == solve(other, budgets).schemes


def large_space(layers=54, levels=80):
    random_ = np.random.default_rng(0)
    rows = []
    for _ in range(layers):
        size, hurt = np.exp(random_.normal(0.0, 1.5, 2))
        shares = 0.94 ** np.arange(levels)
        wobble = np.exp(random_.normal(0.0, 0.05, levels))
        rows.append(
            [
                (float(hurt * w * (1 - s) ** 3), round(1e7 * size * s), size * (0.1 + 0.9 * s) * w)
                for s, w in zip(shares, wobble, strict=True)
            ]
        )
    return space_of(rows, metrics=(Metric.MACS, Metric.LATENCY), fixed={Metric.LATENCY: 0.5})


def test_large_problem():
    space = large_space()
    exact = solve_milp(space, "macs:3x")
    bucketed = solve_dynamic(space, "macs:3x")
    assert exact.gap == 0.0
    assert exact.loss <= bucketed.loss * (1 + 1e-9)
    assert bucketed.loss * (1 - bucketed.gap) <= exact.loss
    assert bucketed.loss <= exact.loss * 1.05
    both = solve_milp(space, "macs:3x,latency:2.5x")
    assert space.fits(both, (Budget(Metric.MACS, 3.0), Budget(Metric.LATENCY, 2.5)))
    assert both.loss >= exact.loss * (1 - 1e-9)


def rows_with_a_dense_layer():
    return [[(0.0, 10.0)], [(0.0, 90.0), (1.0, 45.0), (3.0, 10.0)]]


@pytest.mark.parametrize("solve", [solve_milp, solve_dynamic])
def test_budget_out_of_reach_says_what_is_reachable_and_why(solve):
    space = space_of(rows_with_a_dense_layer(), metrics=(Metric.MACS,), fixed={Metric.MACS: 5.0})
    with pytest.raises(BudgetError) as caught:
        solve(space, "macs:10x")
    text = str(caught.value)
    assert "'macs:10x' cannot be met" in text
    assert "best reachable is macs:4.2x" in text
    assert "layer0 can only be 'dense' (40% of the macs left)" in text
    assert "20% of the macs left belongs to no layer" in text
    assert "'layer1' (40% of it)" in text
    assert "\n" not in text
    (best,) = best_reachable(space, "macs:10x").values()
    assert best == pytest.approx(105 / 25)
    assert solve(space, "macs:4.2x").costs[Metric.MACS] == 25.0


def test_budgets_that_exclude_each_other():
    rows = [[(0.0, 10.0, 10.0), (1.0, 2.0, 8.0), (1.0, 8.0, 2.0), (1.0, 4.0, 4.0)]]
    space = space_of(rows, metrics=(Metric.MACS, Metric.SIZE))
    with pytest.raises(BudgetError) as caught:
        solve_milp(space, "macs:5x,size:2x")
    assert "cannot be met together" in str(caught.value)
    assert "macs:5x alone and macs:2.5x beside the others" in str(caught.value)
    assert "size:5x alone and size:1.25x beside the others" in str(caught.value)


def alternating_space(change):
    """Pruning the second and fourth of five layers is cheapest, where changes cost nothing."""
    rows = [[(0.0, 10.0), (3.0 - 2.0 * (n % 2), 4.0)] for n in range(5)]
    neighbours = tuple((f"layer{n}", f"layer{n + 1}") for n in range(4))
    return space_of(
        rows, metrics=(Metric.LATENCY,), changes=ChangeCosts(neighbours, {Metric.LATENCY: change})
    )


@pytest.mark.parametrize("solve", [solve_milp, solve_dynamic])
def test_changes_make_neighbours_alike(solve):
    def pruned(plan):
        return [number for number, one in enumerate(plan.schemes.values()) if one.skips_zeros]

    plan = solve(alternating_space(0.0), "latency:1.3x")
    assert pruned(plan) == [1, 3]
    assert plan.costs[Metric.LATENCY] == 38.0
    plan = solve(alternating_space(2.0), "latency:1.3x")
    assert plan.loss == 5.0  # three neighbours in a row, two changes
    assert plan.costs[Metric.LATENCY] == 2 * 10.0 + 3 * 4.0 + 2 * 2.0
    plan = solve(alternating_space(20.0), "latency:1.3x")
    assert pruned(plan) == [0, 1, 2, 3, 4]
    assert plan.costs[Metric.LATENCY] == 20.0


@pytest.mark.parametrize("solve", [solve_milp, solve_dynamic])
def test_budget_out_of_reach_counts_changes(solve):
    rows = [[(0.0, 10.0)], [(0.0, 10.0), (1.0, 2.0)], [(0.0, 10.0)]]
    neighbours = (("layer0", "layer1"), ("layer1", "layer2"))
    space = space_of(
        rows, metrics=(Metric.LATENCY,), changes=ChangeCosts(neighbours, {Metric.LATENCY: 1.0})
    )
    with pytest.raises(
        BudgetError, match=r"best reachable is latency:1\.25x.*8% is what dense and"
    ):
        solve(space, "latency:1.3x")
    (best,) = best_reachable(space, "latency:1.3x").values()
    assert best == pytest.approx(30 / 24)


def test_changes_of_bad_costs_or_other_layers():
    for cost in (-1.0, math.nan, math.inf):
        with pytest.raises(BudgetError, match="measure it again"):
            ChangeCosts((), {Metric.LATENCY: cost})
    with pytest.raises(LayerError, match="no layer 'other'"):
        space_of(
            rows_with_a_dense_layer(),
            metrics=(Metric.MACS,),
            changes=ChangeCosts((("layer0", "other"),), {}),
        )
    for neighbours in (
        (("a", "b"), ("a", "c")), (("a", "c"), ("b", "c")), (("a", "b"), ("a", "b")),
    ):  # fmt: skip
        with pytest.raises(LayerError, match="two neighbours on one side"):
            ChangeCosts(neighbours, {})
    for neighbours in ((("a", "a"),), (("a", "b"), ("b", "c"), ("c", "a"))):
        with pytest.raises(LayerError, match="in a ring"):
            ChangeCosts(neighbours, {})


def test_bad_input():
    space = space_of(rows_with_a_dense_layer(), metrics=(Metric.MACS,))
    with pytest.raises(BudgetError, match=r"latency of every layer.*'layer0'"):
        solve_milp(space, "latency:2x")
    with pytest.raises(BudgetError, match="takes one budget"):
        solve_dynamic(space, "macs:2x,size:2x")
    with pytest.raises(BudgetError, match="0 buckets"):
        solve_dynamic(space, "macs:2x", buckets=0)
    with pytest.raises(LayerError, match="no layer 'other'"):
        space.plan({"other": "dense"})
    with pytest.raises(LayerError, match="no scheme for layer 'layer1'"):
        space.plan({"layer0": "dense"})
    with pytest.raises(SchemeError, match="no choice 'w8a8'"):
        space.plan({"layer0": "w8a8", "layer1": "dense"})
    with pytest.raises(LayerError, match="not finite"):
        space_of([[(math.nan, 1.0)]], metrics=(Metric.MACS,))
    with pytest.raises(LayerError, match="0 or more"):
        space_of([[(0.0, -1.0)]], metrics=(Metric.MACS,))
    with pytest.raises(LayerError, match="no choice"):
        LayerChoices("empty", ())
    with pytest.raises(LayerError, match="no layers"):
        SearchSpace(())


def test_counted_costs():
    costs = counted_costs(layer_cost("conv", 1000, "2:4+w8a8", weights=100))
    assert costs == {
        Metric.MACS: 500.0, Metric.BOPS: 4000.0, Metric.BIT_OPERATIONS: 32000.0, Metric.SIZE: 50.0,
    }  # fmt: skip
