"""Activation ranges against NumPy, and grids whose every code means what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from obc_deploy.activations import (
    HISTOGRAM_BINS,
    ActivationRange,
    RangeMethod,
    activation_grid,
    collect_ranges,
    grid_error,
)
from obc_deploy.capture import capture
from obc_deploy.data import Samples
from obc_deploy.errors import CalibrationError

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@given(FINITE, FINITE, st.integers(2, 8), st.booleans())
def test_grids_hold_zero_exactly_and_cover_their_range(one, other, bits, signed):
    interval = ActivationRange(min(one, other), max(one, other))
    grid = activation_grid(interval, bits=bits, signed=signed)
    assert grid.scale > 0
    assert np.float32(grid.scale) == grid.scale
    assert grid.code_min <= grid.zero_point <= grid.code_max
    assert grid.code_max - grid.code_min + 1 == 2**bits
    low = (grid.code_min - grid.zero_point) * grid.scale
    high = (grid.code_max - grid.zero_point) * grid.scale
    assert low <= 0.0 <= high
    # All of the range is within half a step of the grid.
    assert low <= interval.low + 0.501 * grid.scale
    assert high >= interval.high - 0.501 * grid.scale
    if signed:
        assert grid.zero_point == 0
    if min(one, other) >= 0 and not signed:
        assert grid.zero_point == 0


def test_ranges_too_narrow_for_float32_still_have_a_scale():
    assert activation_grid(ActivationRange(0.0, 0.0)).scale == pytest.approx(1 / 255)
    grid = activation_grid(ActivationRange(-1e-45, 1e-45))
    assert grid.scale >= np.finfo(np.float32).tiny


class Branches(nn.Module):
    def forward(self, x):
        return torch.relu(x), x * 2.0


def ranges(x, method, size=7, **options):
    network = capture(Branches(), (torch.from_numpy(x[:2]),))
    return collect_ranges(
        network, ["x", "relu", "mul"], Samples({"x": x}).batches(size), method=method, **options
    )


def data(count=50, shape=(300,), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, *shape)) ** 3 + 0.3).astype(np.float32)


def test_min_max_is_exact():
    x = data()
    found = ranges(x, RangeMethod.MIN_MAX)
    assert found["x"] == ActivationRange(float(x.min()), float(x.max()))
    assert found["relu"] == ActivationRange(0.0, float(x.max()))
    assert found["mul"] == ActivationRange(2 * float(x.min()), 2 * float(x.max()))


def test_ranges_include_zero():
    x = np.abs(data()) + 1.0
    for method in RangeMethod:
        assert ranges(x, method)["x"].low == 0.0
        assert ranges(-x, method)["x"].high == 0.0


@pytest.mark.parametrize("percentile", [99.99, 99.0, 90.0])
def test_percentile_is_numpys_to_a_histogram_bin(percentile):
    x = data()
    found = ranges(x, RangeMethod.PERCENTILE, percentile=percentile)
    tail = (100 - percentile) / 2
    wanted = np.percentile(x, [tail, 100 - tail], method="inverted_cdf")
    step = (float(x.max()) - float(x.min())) / HISTOGRAM_BINS
    assert found["x"].low == pytest.approx(wanted[0], abs=1.01 * step)
    assert found["x"].high == pytest.approx(wanted[1], abs=1.01 * step)
    # After a ReLU all of the tail is on one side.
    rectified = np.maximum(x, 0)
    wanted = np.percentile(rectified, percentile, method="inverted_cdf")
    step = float(rectified.max()) / HISTOGRAM_BINS
    assert found["relu"].low == 0.0
    assert found["relu"].high == pytest.approx(wanted, abs=1.01 * step)


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_is_never_worse_than_min_max(seed):
    x = data(seed=seed)
    wide, tight = ranges(x, RangeMethod.MIN_MAX), ranges(x, RangeMethod.MSE)
    for name, values in (("x", x), ("relu", np.maximum(x, 0)), ("mul", 2 * x)):
        flat = values.astype(np.float64).reshape(-1)
        errors = [
            grid_error(flat, np.ones_like(flat), activation_grid(found[name]))
            for found in (wide, tight)
        ]
        # Its histogram holds the centres of bins, not the values themselves.
        assert errors[1] <= errors[0] * 1.001
        assert wide[name].low <= tight[name].low <= tight[name].high <= wide[name].high


def test_least_squares_gives_up_an_outlier_for_the_rest():
    x = np.random.default_rng(0).standard_normal((50, 10_000)).astype(np.float32)
    x[3, 7] = 20.0
    wide, tight = ranges(x, RangeMethod.MIN_MAX)["x"], ranges(x, RangeMethod.MSE)["x"]
    assert wide.high == 20.0
    assert 4.0 < tight.high < 15.0
    flat = x.astype(np.float64).reshape(-1)
    ones = np.ones_like(flat)
    errors = [grid_error(flat, ones, activation_grid(found)) for found in (wide, tight)]
    assert errors[1] < 0.9 * errors[0]


def test_grid_error_by_hand():
    grid = activation_grid(ActivationRange(0.0, 3.0), bits=2)
    values = np.array([0.0, 1.25, 2.5, 7.0])
    # Grid 0 1 2 3; 2.5 rounds to even, 7 is clipped.
    assert grid_error(values, np.array([1.0, 2.0, 1.0, 1.0]), grid) == pytest.approx(
        2 * 0.25**2 + 0.5**2 + 4.0**2
    )


def test_rectified_values_get_unsigned_grids_at_zero():
    x = data()
    for method in RangeMethod:
        grid = activation_grid(ranges(x, method)["relu"])
        assert (grid.zero_point, grid.signed, grid.code_min) == (0, False, 0)


def test_batch_size_changes_nothing():
    x = data()
    for method in RangeMethod:
        assert ranges(x, method, size=3) == ranges(x, method, size=50)


class RootOfNegative(nn.Module):
    def forward(self, x):
        return torch.sqrt(x).abs() + 0.0


@pytest.mark.parametrize("method", list(RangeMethod))
def test_values_that_are_not_finite_are_an_error(method):
    x = np.array([[1.0, -1.0]] * 4, np.float32)
    network = capture(RootOfNegative(), (torch.from_numpy(x[:2]),))
    with pytest.raises(CalibrationError, match=r"the values of 'sqrt' reach nan .* pre-processing"):
        collect_ranges(network, ["sqrt"], Samples({"x": x}).batches(2), method=method)


def test_progress_ends_at_one():
    shares = []
    ranges(data(), RangeMethod.MSE, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
