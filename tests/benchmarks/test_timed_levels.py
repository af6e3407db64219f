"""Levels that stand for a grid."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obc_deploy.benchmarks.timed_levels import MOST_TIMED, between, timed_levels
from obc_deploy.database.levels import BLOCK4_LEVELS, sparsity_grid
from obc_deploy.errors import LatencyError
from obc_deploy.schemes import Scheme

GRID = [Scheme.parse(f"block4@{sparsity}+w8a8") for sparsity in sparsity_grid(BLOCK4_LEVELS)]
OTHERS = [Scheme.parse(text) for text in ("w8a8", "2:4+w8a8", "dense", "block4@0.5")]


def density(scheme: Scheme) -> float:
    return 1.0 - scheme.pattern.sparsity


@given(st.permutations(GRID + OTHERS))
def test_the_ends_of_a_grid_and_all_that_is_on_none_are_timed(schemes) -> None:
    timed = timed_levels([schemes])
    assert set(OTHERS) <= set(timed)
    mine = sorted(set(timed) & set(GRID), key=density)
    assert len(mine) == MOST_TIMED
    assert [mine[0], mine[-1]] == [min(GRID, key=density), max(GRID, key=density)]
    assert list(timed) == [scheme for scheme in schemes if scheme in timed]
    places = sorted(GRID.index(scheme) for scheme in mine)
    steps = {b - a for a, b in pairwise(places)}
    assert max(steps) - min(steps) <= 1


def test_a_short_grid_is_timed_whole() -> None:
    assert timed_levels([GRID[:MOST_TIMED]]) == tuple(GRID[:MOST_TIMED])


@given(st.floats(0.0, 9.0), st.floats(0.0, 9.0))
def test_what_is_linear_in_the_density_comes_back(fixed: float, slope: float) -> None:
    timed = {scheme: fixed + slope * density(scheme) for scheme in timed_levels([GRID])}
    for scheme, ms in between(timed, GRID).items():
        assert ms == pytest.approx(fixed + slope * density(scheme), abs=1e-9)


def test_nothing_is_made_up_beyond_what_was_timed() -> None:
    timed = dict.fromkeys(GRID[3:8], 1.0)
    for scheme in (GRID[2], GRID[8], *OTHERS):
        with pytest.raises(LatencyError, match="not between"):
            between(timed, [scheme])


def test_each_layers_own_ends_are_timed() -> None:
    layers = [GRID, GRID[4:9], [GRID[6]], OTHERS]
    timed = set(timed_levels(layers))
    for schemes in layers:
        own = {scheme: density(scheme) for scheme in schemes if scheme in timed and scheme in GRID}
        if schemes is not OTHERS:
            assert between(own, schemes) == pytest.approx({one: density(one) for one in schemes})
    assert {GRID[4], GRID[6], GRID[8]} <= timed
