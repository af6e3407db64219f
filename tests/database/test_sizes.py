"""Sizes: the report is what the disk says, the plan is close to it before anything is solved."""

from __future__ import annotations

import pytest
from layer_problems import LEVELS, all_levels, make_problem, network

from obc_deploy.database import (
    LayerOutline,
    build,
    levels_for,
    outline_of_problem,
    plan_build,
)
from obc_deploy.schemes import Scheme


def test_the_size_report_is_true(tmp_path):
    folder = tmp_path / "db"
    report = build(network(), all_levels, folder).size_report()
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert report.disk_bytes == on_disk
    # w4 and w4a4 are one.
    forms = len(LEVELS) - 1
    assert [layer.forms for layer in report.layers] == [forms] * 3
    assert [layer.levels for layer in report.layers] == [len(LEVELS)] * 3
    weights = [problem.weight.numel() for problem in network()]
    assert [layer.dense_bytes for layer in report.layers] == [4 * forms * n for n in weights]
    assert report.times_smaller == report.dense_bytes / on_disk


def test_a_plan_is_close_to_what_comes(tmp_path):
    folder = tmp_path / "db"
    problem = make_problem(rows=64, cols=96, channels=32)
    outline = outline_of_problem(problem)

    def levels_of(outline):
        return levels_for("deepsparse", outline.channels, outline.cols)

    plan = plan_build([outline], levels_of, folder)
    assert not folder.exists()
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert plan.missing == len(levels_of(outline))
    report = build([problem], levels_of, folder, plan=plan).size_report()
    assert plan.disk_bytes == pytest.approx(report.disk_bytes, rel=0.1)
    assert plan.dense_bytes == report.dense_bytes
    assert report.disk_bytes < report.dense_bytes / 5
    # Solving holds at least the answers themselves.
    assert plan.memory_bytes > plan.dense_bytes
    later = plan_build([outline], levels_of, folder)
    assert (later.missing, later.seconds, later.memory_bytes) == (0, 0.0, 0)
    assert later.disk_bytes == plan.disk_bytes


def test_a_plan_leaves_out_what_is_there(tmp_path):
    build(network(), lambda outline: [Scheme.parse("2:4")], tmp_path / "db")
    outlines = [*map(outline_of_problem, network()), LayerOutline("new", 4, 8, 8)]
    wanted = [Scheme.parse(text) for text in ("2:4", "w8a8")]
    plan = plan_build(outlines, lambda outline: wanted, tmp_path / "db")
    assert [[str(form) for form in layer.missing] for layer in plan.layers] == [
        ["w8"], ["w8"], ["w8"], ["2:4", "w8"],
    ]  # fmt: skip
    assert plan_build(outlines, lambda outline: wanted).missing == 8


def test_no_seconds_where_none_are_known():
    outline = LayerOutline("layer", 8, 16, 16)
    for options in ({"method": "rtn"}, {"device": "cuda"}):
        assert plan_build([outline], all_levels, **options).seconds is None
