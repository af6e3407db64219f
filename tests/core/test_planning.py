"""From a budget to a compressed model: database, probes, plan, hand-over."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_networks import Plain, Residual, Upsampling, build, samples

from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress
from obc_deploy.database import as_families
from obc_deploy.errors import BudgetError, DatabaseError, LatencyError, LayerError
from obc_deploy.latency import LatencyTable, network_key
from obc_deploy.layerwise import set_matrix
from obc_deploy.planning import (
    PlanSettings,
    build_database,
    database_folder,
    estimate,
    layer_choices,
    make_planner,
    planner_for,
)
from obc_deploy.schemes import DENSE, Scheme
from obc_deploy.search import ChangeCosts, Metric
from obc_deploy.stitching import StitchedNetwork
from obc_deploy.targets import DEEPSPARSE

KIND = Residual
X = samples(KIND, 48)


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(build(KIND), (X, np.arange(48) % 10), batch_size=24)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return PlanSettings(
        database=tmp_path_factory.mktemp("plans") / "database",
        families=as_families("block4,2:4,dense"),
        search_seconds=0.0,
    )


@pytest.fixture(scope="module")
def planner(calibrated, settings):
    return make_planner(calibrated, settings)


def outputs(module, x=X):
    with torch.no_grad():
        return module(torch.from_numpy(x)).double()


def test_stitching_nothing_loses_nothing(planner) -> None:
    assert planner.stitched.loss({}) == pytest.approx(0.0, abs=1e-12)


def test_the_stitched_loss_is_the_divergence_of_the_classes(calibrated, planner) -> None:
    """Residual has no batch norm: the stitched network is the network with other weights."""
    schemes = {"second": Scheme.parse("block4@0.9015"), "third": Scheme.parse("block4@0.9015")}
    network = calibrated.network.copy()
    for layer in calibrated.layers:
        if layer.name in schemes:
            form = planner.database.load(layer.name, schemes[layer.name])
            set_matrix(network, layer, form.weight)
    p = outputs(calibrated.network.module).softmax(1)
    q = outputs(network.module).softmax(1)
    wanted = float((p * (p / q).log()).sum(1).mean())
    assert wanted > 1e-6
    assert planner.stitched.loss(schemes) == pytest.approx(wanted, rel=1e-3)
    # And back: the network remembers no earlier plan.
    assert planner.stitched.loss({}) == pytest.approx(0.0, abs=1e-12)


def test_other_outputs_are_compared_by_their_squares(tmp_path) -> None:
    kind = Upsampling
    calibrated = calibrate(build(kind), samples(kind, 16))
    settings = PlanSettings(tmp_path, as_families("w4,dense"), search_seconds=0.0)
    planner = make_planner(calibrated, settings)
    network = calibrated.network.copy()
    layer = next(layer for layer in calibrated.layers if layer.name == "up")
    set_matrix(network, layer, planner.database.load("up", "w4").weight)
    x = samples(kind, 16)
    dense, found = outputs(calibrated.network.module, x), outputs(network.module, x)
    wanted = float((dense - found).square().sum() / dense.square().sum())
    assert planner.stitched.loss({"up": Scheme.parse("w4")}) == pytest.approx(wanted, rel=1e-4)


def test_sensitivities_are_losses_of_single_layers_over_their_errors(planner) -> None:
    name = "second"
    errors = planner.database.errors(name)
    found = {
        planner.stitched.loss({name: scheme}) / error
        for scheme, error in errors.items()
        if error > 0.0
    }
    assert any(planner.sensitivities[name] == pytest.approx(one, rel=1e-6) for one in found)
    assert all(one >= 0.0 for one in planner.sensitivities.values())


@pytest.mark.parametrize("budget", ["macs:1.5x", "macs:2x", "size:1.8x", "macs:1.4x,size:1.5x"])
def test_plans_keep_their_budgets_and_beat_every_uniform_scheme(planner, budget) -> None:
    found = planner.find(budget)
    for one in found.budgets:
        assert found.factors[one.metric] >= one.factor * (1 - 1e-9)
    for layer in planner.space.layers:
        for choice in layer.choices:
            schemes = planner.uniform(choice.scheme)
            uniform = planner.space.plan(schemes)
            if planner.space.fits(uniform, found.budgets):
                assert found.plan.loss <= uniform.loss + 1e-12


def test_the_search_is_never_worse_than_its_start(planner) -> None:
    searching = replace(planner, settings=replace(planner.settings, search_seconds=2.0))
    found = searching.find("macs:2x")
    assert found.refinement is not None
    record = found.record()
    assert record.calibration_loss <= record.start_loss
    assert record.evaluations >= 1
    assert planner.stitched.loss(found.plan.schemes) == pytest.approx(record.calibration_loss)


def test_first_and_last_layer_keep_their_weights(planner, calibrated, settings) -> None:
    assert planner.edges == ("first", "head")
    found = planner.find("macs:1.6x")
    assert found.plan.schemes["first"].pattern is None
    assert found.plan.schemes["head"].pattern is None
    free = layer_choices(calibrated, None, replace(settings, free_edges=True))
    assert any(scheme.pattern for scheme in free["head"])
    assert any(
        scheme.quantization is None for scheme in layer_choices(calibrated, None, settings)["first"]
    )


def test_named_layers_are_not_searched(calibrated, settings) -> None:
    fixed = {"second": Scheme.parse("w4"), "first": DENSE}
    choices = layer_choices(calibrated, None, replace(settings, fixed=fixed))
    assert choices["second"] == (Scheme.parse("w4"),)
    assert choices["first"] == (DENSE,)
    assert len(choices["third"]) > 10


def test_compressing_by_a_plan_uses_the_databases_layers(planner, calibrated) -> None:
    found = planner.find("macs:2x")
    planner.hand_over(found.plan.schemes)
    made = compress(calibrated, plan=found, baselines=False)
    assert made.scheme == "macs:2x"
    assert made.costs.macs <= made.costs.dense_macs / 2 * (1 + 1e-9)
    assert made.manifest.plan is not None
    assert made.manifest.plan.factors["macs"] == pytest.approx(
        made.costs.dense_macs / made.costs.macs, rel=0.02
    )
    for record in made.manifest.layers:
        assert record.scheme == str(found.plan.schemes[record.name])
    for name, scheme in found.plan.schemes.items():
        if scheme.pattern is not None:
            stored = planner.database.load(name, scheme)
            assert torch.equal(made.forms[name].mask, stored.mask)


def test_a_budget_alone_is_enough(calibrated, settings) -> None:
    made = compress(calibrated, budget="macs:1.5x", plan_settings=settings, baselines=False)
    assert made.costs.dense_macs / made.costs.macs >= 1.5 * (1 - 1e-9)
    assert made.manifest.plan.budgets == "macs:1.5x"


def test_a_second_build_solves_nothing(calibrated, settings, planner) -> None:
    choices = layer_choices(calibrated, None, settings)
    assert estimate(calibrated, choices, settings).missing == 0
    said = []
    build_database(calibrated, choices, settings, progress=lambda what, share: said.append(what))
    assert not any(what.startswith("database:") for what in said)


def test_the_database_of_another_model_is_refused(settings, planner) -> None:
    other = calibrate(build(KIND, seed=5), X, batch_size=24)
    choices = layer_choices(other, None, settings)
    with pytest.raises(DatabaseError, match="other weights"):
        build_database(other, choices, settings)


def test_the_cache_tells_models_and_samples_apart(calibrated, settings, monkeypatch, tmp_path):
    monkeypatch.setenv("OBC_DEPLOY_CACHE", str(tmp_path))
    unnamed = replace(settings, database=None)
    other = calibrate(build(KIND, seed=5), X, batch_size=24)
    fewer = calibrate(build(KIND), X[:40], batch_size=24)
    folders = {database_folder(one, unnamed) for one in (calibrated, other, fewer)}
    assert len(folders) == 3
    assert all(folder.parent == tmp_path / "databases" for folder in folders)
    assert database_folder(calibrated, unnamed) in folders


def test_a_budget_too_far_says_what_is_reachable(planner) -> None:
    with pytest.raises(BudgetError, match=r"best reachable is macs:.*x, because"):
        planner.find("macs:500x")


def test_latency_needs_a_target(calibrated, settings) -> None:
    with pytest.raises(BudgetError, match="--target"):
        planner_for(calibrated, [Metric.LATENCY], settings)


def test_a_model_without_layers_is_refused(settings) -> None:
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x)

    calibrated = calibrate(Nothing(), X)
    with pytest.raises(LayerError, match="no layers"):
        make_planner(calibrated, settings)


def test_latencies_come_from_the_table(tmp_path) -> None:
    kind = Plain
    calibrated = calibrate(build(kind), samples(kind))
    families = as_families("block4+w8a8,w8a8")
    settings = PlanSettings(tmp_path, families, search_seconds=0.0)
    choices = layer_choices(calibrated, DEEPSPARSE, settings, latency=True)
    times = {
        name: {str(scheme): 1.0 + scheme.density for scheme in schemes}
        for name, schemes in choices.items()
    }
    table = LatencyTable(
        target="deepsparse", runtime="deepsparse", runtime_version="1", threads=1, batch_size=1,
        machine={}, network=network_key(calibrated.layers), layers=times, fixed_ms=0.5,
        dense_ms=13.0,
    )  # fmt: skip
    planner = make_planner(calibrated, settings, target=DEEPSPARSE, table=table)
    found = planner.find("latency:2x")
    # conv1 and fc are the edges: 2 ms each; so conv2 may take 6.5 - 0.5 - 4 = 2 ms: dense.
    assert str(found.plan.schemes["conv2"]) == "w8a8"
    found = planner.find("latency:2.3x")
    assert found.plan.costs[Metric.LATENCY] <= 13.0 / 2.3
    assert found.plan.costs[Metric.LATENCY] == pytest.approx(table.predict(found.plan.schemes))
    assert found.record().predicted_ms == pytest.approx(table.predict(found.plan.schemes))
    changing = table.model_copy(update={"change_ms": 0.125})
    planner = make_planner(calibrated, settings, target=DEEPSPARSE, table=changing)
    assert planner.space.changes == ChangeCosts(changing.neighbours, {Metric.LATENCY: 0.125})
    lacking = table.model_copy(update={"layers": {**times, "conv2": {}}})
    with pytest.raises(LatencyError, match="conv2"):
        make_planner(calibrated, settings, target=DEEPSPARSE, table=lacking)


@pytest.mark.parametrize(("latency", "fewest"), [(False, 0.1), (True, DEEPSPARSE.skips_from)])
def test_zeros_that_are_too_few_to_be_skipped_are_no_choice_for_latency(latency, fewest) -> None:
    calibrated = calibrate(build(Plain), samples(Plain))
    settings = PlanSettings(families=as_families("block4+w8a8,w8a8"))
    schemes = layer_choices(calibrated, DEEPSPARSE, settings, latency=latency)["conv2"]
    assert "w8a8" in map(str, schemes)
    least = min(1.0 - scheme.density for scheme in schemes if scheme.skips_zeros)
    assert fewest - 1e-9 <= least < fewest + 0.05


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_search_times_are_times(seconds: float) -> None:
    with pytest.raises(BudgetError, match="search time"):
        PlanSettings(search_seconds=seconds)


def test_few_samples_are_enough_to_be_judged_on(calibrated, planner) -> None:
    one = StitchedNetwork(calibrated, planner.database, calibrated.samples.take(1))
    assert one.loss({"second": Scheme.parse("2:4")}) > 0.0
