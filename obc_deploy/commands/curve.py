"""`obc-deploy curve`: accuracy against speedup over a list of budgets, from one database."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obc_deploy.commands import options as o
from obc_deploy.commands.bench import require_runtimes
from obc_deploy.commands.budget import Wish, planner_of
from obc_deploy.commands.compress import Compression, request
from obc_deploy.commands.output import Output, Stage
from obc_deploy.errors import BudgetError

if TYPE_CHECKING:
    from obc_deploy.benchmarks.curve import Curve
    from obc_deploy.compression import CompressedModel
    from obc_deploy.planning import Planner

DEFAULT_UNIFORM = 4
"""Uniform schemes beside the plans, where none are named."""


def _points(
    work: Compression, wish: Wish, uniform: tuple[str, ...], folder: Path, say: Stage
) -> tuple[dict[str, CompressedModel], dict[str, float | None]]:
    """Every network of the curve, from its run directory where it is there already."""
    from obc_deploy.benchmarks.curve_networks import curve_networks, predicted_speedups

    calibrated, evaluation = work.calibrate(say)
    planner = planner_of(work, wish, calibrated, say)
    models = curve_networks(
        planner, wish.budgets, uniform or _usual(planner), work.maker(calibrated, evaluation, say),
        folder=folder / "runs", progress=say,
    )  # fmt: skip
    return models, predicted_speedups(planner, models)


def _usual(planner: Planner) -> tuple[str, ...]:
    """Evenly spread uniform schemes out of what the middle layers may have."""
    widest = max(planner.space.layers, key=lambda layer: len(layer.choices))
    texts = [str(choice.scheme) for choice in widest.choices if not choice.scheme.is_dense]
    step = max(1, -(-len(texts) // DEFAULT_UNIFORM))
    return tuple(texts[::-1][::step][::-1])


def curve(
    model: o.ModelName,
    calibration: o.Calibration,
    output: o.RunOutput,
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget", "-b", metavar="BUDGET",
            help="One point's budget, such as latency:4x; repeat it for more points.",
            rich_help_panel="Budgets", show_default=False,
        ),
    ],
    target: o.TargetName = None,
    evaluation: o.Evaluation = None,
    uniform: Annotated[
        list[str] | None,
        typer.Option(
            "--uniform", metavar="SCHEME",
            help="A scheme for all layers, to compare with; may be repeated.",
            rich_help_panel="Budgets", show_default="four of the levels",
        ),
    ] = None,
    weights: o.WeightsName = None,
    skip: o.Skip = None,
    layer: o.LayerSchemes = None,
    search_time: o.SearchTime = 60.0,
    database: o.DatabaseFolder = None,
    levels: o.Families = None,
    free_edges: o.FreeEdges = False,
    latency_table: o.LatencyFile = None,
    allow_foreign_latency: o.ForeignLatency = False,
    threads: o.TimedThreads = None,
    measured_batch: o.TimedBatch = 1,
    method: o.MethodName = o.Method.EXACT_OBS,
    samples: o.SampleCount = o.DEFAULT_SAMPLES,
    passes: o.Passes = 1,
    batch_size: o.BatchSize = 64,
    device: o.Device = "auto",
    device_memory: o.DeviceMemory = None,
    damping: o.Damping = 0.01,
    dtype: o.PrecisionName = o.Precision.FLOAT32,
    ranges: o.RangesName = o.Ranges.MSE,
    sequential: o.Sequential = False,
    scale: o.PixelScale = None,
    mean: o.PixelMean = None,
    std: o.PixelDeviation = None,
    resize: o.Resize = 256,
    crop: o.Crop = 224,
    seed: o.Seed = 0,
    rounds: o.Rounds = 16,
    json: o.JsonFile = None,
) -> None:  # fmt: skip
    """Accuracy against speedup for a list of budgets, with uniform schemes beside them."""
    from obc_deploy.search import as_budgets

    out = Output(json)
    texts = (",".join(map(str, as_budgets(text))) for text in budget)
    wish = Wish(
        budgets=tuple(dict.fromkeys(texts)), max_drop=None, metric="latency",
        search_seconds=search_time, database=database, families=levels, free_edges=free_edges,
        latency_file=latency_table, allow_foreign_latency=allow_foreign_latency, threads=threads,
        measured_batch=measured_batch,
    )  # fmt: skip
    work = request(
        model=model, weights=weights, calibration=calibration, evaluation=evaluation,
        data=o.DataOptions(scale, mean, std, resize, crop), samples=samples, passes=passes,
        scheme="w8a8", target=target, skip=skip, layer=layer, fallback=None, method=method,
        ranges=ranges, damping=damping, dtype=dtype, bn_reestimate=True, sequential=sequential,
        batch_size=batch_size, device=device, device_memory=device_memory, seed=seed,
        no_baselines=False,
    )  # fmt: skip
    require_runtimes([work.target.name])
    output.mkdir(parents=True, exist_ok=True)
    names = tuple(uniform or ())
    with out.working() as say:
        models, predicted = _points(work, wish, names, output, say)
        found = _measured(work, wish, models, predicted, rounds, output, say)
    _show(out, found, output)


def _measured(
    work: Compression,
    wish: Wish,
    models: Mapping[str, CompressedModel],
    predicted: Mapping[str, float | None],
    rounds: int,
    output: Path,
    say: Stage,
) -> Curve:
    from obc_deploy.benchmarks.comparison import benchmark
    from obc_deploy.benchmarks.curve import curve_of, curve_table, plot_curve
    from obc_deploy.benchmarks.measurement import write_measurements
    from obc_deploy.manifest import write_json

    if not models:
        raise BudgetError("a curve needs a budget: add --budget latency:4x")
    target = work.target.name
    measurements = benchmark(
        list(models.values()), runtimes=[target], threads=wish.threads,
        batch_size=wish.measured_batch, rounds=rounds, artifacts=output / "artifacts",
        seed=work.seed, progress=say,
    )  # fmt: skip
    found = curve_of(models, predicted, measurements, target=target)
    write_measurements(output / "measurements.json", measurements)
    write_json(output / "curve.json", found)
    text = "\n\n".join(part for part in (curve_table(found), found.accuracy_of_predictions) if part)
    (output / "curve.md").write_text(text + "\n", encoding="utf-8")
    plot_curve(output / "curve.svg", found)
    return found


def _show(out: Output, found: Curve, output: Path) -> None:
    from rich.table import Table

    from obc_deploy.benchmarks.table import percent, times

    table = Table("point", title=f"{found.model} on {found.target}", title_justify="left")
    for title in ("accuracy, %", "lost", "predicted", "measured", "MACs", "BOPs", "accelerated"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in found.points:
        table.add_row(
            point.name if point.kind == "plan" else f"uniform {point.name}",
            "-" if point.accuracy is None else percent(point.accuracy),
            "-" if point.drop is None else f"{point.drop:.2f}",
            times(point.predicted), times(point.measured), times(point.promised.get("macs")),
            times(point.promised.get("bops")),
            "-" if point.accelerated is None else "/".join(map(str, point.accelerated)),
        )  # fmt: skip
    out.show(table)
    if found.accuracy_of_predictions:
        out.line(found.accuracy_of_predictions)
    out.line(f"curve: {output / 'curve.svg'}, {output / 'curve.md'}, {output / 'curve.json'}")
    out.results(found.model_dump(mode="json"))
