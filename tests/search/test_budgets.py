"""The grammar of budgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obc_deploy.errors import BudgetError, ObcDeployError
from obc_deploy.search import Budget, Metric, as_budgets


@given(st.sampled_from(Metric), st.floats(1.0, 1e30, exclude_min=True))
def test_text_and_budget_are_one(metric, factor):
    budget = Budget(metric, factor)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "metric", "factor"),
    [
        ("macs:3x", Metric.MACS, 3.0),
        ("bops:12x", Metric.BOPS, 12.0),
        (" bit_operations : 20x ", Metric.BIT_OPERATIONS, 20.0),
        ("size:6.5x", Metric.SIZE, 6.5),
        ("latency:4x", Metric.LATENCY, 4.0),
    ],
)
def test_reads(text, metric, factor):
    assert Budget.parse(text) == Budget(metric, factor)


def test_several():
    both = (Budget(Metric.MACS, 3.0), Budget(Metric.LATENCY, 4.0))
    assert as_budgets("macs:3x, latency:4x") == both
    assert as_budgets(["macs:3x", both[1]]) == both
    assert as_budgets(both[0]) == both[:1]
    assert str(both[0]) == "macs:3x"
    assert both[0].limit(12.0) == 4.0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("macs", "cannot read budget 'macs'"),
        ("", "cannot read budget ''"),
        ("flops:3x", "no metric 'flops'"),
        ("macs:3", "'3' in budget 'macs:3'.*'macs:3x'"),
        ("macs:-3x", "'-3x'"),
        ("macs:nanx", "'nanx'"),
        ("macs:1e999x", "not finite"),
        ("macs:1x", "above 1"),
        ("macs:0.5x", "above 1"),
        ("macs:3x,macs:4x", "keep the stricter one, 'macs:4x'"),
        ("macs:3x,", "cannot read budget ''"),
        ([], "no budget"),
    ],
)
def test_refuses(text, match):
    with pytest.raises(BudgetError, match=match) as caught:
        as_budgets(text)
    assert isinstance(caught.value, ObcDeployError)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dense", [0.0, -1.0, float("nan"), float("inf")])
def test_needs_a_dense_cost(dense):
    with pytest.raises(BudgetError, match="dense macs cost above 0"):
        Budget(Metric.MACS, 2.0).limit(dense)
