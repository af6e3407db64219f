"""The cheapest plan within a drop of accuracy, where accuracy is a known function of the cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_networks import Residual, build, samples

from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress
from obc_deploy.database import as_families
from obc_deploy.errors import BudgetError, CalibrationError
from obc_deploy.manifest import Accuracy
from obc_deploy.max_drop import fastest_within
from obc_deploy.planning import PlanSettings, make_planner
from obc_deploy.search import Metric


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(build(Residual), (samples(Residual), np.arange(32) % 10))


@pytest.fixture(scope="module")
def planner(calibrated, tmp_path_factory):
    settings = PlanSettings(
        tmp_path_factory.mktemp("drop"), as_families("block4,dense"), search_seconds=0.0
    )
    return make_planner(calibrated, settings)


@pytest.fixture(scope="module")
def model(calibrated):
    return compress(calibrated, scheme="dense", baselines=False)


def losing(model, points):
    """A `make` whose accuracy falls by `points(factor)`; the model itself is of no matter."""

    def make(plan):
        drop = points(plan.factors[Metric.MACS])
        accuracy = Accuracy(dense=0.9, compressed=0.9 - drop / 100, samples=1000, source="known")
        return replace(
            model,
            manifest=model.manifest.model_copy(
                update={"accuracy": accuracy, "plan": plan.record()}
            ),
        )

    return make


@pytest.mark.parametrize("allowed", [0.3, 0.7, 1.5])
def test_the_largest_factor_within_the_drop_is_found(planner, model, allowed) -> None:
    make = losing(model, lambda factor: factor - 1.0)
    found = fastest_within(planner, allowed, make, metric=Metric.MACS, probes=12)
    factor = found.model.manifest.plan.factors["macs"]
    assert factor - 1.0 <= allowed
    # The next plan up loses too much: nothing kept was better, something dropped was near.
    dropped = [probe.factor for probe in found.probes if not probe.kept]
    assert min(dropped) <= factor * 1.25
    assert all(probe.factor <= factor for probe in found.probes if probe.kept)


def test_the_cheapest_plan_is_taken_where_it_keeps_the_accuracy(planner, model) -> None:
    found = fastest_within(planner, 1.0, losing(model, lambda factor: 0.0), metric=Metric.MACS)
    assert len(found.probes) == 2
    assert found.model.manifest.plan.factors["macs"] == max(p.factor for p in found.probes)


def test_the_dense_network_wins_where_nothing_keeps_the_accuracy(planner, model) -> None:
    found = fastest_within(planner, 1.0, losing(model, lambda factor: 5.0), metric=Metric.MACS)
    assert found.model is None
    assert [probe.kept for probe in found.probes] == [False]


def test_gaining_accuracy_is_allowed(planner, model) -> None:
    found = fastest_within(planner, 0.0, losing(model, lambda factor: -0.5), metric=Metric.MACS)
    assert found.model is not None


@pytest.mark.parametrize("allowed", [-0.1, float("nan"), float("inf")])
def test_drops_are_points(planner, model, allowed) -> None:
    with pytest.raises(BudgetError, match="points"):
        fastest_within(planner, allowed, losing(model, lambda factor: 0.0))


def test_without_labels_there_is_nothing_to_lose(planner, model) -> None:
    with pytest.raises(CalibrationError, match="--eval"):
        fastest_within(planner, 1.0, lambda plan: model, metric=Metric.MACS)
