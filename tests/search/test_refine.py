"""Refinement: never worse, never over a budget, better where layers do not add up."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_spaces import all_plans, space_of, spaces

from obc_deploy.errors import BudgetError
from obc_deploy.search import Budget, Metric, Move, as_budgets, refine, solve_milp

MOVES = [(Move.MUTATION,), (Move.COEFFICIENTS,), (Move.MUTATION, Move.COEFFICIENTS)]


def chain_space():
    rows = [
        [(0.0, 16.0, 8.0), (0.1 + 0.02 * n, 8.0, 4.0), (0.3, 4.0, 3.0), (1.0 - 0.1 * n, 2.0, 1.0)]
        for n in range(5)
    ]
    return space_of(rows, metrics=(Metric.MACS, Metric.SIZE))


def chained(space):
    """A loss that neighbours make worse together: the additive optimum is not its optimum."""
    weights = (3.0, 0.2, 2.0, 0.1, 1.0)

    def evaluate(plan):
        losses = [space.layer(name).choice(scheme).loss for name, scheme in plan.schemes.items()]
        own = math.fsum(w * x for w, x in zip(weights, losses, strict=True))
        return own + math.fsum(8.0 * a * b for a, b in pairwise(losses))

    return evaluate


@pytest.mark.parametrize("budgets", ["macs:3x", "macs:3x,size:2.5x"])
def test_finds_the_optimum_of_a_loss_that_is_no_sum(budgets):
    space = chain_space()
    evaluate = chained(space)
    limits = as_budgets(budgets)
    best = min(map(evaluate, all_plans(space, limits)))
    found = refine(solve_milp(space, budgets), space, budgets, evaluate, evaluations=400)
    assert found.start.evaluated > best + 1e-6
    assert found.plan.evaluated == pytest.approx(best)
    assert found.plan.method == "milp, refined"


def test_a_uniform_plan_is_among_the_first():
    """Neighbours that are not alike are what is bad here: no sum of losses knows."""
    space = chain_space()

    def evaluate(plan):
        schemes = list(plan.schemes.values())
        return plan.loss + 100.0 * sum(a != b for a, b in pairwise(schemes))

    start = solve_milp(space, "macs:3x")
    found = refine(start, space, "macs:3x", evaluate, evaluations=5)
    tried = [one.plan for one in found.evaluations if one.move is Move.UNIFORM]
    same = [
        schemes
        for schemes in space.layers[0].choices
        if space.fits(
            space.plan({layer.name: schemes.scheme for layer in space.layers}),
            as_budgets("macs:3x"),
        )
    ]
    assert tried
    assert all(len(set(plan.schemes.values())) == 1 for plan in tried)
    assert len(tried) == min(3, len(same))
    assert [plan.loss for plan in tried] == sorted(plan.loss for plan in tried)
    assert found.plan.evaluated == min(evaluate(plan) for plan in tried) < evaluate(start)


def test_layers_without_a_scheme_take_one_with_fewer_zeros():
    space = space_of(
        [
            [(0.0, 10.0), (0.1, 6.0), (0.2, 3.0), (0.4, 2.0), (0.9, 1.0)],
            [(0.0, 10.0), (0.3, 5.0)],
            [(0.0, 10.0)],
        ],
        metrics=(Metric.MACS,),
    )
    start = solve_milp(space, "macs:1.5x")
    found = refine(start, space, "macs:1.5x", lambda plan: plan.loss, evaluations=20)
    tried = [list(one.plan.schemes.values()) for one in found.evaluations]
    uniform = [
        schemes
        for schemes, one in zip(tried, found.evaluations, strict=True)
        if one.move is Move.UNIFORM
    ]
    for first, second, third in uniform:
        assert third.is_dense
        assert second.density >= min(first.density, 0.5)
        assert second.is_dense == (first.density > 0.5)


@pytest.mark.parametrize("moves", MOVES)
def test_each_move_helps(moves):
    space = chain_space()
    evaluate = chained(space)
    found = refine(
        solve_milp(space, "macs:3x"), space, "macs:3x", evaluate, evaluations=60, moves=moves
    )
    assert found.plan.evaluated < found.start.evaluated
    assert {one.move for one in found.evaluations} <= {Move.START, *moves}


@settings(max_examples=40, deadline=None)
@given(spaces(), st.sampled_from(MOVES), st.integers(0, 99), st.booleans())
def test_never_worse_never_over_never_twice(space, moves, seed, nonsense):
    budgets = (Budget(Metric.MACS, 1.5), Budget(Metric.SIZE, 1.3))
    fitting = list(all_plans(space, budgets))
    if not fitting:
        return
    random = np.random.default_rng(seed)
    start = fitting[random.integers(len(fitting))]  # dominated choices and all
    bad = (math.nan, math.inf)

    def evaluate(plan):
        assert space.fits(plan, budgets)
        return float(random.choice(bad)) if nonsense and random.random() < 0.3 else random.random()

    shares = []
    found = refine(
        start, space, budgets, evaluate, evaluations=25, seed=seed, moves=moves,
        progress=shares.append,
    )  # fmt: skip
    tried = [tuple(one.plan.schemes.items()) for one in found.evaluations]
    assert len(set(tried)) == len(tried) <= 25
    assert tried[0] == tuple(start.schemes.items())
    assert found.evaluations[0].move is Move.START
    finite = [x.plan.evaluated for x in found.evaluations if math.isfinite(x.plan.evaluated)]
    if finite:
        assert found.plan.evaluated == min(finite)
    else:
        assert found.plan.schemes == start.schemes
    assert found.plan is next(x.plan for x in reversed(found.evaluations) if x.accepted)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@settings(max_examples=40, deadline=None)
@given(spaces(), st.sampled_from(MOVES), st.integers(0, 99), st.booleans())
def test_what_is_not_confirmed_is_not_taken(space, moves, seed, nonsense):
    budgets = (Budget(Metric.MACS, 1.5), Budget(Metric.SIZE, 1.3))
    start = next(all_plans(space, budgets), None)
    if start is None:
        return
    random = np.random.default_rng(seed)
    asked = []

    def confirm(plan):
        asked.append(plan)
        return math.nan if nonsense and random.random() < 0.3 else random.random()

    found = refine(
        start, space, budgets, lambda _: random.random(), confirm=confirm, evaluations=25,
        seed=seed, moves=moves,
    )  # fmt: skip
    best = (math.inf, math.inf)
    for one in found.evaluations:
        looks_better = one.move is Move.START or one.plan.evaluated < best[0]
        assert (one.confirmed is not None) == looks_better
        if one.confirmed is not None:
            known = one.confirmed if math.isfinite(one.confirmed) else math.inf
            assert one.accepted == (one.move is Move.START or known < best[1])
            if one.accepted:
                best = (one.plan.evaluated, known)
        else:
            assert not one.accepted
    assert found.plan.evaluated == best[0]
    assert [one.plan for one in found.evaluations if one.confirmed is not None] == asked


@pytest.mark.parametrize("budgets", ["macs:3x", "macs:3x,size:2.5x"])
def test_a_seed_says_it_all(budgets):
    space = chain_space()
    evaluate = chained(space)
    start = solve_milp(space, budgets)

    def run(seed):
        found = refine(start, space, budgets, evaluate, evaluations=40, seed=seed)
        return [(one.plan, one.move, one.accepted) for one in found.evaluations]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_ends_in_time():
    space = chain_space()
    start = solve_milp(space, "macs:3x")
    found = refine(start, space, "macs:3x", chained(space), seconds=1e-9)
    assert [one.move for one in found.evaluations] == [Move.START]
    assert found.plan.schemes == start.schemes
    found = refine(start, space, "macs:3x", chained(space), seconds=0.2)
    assert found.plan.evaluated <= found.start.evaluated
    assert len(found.evaluations) > 1


def test_bad_input():
    space = chain_space()
    start = solve_milp(space, "macs:2x")
    evaluate = chained(space)
    with pytest.raises(BudgetError, match="over 'macs:6x'"):
        refine(start, space, "macs:6x", evaluate, evaluations=5)
    with pytest.raises(BudgetError, match="no end"):
        refine(start, space, "macs:2x", evaluate)
    with pytest.raises(BudgetError, match="0 evaluations"):
        refine(start, space, "macs:2x", evaluate, evaluations=0)
    with pytest.raises(BudgetError, match="no time"):
        refine(start, space, "macs:2x", evaluate, seconds=0.0)
    with pytest.raises(BudgetError, match="no move"):
        refine(start, space, "macs:2x", evaluate, evaluations=5, moves=())
