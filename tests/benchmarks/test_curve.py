"""Curves: points put together, predictions against measurements, table and plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from obc_deploy.benchmarks.curve import Curve, CurvePoint, curve_table, plot_curve


def point(name, kind, predicted, measured, accuracy=0.9, **more):
    return CurvePoint(
        name=name, kind=kind, accuracy=accuracy, drop=100 * (0.92 - accuracy), predicted=predicted,
        measured=measured, interval=None if measured is None else (measured - 0.1, measured + 0.1),
        promised={"macs": 4.0, "bops": 16.0}, accelerated=(3, 4), **more,
    )  # fmt: skip


CURVE = Curve(
    model="net", target="deepsparse", threads=1, batch_size=1, dense_accuracy=0.92, samples=1000,
    points=(
        point("latency:2x", "plan", 2.0, 2.1),
        point("latency:4x", "plan", 4.0, 3.2, accuracy=0.88),
        point("latency:6x", "plan", 6.0, 6.0, accuracy=0.8),
        point("block4@0.9+w8a8", "uniform", 3.0, 1.0, accuracy=0.7),
    ),
)  # fmt: skip


def test_errors_are_of_latencies_and_of_plans_alone() -> None:
    # Latency is 1 / speedup: predicted 1/2 and measured 1/2.1 are 5 % of the measured one apart.
    assert [p.latency_error for p in CURVE.points[:3]] == pytest.approx([0.05, 0.2, 0.0])
    assert CURVE.median_latency_error == pytest.approx(0.05)
    bare = CURVE.model_copy(update={"points": (point("macs:2x", "plan", None, 1.5),)})
    assert bare.median_latency_error is None


def test_what_the_machine_changed_is_told_from_what_the_sum_got_wrong() -> None:
    # All networks take 1.25 times as long as predicted, one plan 1.25 x 1.1 times.
    points = (
        point("latency:4x", "plan", 4.0, 3.2),
        point("latency:5x", "plan", 5.0, 4.0),
        point("latency:6x", "plan", 6.0, 6.0 / (1.25 * 1.1)),
        point("w8a8", "uniform", 2.5, 2.0),
        point("block4@0.9+w8a8", "uniform", 8.0, 6.4),
    )
    curve = CURVE.model_copy(update={"points": points})
    assert curve.drift == pytest.approx(0.25)
    assert curve.median_latency_error == pytest.approx(0.2)
    assert curve.median_error_beyond_drift == pytest.approx(0.0, abs=1e-12)
    assert "off by 20 %" in curve.accuracy_of_predictions
    assert "25 % slower" in curve.accuracy_of_predictions
    alone = curve.model_copy(update={"points": points[2:3]})
    assert alone.drift is None
    assert alone.median_error_beyond_drift is None
    assert alone.accuracy_of_predictions.count(".") == 1


def test_the_table_has_a_row_a_point() -> None:
    lines = curve_table(CURVE).splitlines()
    assert len(lines) == 2 + len(CURVE.points)
    assert "| latency:4x | 88.0" in lines[3]
    assert "20 %" in lines[3]
    assert lines[5].startswith("| uniform block4@0.9+w8a8 |")
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_is_drawn_whatever_is_missing(suffix: str, tmp_path: Path) -> None:
    for index, curve in enumerate(
        (
            CURVE,
            CURVE.model_copy(update={"dense_accuracy": None, "points": CURVE.points[:1]}),
            CURVE.model_copy(update={"points": (point("x", "plan", 1.0, None),)}),
        )
    ):
        path = tmp_path / f"{index}.{suffix}"
        plot_curve(path, curve)
        assert path.stat().st_size > 1000
