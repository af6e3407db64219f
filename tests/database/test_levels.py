"""Levels: the geometric grids, what divides a layer, what a target gains from."""

from __future__ import annotations

from itertools import pairwise

import pytest

from obc_deploy.database import block4_sparsities, levels_for, sparsity_grid
from obc_deploy.errors import TargetError
from obc_deploy.schemes import NM, Block4, Scheme, Unstructured
from obc_deploy.solvers import check_scheme
from obc_deploy.targets import TARGETS


def kinds(levels, kind):
    return [level for level in levels if isinstance(level.pattern, kind)]


def test_each_level_keeps_nine_tenths_of_the_one_before():
    grid = sparsity_grid(45)
    densities = [1.0] + [1.0 - sparsity for sparsity in grid]
    assert len(grid) == 45
    assert grid[0] == 0.1
    assert grid[-1] == 0.9913
    assert sparsity_grid(30) == grid[:30]
    assert sparsity_grid(30)[-1] == 0.9576
    for before, after in pairwise(densities):
        assert after == pytest.approx(0.9 * before, abs=1e-4)


def test_blocks_go_on_in_wider_steps_where_the_paper_stops():
    levels = block4_sparsities()
    assert levels[:30] == sparsity_grid(30)
    assert set(levels) < set(sparsity_grid(45))
    assert levels[-1] == 0.9903
    for before, after in pairwise(levels[29:]):
        assert 1.0 - after == pytest.approx(0.81 * (1.0 - before), abs=1e-4)


def test_all_levels_of_a_layer():
    levels = levels_for(None, 64, 576)
    assert str(levels[0]) == "dense"
    floats = [level for level in levels if level.quantization is None]
    assert len(kinds(floats, Unstructured)) == 45
    assert len(kinds(floats, Block4)) == len(block4_sparsities())
    assert [str(level) for level in kinds(floats, NM)] == ["2:4"]
    texts = [str(level) for level in levels]
    assert {"w8a8", "w4a4", "w4", "w3", "w2", "2:4+w8a8", "2:4+w4a4"} <= set(texts)
    assert {f"{level}+w8a8" for level in floats[1:]} <= set(texts)


@pytest.mark.parametrize("target", [None, *TARGETS])
@pytest.mark.parametrize(("channels", "cols"), [(64, 576), (3, 27), (6, 54), (512, 512), (1, 9)])
def test_texts_are_short_and_each_level_fits(target, channels, cols):
    levels = levels_for(target, channels, cols)
    texts = [str(level) for level in levels]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= len("unstructured@0.9999+w8a8")
    assert [Scheme.parse(text) for text in texts] == list(levels)
    for level in levels:
        check_scheme(level, rows=8, cols=cols, channels=channels)


def test_blocks_and_groups_need_divisors():
    levels = levels_for(None, 3, 27)
    assert not kinds(levels, Block4)
    assert not kinds(levels, NM)
    assert kinds(levels, Unstructured)
    assert "w4g128" not in map(str, levels)
    assert "w4g128" in map(str, levels_for(None, 128, 1152))


def test_targets_get_what_they_accelerate():
    assert [str(level) for level in levels_for("onnxruntime", 64, 576)] == ["dense", "w8a8"]
    levels = levels_for("deepsparse", 64, 576)
    assert not kinds(levels, NM)
    assert min(level.pattern.sparsity for level in kinds(levels, Block4)) >= 0.8
    assert min(level.pattern.sparsity for level in kinds(levels, Unstructured)) >= 0.85
    assert {str(level.quantization) for level in levels if level.quantization} == {"w8a8"}
    assert set(levels) < set(levels_for(None, 64, 576))


def test_unknown_targets_are_refused():
    with pytest.raises(TargetError, match="no target 'tpu'"):
        levels_for("tpu", 64, 576)
