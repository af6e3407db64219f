"""The report: one HTML file that shows what was promised and what was measured.

Drawn from a manifest and measurements alone, so that it can be drawn again at any time. The file
carries its plots and styles with it and loads nothing from anywhere.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings as python_warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.benchmarks import table
from obc_deploy.benchmarks.measurement import Interval, Measurement
from obc_deploy.errors import ArtifactError
from obc_deploy.whole_files import whole_file

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = "report.html.jinja"

_INK = "#010203"
_PLAIN_INK = "#7d8590"
"""Stands for the page's text colour in a plot, so that plots follow light and dark."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Fact:
    """A name and its value, both ready to read."""

    name: str
    value: str


@dataclass(frozen=True)
class LayerRow:
    """One line of the table of layers."""

    name: str
    kind: str
    scheme: str
    shape: str
    macs: str
    density: str
    bits: str
    error: str
    note: str


@dataclass(frozen=True)
class ResultRow:
    """One line of the table of results."""

    variant: str
    role: str
    accuracy: str
    accuracy_note: str
    agreement: str
    macs: str
    bops: str
    predicted_macs: str
    predicted_bops: str
    fp32: str
    fp32_span: str
    int8: str
    int8_span: str
    p50: str
    tail: str
    end_to_end: str
    size: str
    layers: str
    slower: bool
    trouble: str


@dataclass(frozen=True)
class ResultGroup:
    """The results of one runtime under the same conditions."""

    title: str
    rows: tuple[ResultRow, ...]


@dataclass(frozen=True)
class MethodRow:
    """How often one variant was timed."""

    variant: str
    runtime: str
    workers: str
    rounds: str
    samples: str
    warmups: str
    end_to_end: str


def write_report(
    path: Path | str, manifest: Mapping[str, Any], measurements: Sequence[Measurement]
) -> Path:
    """Write the report as one self-contained HTML file; the file is whole or not there.

    Args:
        path: the HTML file.
        manifest: the run's manifest as a mapping. Every key may be missing; those that are read are
            `model`, `calibration`, `scheme`, `layers`, `accuracy`, `versions`, `machine`,
            `command` and `created`.
        measurements: of one run, with their speedups.

    Raises:
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    text = render_report(manifest, measurements)
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as wrong:
        raise ArtifactError(
            f"cannot write the report to '{path}': {wrong.strerror}; choose a writable place"
        ) from None
    return path


def render_report(manifest: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
    """The report's HTML. Everything that comes from the outside is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = table.by_runtime(measurements)
    model = _mapping(manifest.get("model"))
    calibration = _mapping(manifest.get("calibration"))
    return environment.get_template(TEMPLATE).render(
        title=_text(model.get("source")) or "Compressed network",
        scheme=_text(manifest.get("scheme")),
        created=_text(manifest.get("created")),
        findings=_findings(rows),
        groups=_groups(rows),
        predictions=_predictions_plot(rows),
        accuracies=_accuracy_plot(rows),
        warnings=_warnings(rows),
        layers=_layers(manifest.get("layers")),
        method=_method(rows),
        accuracy=_facts(_mapping(manifest.get("accuracy"))),
        model=_facts(model),
        calibration=_facts(calibration),
        machine=_facts(_mapping(manifest.get("machine"))),
        versions=_facts(_mapping(manifest.get("versions"))),
        command=_command(manifest.get("command")),
    )


# Words and numbers ------------------------------------------------------------------------------


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    """Any value of a manifest on one line; empty for what is missing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items() if _text(one))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return ", ".join(_text(one) for one in value)
    return str(value)


def _facts(values: Mapping[str, Any]) -> tuple[Fact, ...]:
    facts = (Fact(str(name).replace("_", " "), _text(value)) for name, value in values.items())
    return tuple(fact for fact in facts if fact.value)


def _command(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        import shlex

        return shlex.join(str(part) for part in value)
    return _text(value)


def _number(value: Any) -> float | None:
    """A finite number, or None for whatever else a manifest may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _findings(rows: Sequence[Measurement]) -> tuple[str, ...]:
    """One sentence a runtime: its fastest compressed network, against both dense ones."""
    findings = []
    groups = dict.fromkeys(table.conditions_of(row) for row in rows)
    for group in groups:
        own = [row for row in rows if table.conditions_of(row) == group]
        timed = [row for row in own if row.role == "compressed" and row.latency_ms is not None]
        if not timed:
            continue
        best = min(timed, key=lambda row: row.latency_ms.p50 if row.latency_ms else math.inf)
        parts = [
            f"{table.times(ratio)} the speed of {words} ({_interval(interval)})"
            for ratio, interval, words in (
                (best.speedup_vs_dense_fp32, best.speedup_vs_dense_fp32_interval, "dense fp32"),
                (best.speedup_vs_dense_int8, best.speedup_vs_dense_int8_interval, "dense int8"),
            )
            if ratio is not None
        ]
        if not parts:
            continue
        sentence = f"{best.variant} in {best.runtime} runs at {' and '.join(parts)}"
        if best.predicted_speedup is not None:
            sentence += (
                f"; operation counts promise {table.times(best.predicted_speedup.macs)} by MACs "
                f"and {table.times(best.predicted_speedup.bops)} by BOPs"
            )
        sentence += "."
        if best.accuracy is not None:
            sentence += f" Its accuracy is {table.percent(best.accuracy)} %"
            dense = next((row for row in own if row.role == "dense-fp32"), None)
            if dense is not None and dense.accuracy is not None:
                sentence += f", the dense network's {table.percent(dense.accuracy)} %"
            sentence += "."
        findings.append(sentence)
    return tuple(findings)


def _groups(rows: Sequence[Measurement]) -> tuple[ResultGroup, ...]:
    titles = dict.fromkeys(table.conditions_of(row) for row in rows)
    return tuple(
        ResultGroup(
            title=title.replace("\n", ", "),
            rows=tuple(_result(row) for row in rows if table.conditions_of(row) == title),
        )
        for title in titles
    )


def _result(row: Measurement) -> ResultRow:
    latency, predicted, interval = row.latency_ms, row.predicted_speedup, row.accuracy_interval
    accelerated = row.layers_accelerated is not None and row.layers_total is not None
    return ResultRow(
        variant=row.variant,
        role=row.role,
        accuracy=table.percent(row.accuracy),
        accuracy_note=(
            "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
        ),
        agreement=table.percent(row.agreement),
        macs=table.count(row.macs),
        bops=table.count(row.bops),
        predicted_macs=table.times(predicted.macs if predicted else None),
        predicted_bops=table.times(predicted.bops if predicted else None),
        fp32=table.times(row.speedup_vs_dense_fp32),
        fp32_span=_span(row.role == "dense-fp32", row.speedup_vs_dense_fp32_interval),
        int8=table.times(row.speedup_vs_dense_int8),
        int8_span=_span(row.role == "dense-int8", row.speedup_vs_dense_int8_interval),
        p50=table.milliseconds(latency.p50 if latency else None),
        tail=(
            f"{table.milliseconds(latency.p90)} / {table.milliseconds(latency.p99)}"
            if latency
            else ""
        ),
        end_to_end=table.milliseconds(row.end_to_end_ms),
        size=table.size(row.size_bytes),
        layers=f"{row.layers_accelerated} of {row.layers_total}" if accelerated else table.NONE,
        slower=row.slower_than_dense,
        trouble="" if row.error is None else "incomplete" if latency else "failed",
    )


def _span(is_baseline: bool, interval: Interval | None) -> str:
    return "" if is_baseline else _interval(interval)


def _warnings(rows: Sequence[Measurement]) -> tuple[Fact, ...]:
    """Each message once, with all the variants that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for message in (*((row.error,) if row.error else ()), *row.warnings):
            about.setdefault(message, []).append(f"{row.variant} in {row.runtime}")
    return tuple(Fact(", ".join(names), message) for message, names in about.items())


def _layers(layers: Any) -> tuple[LayerRow, ...]:
    if not isinstance(layers, Sequence) or isinstance(layers, str | bytes):
        return ()
    return tuple(_layer(layer) for layer in layers if isinstance(layer, Mapping))


def _layer(layer: Mapping[str, Any]) -> LayerRow:
    shape = layer.get("shape")
    if isinstance(shape, Sequence) and not isinstance(shape, str):
        shape = " × ".join(_text(size) for size in shape)
    macs = _number(layer.get("macs"))
    density = _number(layer.get("density"))
    error = _number(layer.get("error"))
    weight, activation = _number(layer.get("weight_bits")), _number(layer.get("activation_bits"))
    return LayerRow(
        name=_text(layer.get("name")),
        kind=_text(layer.get("kind")),
        scheme=_text(layer.get("scheme")),
        shape=_text(shape),
        macs=table.count(None if macs is None else round(macs)),
        density=table.NONE if density is None else f"{density:.3f}",
        bits=" / ".join("32" if bits is None else f"{bits:.0f}" for bits in (weight, activation)),
        error=table.NONE if error is None else f"{error:.2e}",
        note=_text(layer.get("note")),
    )


def _method(rows: Sequence[Measurement]) -> tuple[MethodRow, ...]:
    return tuple(
        MethodRow(
            variant=row.variant,
            runtime=row.runtime,
            workers=str(len(row.processes)),
            rounds=str(sum(len(worker.rounds) for worker in row.processes)),
            samples=str(len(row.latency_ms.samples) if row.latency_ms else 0),
            warmups=str(len(row.warmup_ms)),
            end_to_end=str(len(row.end_to_end.samples) if row.end_to_end else 0),
        )
        for row in rows
    )


# Plots ------------------------------------------------------------------------------------------


def _predictions_plot(rows: Sequence[Measurement]) -> Markup | None:
    """Measured over predicted speedup, by MACs and by BOPs; None with nothing to draw."""
    drawn = [
        row
        for row in rows
        if row.predicted_speedup is not None
        and row.speedup_vs_dense_fp32 is not None
        and row.role != "dense-fp32"
    ]
    if not drawn:
        return None
    figure = _figure(9.2, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    measured = [row.speedup_vs_dense_fp32 or 1.0 for row in drawn]
    predictions = {
        by: [float(getattr(row.predicted_speedup, by)) for row in drawn] for by in ("macs", "bops")
    }
    # One scale for both panels and both axes: a distance from the line means the same everywhere.
    everything = [*measured, *predictions["macs"], *predictions["bops"]]
    low, high = 0.8 * min(1.0, *everything), 1.25 * max(2.0, *everything)
    for panel, (by, name) in zip(axes, (("macs", "MACs"), ("bops", "BOPs")), strict=True):
        promised = predictions[by]
        panel.plot([low, high], [low, high], color=_INK, alpha=0.5, linewidth=1, linestyle="--")
        panel.axhline(1.0, color=_INK, alpha=0.25, linewidth=1)
        panel.annotate(
            "as promised",
            (math.sqrt(low * high), math.sqrt(low * high)),
            xytext=(-4, 4),
            textcoords="offset points",
            rotation=45,
            rotation_mode="anchor",
            transform_rotates_text=True,
            ha="center",
            color=_INK,
            alpha=0.6,
            fontsize=8,
        )
        _points(panel, rows, drawn, promised, measured)
        panel.set_xlim(low, high)
        panel.set_ylim(low, high)
        _speedup_axis(panel, "x")
        _speedup_axis(panel, "y")
        panel.set_xlabel(f"predicted speedup by {name}")
    axes[0].set_ylabel("measured speedup over dense fp32")
    _legend(figure, rows, drawn)
    return _svg(figure, "predicted")


def _accuracy_plot(rows: Sequence[Measurement]) -> Markup | None:
    """Accuracy over measured speedup, with intervals; None with nothing to draw."""
    drawn = [
        row for row in rows if row.accuracy is not None and row.speedup_vs_dense_fp32 is not None
    ]
    if not any(row.role == "compressed" for row in drawn):
        return None
    figure = _figure(9.2, 4.0)
    panel = figure.subplots()
    speedups = [row.speedup_vs_dense_fp32 or 1.0 for row in drawn]
    accuracies = [100.0 * (row.accuracy or 0.0) for row in drawn]
    for row, speedup, accuracy in zip(drawn, speedups, accuracies, strict=True):
        if row.accuracy_interval is not None:
            ends = [100.0 * end for end in row.accuracy_interval]
            panel.plot([speedup, speedup], ends, color=_INK, alpha=0.25, linewidth=1)
        if row.role == "dense-fp32":
            panel.axhline(accuracy, color=_INK, alpha=0.25, linewidth=1, linestyle="--")
    _points(panel, rows, drawn, speedups, accuracies, interval=False)
    panel.set_xlim(0.8 * min(1.0, *speedups), 1.25 * max(2.0, *speedups))
    _speedup_axis(panel, "x")
    panel.set_xlabel("measured speedup over dense fp32")
    panel.set_ylabel("accuracy, %")
    _legend(figure, rows, drawn)
    return _svg(figure, "accuracy")


def _points(
    panel: Axes,
    rows: Sequence[Measurement],
    drawn: Sequence[Measurement],
    across: Sequence[float],
    up: Sequence[float],
    *,
    interval: bool = True,
) -> None:
    """One marker a measurement: its colour is the variant, its shape the runtime."""
    colours, markers = _keys(rows)
    for row, x, y in zip(drawn, across, up, strict=True):
        colour = colours[row.variant]
        ends = row.speedup_vs_dense_fp32_interval
        if interval and ends is not None:
            panel.plot([x, x], list(ends), color=colour, linewidth=1.5)
        panel.plot(
            [x],
            [y],
            marker=markers[row.runtime],
            color=colour,
            markersize=7,
            markeredgewidth=0,
            linestyle="none",
        )


def _keys(rows: Sequence[Measurement]) -> tuple[dict[str, str], dict[str, str]]:
    """A colour for each variant and a shape for each runtime, the same in all plots."""
    variants = dict.fromkeys(row.variant for row in rows)
    runtimes = dict.fromkeys(row.runtime for row in rows)
    return (
        {variant: _COLOURS[i % len(_COLOURS)] for i, variant in enumerate(variants)},
        {runtime: _MARKERS[i % len(_MARKERS)] for i, runtime in enumerate(runtimes)},
    )


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _speedup_axis(panel: Axes, which: str) -> None:
    """A logarithmic axis with ticks at powers of two, named as speedups."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = panel.xaxis if which == "x" else panel.yaxis
    (panel.set_xscale if which == "x" else panel.set_yscale)("log", base=2)
    axis.set_major_locator(LogLocator(base=2))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def _legend(figure: Figure, rows: Sequence[Measurement], drawn: Sequence[Measurement]) -> None:
    """Runtimes by shape, then variants by colour, below the plot."""
    from matplotlib.lines import Line2D

    def entry(marker: str, colour: str) -> Line2D:
        return Line2D(
            [], [], marker=marker, color=colour, linestyle="none", markersize=6, markeredgewidth=0
        )

    colours, markers = _keys(rows)
    entries = {
        **{row.runtime: entry(markers[row.runtime], _INK) for row in drawn},
        **{row.variant: entry("o", colours[row.variant]) for row in drawn},
    }
    longest = max(map(len, entries))
    legend = figure.legend(
        list(entries.values()),
        list(entries.keys()),
        loc="outside lower center",
        ncols=max(1, min(5, 110 // (longest + 8))),
        frameon=False,
        fontsize=8,
    )
    for text in legend.get_texts():
        text.set_color(_INK)
        # A variant's name is text, also where it holds a dollar sign.
        text.set_parse_math(False)


def _svg(figure: Figure, salt: str) -> Markup:
    """The figure as an SVG element for inlining, in the page's colours."""
    import matplotlib
    from markupsafe import Markup

    for panel in figure.axes:
        panel.set_facecolor("none")
        panel.tick_params(colors=_INK, labelsize=8)
        panel.xaxis.label.set_color(_INK)
        panel.yaxis.label.set_color(_INK)
        panel.grid(True, color=_INK, alpha=0.08, linewidth=0.8)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
            spine.set_alpha(0.4)
    buffer = io.StringIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}),
        python_warnings.catch_warnings(),
    ):
        # Fonts only lay the plot out here; the browser draws the letters with its own.
        python_warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, count=1, flags=re.DOTALL)
    drawing = drawing.replace(_INK, "currentColor")
    # Safe to inline: matplotlib escapes the text it draws.
    return Markup(drawing)


def write_plot(path: Path | str, measurements: Sequence[Measurement]) -> Path:
    """Write the predicted-against-measured plot as an SVG file of its own.

    Raises:
        ArtifactError: there is nothing to draw, or the file cannot be written.
    """
    path = Path(path)
    drawing = _predictions_plot(measurements)
    if drawing is None:
        raise ArtifactError("nothing to draw: no measurement has both a speedup and a prediction")
    # Outside a page there is no colour to take over: a grey that reads on light and on dark.
    text = str(drawing).replace("currentColor", _PLAIN_INK)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as wrong:
        raise ArtifactError(
            f"cannot write the plot to '{path}': {wrong.strerror}; choose a writable place"
        ) from None
    return path


def manifest_of(path: Path | str) -> dict[str, Any]:
    """A manifest file as the mapping that `write_report` takes.

    Raises:
        ArtifactError: the file is missing or holds no JSON object.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_bytes())
    except OSError as wrong:
        raise ArtifactError(
            f"cannot read the manifest '{path}': {wrong.strerror}; name a run directory's manifest"
        ) from None
    except ValueError as wrong:
        raise ArtifactError(
            f"'{path}' is not JSON: {wrong}; restore it or run the compression again"
        ) from None
    if not isinstance(found, dict):
        raise ArtifactError(f"'{path}' holds no JSON object; name a run directory's manifest")
    return found
