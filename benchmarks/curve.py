"""Curves: accuracy against speedup over a list of budgets, next to uniform schemes.

Every point is a compressed network: planned for a budget, or one scheme on all layers. All are
exported and measured in one interleaved run. What the latency table predicted stands beside what
was measured; the curve says by how much predictions were off. A table is made from networks with
one scheme on all layers, so where these are off themselves the machine has changed since, and what
plans are off beyond that is the sum's own error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from obc_deploy.benchmarks.measurement import Measurement
from obc_deploy.benchmarks.table import percent, times
from obc_deploy.errors import MeasurementError

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel

Kind = Literal["plan", "uniform"]


class CurvePoint(BaseModel):
    """One compressed network of a curve.

    Attributes:
        name: the budget or the scheme.
        kind: planned, or the same scheme on all layers.
        accuracy: share of right answers in PyTorch, quantizers simulated; None without labels.
        drop: points of a hundred lost against the dense network.
        predicted: speedup over the dense float network by the latency table; None without one.
        measured: the artifact's speedup over the dense float network in the runtime.
        interval: 95 % interval of it.
        promised: what the counts promised, by metric.
        accelerated: layers that the runtime ran as they were compressed, and of how many.
        loss: the network's loss on calibration samples, where it was searched by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    accuracy: float | None
    drop: float | None
    predicted: float | None
    measured: float | None
    interval: tuple[float, float] | None
    promised: dict[str, float]
    accelerated: tuple[int, int] | None
    loss: float | None = None

    @property
    def latency_ratio(self) -> float | None:
        """Predicted latency divided by the measured one."""
        if self.predicted is None or self.measured is None:
            return None
        return self.measured / self.predicted

    @property
    def latency_error(self) -> float | None:
        """|predicted - measured| / measured, of latencies."""
        return None if self.latency_ratio is None else abs(self.latency_ratio - 1.0)


class Curve(BaseModel):
    """A curve.

    Attributes:
        model: the model's name.
        target: where it was measured.
        threads: threads of the runtime.
        batch_size: samples in one inference.
        dense_accuracy: share of right answers of the dense network.
        samples: labelled samples that accuracies were measured on.
        points: plans first, as asked for, then uniform schemes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    target: str
    threads: int | None
    batch_size: int
    dense_accuracy: float | None
    samples: int
    points: tuple[CurvePoint, ...]

    @property
    def median_latency_error(self) -> float | None:
        """Median over the planned points of how far predicted latencies were off."""
        return _median(abs(ratio - 1.0) for ratio in self._ratios("plan"))

    @property
    def drift(self) -> float | None:
        """By what uniform networks' latencies exceed their predictions, in the median; 0.1: 10 %.

        Relative to the dense float network, as all latencies of a curve. None without such points.
        """
        middle = _median(self._ratios("uniform"))
        return None if middle is None else 1.0 / middle - 1.0

    @property
    def median_error_beyond_drift(self) -> float | None:
        """Median over the planned points of the error that is left where drift is taken away."""
        if self.drift is None:
            return None
        return _median(abs(ratio * (1.0 + self.drift) - 1.0) for ratio in self._ratios("plan"))

    def _ratios(self, kind: Kind) -> list[float]:
        ratios = (point.latency_ratio for point in self.points if point.kind == kind)
        return [ratio for ratio in ratios if ratio is not None]

    @property
    def accuracy_of_predictions(self) -> str:
        """How far predictions were off, in a sentence or two; empty without predictions."""
        error, drift, beyond = (
            self.median_latency_error, self.drift, self.median_error_beyond_drift,
        )  # fmt: skip
        if error is None:
            return ""
        text = f"Predicted latencies of the plans are off by {100 * error:.0f} % in the median."
        if drift is None or beyond is None:
            return text
        word = "slower" if drift >= 0 else "faster"
        return (
            f"{text} The uniform networks, which the latency table was made from, were themselves "
            f"{100 * abs(drift):.0f} % {word} (against the dense one) than when it was; beyond "
            f"that, plans are off by {100 * beyond:.0f} %."
        )


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def curve_of(
    models: Mapping[str, CompressedModel],
    predicted: Mapping[str, float | None],
    measurements: Sequence[Measurement],
    *,
    target: str,
) -> Curve:
    """Put compressed networks and their measurements together.

    Args:
        models: name to compressed network; those with a plan in their manifest are planned ones.
        predicted: name to predicted speedup over the dense float network.
        measurements: of these networks, by name, in the target.
        target: where they were measured.

    Raises:
        MeasurementError: no network at all.
    """
    if not models:
        raise MeasurementError("a curve needs a point: give at least one budget")
    measured = {one.variant: one for one in measurements if one.role == "compressed"}
    points = [
        _point(name, model, predicted.get(name), measured.get(name))
        for name, model in models.items()
    ]
    first = next(iter(models.values())).manifest
    timed = next(iter(measured.values()), None)
    accuracy = first.accuracy
    return Curve(
        model=first.model.source,
        target=target,
        threads=None if timed is None else timed.threads,
        batch_size=1 if timed is None else timed.batch_size,
        dense_accuracy=None if accuracy is None else accuracy.dense,
        samples=0 if accuracy is None else accuracy.samples,
        points=tuple(points),
    )


def _point(
    name: str, model: CompressedModel, predicted: float | None, found: Measurement | None
) -> CurvePoint:
    manifest = model.manifest
    accuracy = manifest.accuracy
    counted = manifest.predicted_speedup or {}
    accelerated = None
    if found is not None and found.layers_accelerated is not None and found.layers_total:
        accelerated = (found.layers_accelerated, found.layers_total)
    return CurvePoint(
        name=name,
        kind="uniform" if manifest.plan is None else "plan",
        accuracy=None if accuracy is None else accuracy.compressed,
        drop=None if accuracy is None else 100.0 * (accuracy.dense - accuracy.compressed),
        predicted=predicted,
        measured=None if found is None else found.speedup_vs_dense_fp32,
        interval=None if found is None else found.speedup_vs_dense_fp32_interval,
        promised=dict(counted),
        accelerated=accelerated,
        loss=None if manifest.plan is None else manifest.plan.calibration_loss,
    )


def curve_table(curve: Curve) -> str:
    """The curve as a Markdown table."""
    lines = [
        "| point | accuracy, % | lost, points | predicted | measured (95 % interval) | off by | "
        "MACs promise | BOPs promise | layers accelerated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in curve.points:
        interval = (
            ""
            if point.interval is None
            else f" ({point.interval[0]:.2f} to {point.interval[1]:.2f})"
        )
        off = point.latency_error
        cells = (
            point.name if point.kind == "plan" else f"uniform {point.name}",
            "-" if point.accuracy is None else percent(point.accuracy),
            "-" if point.drop is None else f"{point.drop:.2f}",
            times(point.predicted),
            f"{times(point.measured)}{interval}",
            "-" if off is None else f"{100 * off:.0f} %",
            times(point.promised.get("macs")),
            times(point.promised.get("bops")),
            "-" if point.accelerated is None else f"{point.accelerated[0]}/{point.accelerated[1]}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_curve(path: Path, curve: Curve) -> None:
    """Accuracy (or loss) against measured speedup, plans and uniform schemes, as an SVG or PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    styles: dict[Kind, dict[str, Any]] = {
        "plan": {"marker": "o", "color": "#1b6ca8", "label": "planned for a budget"},
        "uniform": {"marker": "s", "color": "#b3541e", "label": "one scheme for all layers"},
    }
    drawn = False
    for kind, style in styles.items():
        points = [
            (point.measured, 100.0 * point.accuracy, point.name)
            for point in curve.points
            if point.kind == kind and point.measured is not None and point.accuracy is not None
        ]
        if not points:
            continue
        drawn = True
        points.sort()
        axes.plot([p[0] for p in points], [p[1] for p in points], linewidth=1.2, **style)
        for x, y, name in points:
            axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6)
    if curve.dense_accuracy is not None:
        axes.axhline(100.0 * curve.dense_accuracy, color="#777777", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"measured speedup over dense fp32 ({curve.target})")
    axes.set_ylabel("top-1 accuracy, %")
    axes.grid(alpha=0.25)
    if drawn:
        axes.legend(fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
