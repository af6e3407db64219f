"""What the solver's time is reckoned from: operations of each scheme, rates that are positive."""

from __future__ import annotations

import math

import pytest
import torch

from obc_deploy import native
from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress
from obc_deploy.schemes import as_scheme
from obc_deploy.solvers import SolverSettings
from obc_deploy.solvers.estimate import (
    LayerShape,
    Work,
    estimate_seconds,
    layer_work,
    measure_rates,
    operations,
)

ROWS, COLS = 8, 96
TRACE = ROWS * COLS**3 / 3


def work(*texts, **more):
    schemes = tuple(as_scheme(text) for text in texts)
    return layer_work(LayerShape(ROWS, COLS, schemes, **more), SolverSettings(native=False))


def test_a_trace_is_a_third_of_the_cube_for_each_row():
    assert work("unstructured@0.5").updates == pytest.approx(TRACE)
    assert work("block4@0.9").updates == pytest.approx(TRACE)
    assert work("block4x2@0.9").updates == pytest.approx(TRACE / 2)  # two rows, one inverse
    assert work("w4").updates == pytest.approx(TRACE)
    assert work("2:4").updates < TRACE
    assert work("dense").updates == 0


def test_levels_of_one_kind_share_a_trace_and_kinds_do_not():
    one = work("unstructured@0.5").updates
    assert work("unstructured@0.5", "unstructured@0.9").updates == pytest.approx(one)
    assert work("unstructured@0.5", "block4@0.5").updates == pytest.approx(2 * one)
    assert work("w4a8", "w4").updates == pytest.approx(one)
    assert work("w4", "w3").updates == pytest.approx(2 * one)


def test_a_level_costs_one_solve_of_what_is_fewer():
    few, many = work("unstructured@0.9"), work("unstructured@0.1")
    assert few.solves == pytest.approx(many.solves)
    assert work("unstructured@0.5").solves == pytest.approx(ROWS * (COLS / 2) ** 3 / 3)


def test_survivors_have_inverses_and_runs_of_their_own():
    both, pruned = work("2:4+w4"), work("2:4")
    assert both.inverses - pruned.inverses == pytest.approx(ROWS * (COLS / 2) ** 3)
    assert both.updates - pruned.updates == pytest.approx(TRACE / 8)
    left = work("2:4+w4", pruned=True)
    assert left.updates == pytest.approx(both.updates - pruned.updates)


@pytest.mark.parametrize("rows_are_native", [None, False])
def test_two_factorizations_serve_all_levels(rows_are_native):
    texts = [f"unstructured@0.{hundredth}" for hundredth in range(20, 81, 5)]
    schemes = tuple(as_scheme(text) for text in texts)
    settings = SolverSettings(native=rows_are_native)
    factored = layer_work(LayerShape(ROWS, COLS, schemes), settings)
    assert factored.solves == pytest.approx(TRACE * (0.45**3 + 0.5**3))
    assert factored.updates == pytest.approx(TRACE)


@pytest.mark.skipif(not native.is_available(), reason="the compiled solvers are not built here")
def test_compiled_rows_hand_the_survivors_of_n_m_over():
    schemes = tuple(as_scheme(text) for text in ("2:4", "2:4+w4", "2:4+w8"))
    handed = layer_work(LayerShape(ROWS, COLS, schemes), SolverSettings())
    assert handed.updates == pytest.approx(TRACE * (7 / 8 + 2 / 8))
    assert handed.solves == 0
    assert handed.inverses == pytest.approx(3 * ROWS * COLS**2)


@pytest.mark.skipif(not native.is_available(), reason="the compiled solvers are not built here")
@pytest.mark.parametrize(("sparsity", "eliminated"), [(0.25, True), (0.5, True), (0.75, False)])
def test_compiled_rows_eliminate_what_is_pruned_where_most_survives(sparsity, eliminated):
    text = f"unstructured@{sparsity}+w8"
    both = layer_work(LayerShape(ROWS, COLS, (as_scheme(text),)), SolverSettings())
    left = (1 - sparsity) ** 3
    errors = ROWS * COLS**2
    assert both.updates == pytest.approx(TRACE * (2 if eliminated else 1 + left))
    assert both.inverses == pytest.approx(errors + (0 if eliminated else 3 * TRACE * left))


def test_shortcuts_of_eight_bits_take_no_trace():
    schemes = tuple(as_scheme(text) for text in ("w8", "block4@0.5", "block4@0.5+w8", "w4"))
    shape = LayerShape(ROWS, COLS, schemes)
    brief = layer_work(shape, SolverSettings(native=False, shortcuts=True))
    assert brief.updates == pytest.approx(2 * TRACE)
    assert brief.searched == 3 * ROWS * COLS
    # Four errors of forms, two more to decide by, each two products; products and one factor.
    products = 2 * (4 + 2) + 2
    assert brief.inverses == pytest.approx(products * ROWS * COLS**2 + COLS**3 / 3)
    assert brief.calls == pytest.approx(4 + COLS / 20)


def test_works_add_up():
    assert Work(1, 2, 3, 4, 5, 6, 7) + Work(1, 1, 1, 1, 1, 1, 1) == Work(2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize("rows_are_native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_are_positive_and_an_estimate_grows_with_the_layer(dtype, rows_are_native):
    settings = SolverSettings(dtype=dtype, native=rows_are_native)
    rates = measure_rates(64, settings)
    for rate in (rates.updates, rates.visits, rates.doubles, rates.factors, rates.searches):
        assert 0 < rate < math.inf
    schemes = (as_scheme("2:4+w4"),)
    small = rates.seconds(layer_work(LayerShape(64, 64, schemes), settings))
    large = rates.seconds(layer_work(LayerShape(64, 640, schemes), settings))
    assert 0 < small < large
    assert 0 < estimate_seconds([LayerShape(4, 16, schemes)], settings) < math.inf
    assert operations([LayerShape(64, 640, schemes)]) > operations([LayerShape(64, 64, schemes)])


def test_compress_says_how_long_solving_will_take(monkeypatch):
    monkeypatch.setattr("obc_deploy.layerwise._WORTH_ANNOUNCING", 1.0)
    samples = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    said = []

    def say(what, share):
        said.append(what)

    calibrated = calibrate(torch.nn.Linear(24, 8), samples, device="cpu")
    compress(calibrated, scheme="2:4", baselines=False, progress=say)
    assert any("1 layers to solve, about 0 s" in what for what in said)
    assert said.index("calibrating") > said.index("1 layers to solve, about 0 s")
