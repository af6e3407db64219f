"""`obc-deploy compress`, and `run`: compress, export, measure."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obc_deploy.commands import options as o
from obc_deploy.commands.bench import MeasuringPlan, bench_runs, require_runtimes
from obc_deploy.commands.budget import Wish, compress_within, show_estimate, show_found
from obc_deploy.commands.export import export_run, target_of
from obc_deploy.commands.output import Output, Stage
from obc_deploy.device_memory import memory_bytes
from obc_deploy.errors import BudgetError, CalibrationError, RunDirectoryError
from obc_deploy.schemes import Scheme
from obc_deploy.targets import Target, as_target

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from obc_deploy.calibrated import CalibratedModel
    from obc_deploy.compression import CompressedModel
    from obc_deploy.data import Samples

DEFAULT_SCHEME = "w8a8"


def load_named_model(name: str, weights: str | None) -> nn.Module | ExportedProgram:
    """The model of that name; factories are looked for in the current directory too.

    Raises:
        ModelError: there is none, or its weights do not fit.
    """
    from obc_deploy.models import load_model

    look_here()
    return load_model(name, weights=weights)


def look_here() -> None:
    """Make modules of the current directory importable, as `python -m` does."""
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)


@dataclass(frozen=True)
class Compression:
    """Everything that `compress` and `run` were asked for, read before any work.

    Attributes:
        model: the model's name.
        weights: its weights' name.
        calibration: the calibration data's name.
        evaluation: the evaluation data's name, or None.
        data: how samples are read.
        samples: most calibration samples to take.
        passes: over the calibration images.
        scheme: what every layer gets.
        target: where it is to run.
        skip: patterns of layers that stay dense.
        layer_schemes: schemes by layer pattern.
        fallback: scheme of layers that `scheme` does not divide.
        method: the solver.
        ranges: how activation ranges are found.
        damping: relative damping.
        dtype: precision of the solver.
        reestimate: measure batch-norm statistics anew.
        sequential: calibrate each layer on the compressed layers before it.
        batch_size: calibration samples at a time.
        device: where the work is done.
        device_memory: most bytes to take there, or None.
        seed: of every random choice.
        baselines: make the dense networks too.
    """

    model: str
    weights: str | None
    calibration: str
    evaluation: str | None
    data: o.DataOptions
    samples: int
    passes: int
    scheme: Scheme
    target: Target
    skip: tuple[str, ...]
    layer_schemes: Mapping[str, Scheme]
    fallback: Scheme | None
    method: str
    ranges: str
    damping: float
    dtype: str
    reestimate: bool
    sequential: bool
    batch_size: int
    device: str
    device_memory: int | None
    seed: int
    baselines: bool

    def calibrate(self, say: Stage) -> tuple[CalibratedModel, Samples | None]:
        """Load the model and its data, and capture the model on them.

        Raises:
            ObcDeployError: the model or the data cannot be used.
        """
        say("loading the model", 0.0)
        from obc_deploy.calibrated import calibrate
        from obc_deploy.solvers.dispatch import torch_device

        torch_device(self.device)
        model = load_named_model(self.model, self.weights)
        say("loading the data", 0.0)
        samples = self.data.load(self.calibration, limit=self.samples, seed=self.seed)
        evaluation = self._evaluation(samples)
        say("capturing the model", 0.0)
        calibrated = calibrate(
            model, samples, passes=self.passes, device=self.device,
            device_memory=self.device_memory, source=self.model, weights=self.weights,
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        return calibrated, evaluation

    def _evaluation(self, calibration: Samples) -> Samples | None:
        """Evaluation samples that the model can take: known before hours of work, not after."""
        if self.evaluation is None:
            return None
        found = self.data.load(self.evaluation)
        if found.labels is None:
            raise CalibrationError(
                f"--eval '{self.evaluation}' has no labels to measure accuracy against; add an "
                "array 'labels', or leave --eval out"
            )
        wanted = [array.shape[1:] for array in calibration.inputs.values()]
        given = [array.shape[1:] for array in found.inputs.values()]
        if wanted != given:
            raise CalibrationError(
                f"--eval '{self.evaluation}' has samples of shape {_shapes(given)}, the "
                f"calibration data has {_shapes(wanted)}; give data of one shape"
            )
        if found.preprocessing is None:
            found = replace(found, preprocessing=calibration.preprocessing)
        return found

    def schemes(self, calibrated: CalibratedModel) -> dict[str, Scheme]:
        """Each layer's scheme.

        Raises:
            LayerError: a name matches nothing.
            SchemeError: a scheme does not divide a layer.
        """
        from obc_deploy.assignment import resolve_schemes

        return resolve_schemes(
            calibrated.layers, self.scheme, skip=self.skip, layer_schemes=self.layer_schemes,
            fallback=self.fallback,
        )  # fmt: skip

    def compress(self, say: Stage) -> CompressedModel:
        """Compress.

        Raises:
            ObcDeployError: the model, the data or the schemes cannot be used.
        """
        calibrated, evaluation = self.calibrate(say)
        return self.maker(calibrated, evaluation, say)(
            scheme=self.scheme, skip=self.skip, layer_schemes=self.layer_schemes,
            baselines=self.baselines,
        )  # fmt: skip

    def maker(
        self, calibrated: CalibratedModel, evaluation: Samples | None, say: Stage
    ) -> partial[CompressedModel]:
        """`compress` with everything that was asked for but what the layers get.

        Args:
            calibrated: the model.
            evaluation: labelled samples, or None.
            say: told what is being done.
        """
        from obc_deploy.compression import compress

        return partial(
            compress,
            calibrated,
            target=self.target,
            fallback=self.fallback,
            method=self.method,
            damping=self.damping,
            dtype=self.dtype,
            ranges=self.ranges,
            bn_reestimate=self.reestimate,
            sequential=self.sequential,
            evaluation=evaluation,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=say,
        )


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes)


def request(
    *,
    model: str,
    weights: str | None,
    calibration: str,
    evaluation: str | None,
    data: o.DataOptions,
    samples: int,
    passes: int,
    scheme: str,
    target: str | None,
    skip: list[str] | None,
    layer: list[str] | None,
    fallback: str | None,
    method: o.Method,
    ranges: o.Ranges,
    damping: float,
    dtype: o.Precision,
    bn_reestimate: bool,
    sequential: bool,
    batch_size: int,
    device: str,
    device_memory: str | None,
    seed: int,
    no_baselines: bool,
) -> Compression:
    """What a command line asks for.

    Raises:
        ObcDeployError: an option's value cannot be read.
    """
    if not math.isfinite(damping):
        raise CalibrationError(f"--damping {damping} is no share; give a number such as 0.01")
    from obc_deploy.runtimes.registry import default_target

    look_here()
    return Compression(
        model=model,
        weights=weights,
        calibration=calibration,
        evaluation=evaluation,
        data=data,
        samples=samples,
        passes=passes,
        scheme=Scheme.parse(scheme),
        target=default_target() if target is None else as_target(target),
        skip=tuple(skip or ()),
        layer_schemes=o.layer_schemes(layer),
        fallback=None if fallback is None else Scheme.parse(fallback),
        method=method.value,
        ranges=ranges.value,
        damping=damping,
        dtype=dtype.value,
        reestimate=bn_reestimate,
        sequential=sequential,
        batch_size=batch_size,
        device=device,
        device_memory=None if device_memory is None else memory_bytes(device_memory),
        seed=seed,
        baselines=not no_baselines,
    )


def _free_run(folder: Path | None, *, overwrite: bool) -> Path:
    """The run directory to make, known to be free."""
    from obc_deploy.run_directory import check_free

    if folder is None:
        raise RunDirectoryError("no run directory: name the one to make with -o RUN")
    folder = folder.resolve() if folder.name in ("", "..") else folder
    check_free(folder, overwrite=overwrite)
    return folder


def _check_wish(work: Compression, wish: Wish | None) -> None:
    """Refuse a latency that nothing can measure, before any work.

    Raises:
        TargetError: plans are to keep a latency, and the target is not measured.
    """
    from obc_deploy.runtimes.registry import check_measured
    from obc_deploy.search import Metric

    if wish is not None and Metric.LATENCY in wish.metrics:
        check_measured(work.target)


def _show_plan(out: Output, work: Compression) -> None:
    """Say what would be done to each layer, and what would not speed up; nothing is written."""
    from rich.table import Table

    from obc_deploy.benchmarks.table import count, times
    from obc_deploy.costs import layer_cost, total
    from obc_deploy.runtimes.fingerprint import take_fingerprint
    from obc_deploy.targets import preflight

    with out.working() as say:
        calibrated, evaluation = work.calibrate(say)
        schemes = work.schemes(calibrated)
    costs = [
        layer_cost(layer.name, layer.macs, schemes[layer.name], weights=layer.weights)
        for layer in calibrated.layers
    ]
    notes = [f"{layer.name}: {layer.reason}" for layer in calibrated.unsupported]
    features = take_fingerprint().cpu_features
    notes += preflight(work.target, calibrated.layers, schemes, cpu_features=features)
    table = Table("layer", "kind", "scheme", title=f"Plan for {work.model}", title_justify="left")
    for title in ("rows x cols", "MACs", "MACs left"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer, cost in zip(calibrated.layers, costs, strict=True):
        table.add_row(
            layer.name, layer.kind.value, str(schemes[layer.name]), f"{layer.rows} x {layer.cols}",
            count(layer.macs), count(cost.macs_left),
        )  # fmt: skip
    whole = total(costs)
    predicted = whole.predicted_speedup
    out.show(table)
    out.line(
        f"{count(whole.dense_macs)} MACs become {count(whole.macs)}; operation counts promise "
        f"{times(predicted.macs if predicted else None)} by MACs, "
        f"{times(predicted.bops if predicted else None)} by BOPs"
    )
    labelled = "" if evaluation is None else f", {len(evaluation)} evaluation samples"
    out.line(f"{len(calibrated.samples)} calibration samples{labelled}; nothing was written")
    for note in notes:
        out.warn(note)
    out.results(
        {
            "model": work.model,
            "scheme": str(work.scheme),
            "target": work.target.name,
            "samples": len(calibrated.samples),
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind.value,
                    "shape": list(layer.weight_shape),
                    "scheme": str(schemes[layer.name]),
                    "macs": layer.macs,
                    "macs_left": cost.macs_left,
                }
                for layer, cost in zip(calibrated.layers, costs, strict=True)
            ],
            "macs": whole.dense_macs,
            "macs_left": whole.macs,
            "predicted_speedup": None
            if predicted is None
            else {"macs": predicted.macs, "bops": predicted.bops},
            "notes": notes,
        }
    )


def _compress_to(
    out: Output, work: Compression, run: Path, *, overwrite: bool, wish: Wish | None = None
) -> CompressedModel:
    notes: list[str] = []
    with out.working() as say:
        if wish is None:
            made = work.compress(say)
        else:
            made, notes = compress_within(work, wish, say)
        say("writing the run directory", 1.0)
        made.save(run, overwrite=overwrite)
    if wish is not None:
        show_found(out, made, notes)
    _show_compressed(out, made, run)
    return made


def _wish(
    *,
    budget: str | None,
    max_drop: float | None,
    metric: str,
    scheme_given: bool,
    search_seconds: float,
    database: Path | None,
    families: str | None,
    free_edges: bool,
    latency_file: Path | None,
    allow_foreign_latency: bool,
    threads: int | None,
    measured_batch: int,
) -> Wish | None:
    """What was asked for besides schemes; None where schemes were."""
    if budget is None and max_drop is None:
        return None
    if budget is not None and max_drop is not None:
        raise BudgetError("--budget and --max-drop are each other's reverse; give one of them")
    if scheme_given:
        given = "--budget" if budget is not None else "--max-drop"
        raise BudgetError(
            f"{given} searches for each layer's scheme; leave --scheme out (--levels says what to "
            "choose from, --layer and --skip fix single layers)"
        )
    return Wish(
        budgets=() if budget is None else (budget,),
        max_drop=max_drop,
        metric=metric,
        search_seconds=search_seconds,
        database=database,
        families=families,
        free_edges=free_edges,
        latency_file=latency_file,
        allow_foreign_latency=allow_foreign_latency,
        threads=threads,
        measured_batch=measured_batch,
    )


def _show_compressed(out: Output, made: CompressedModel, run: Path) -> None:
    from obc_deploy.benchmarks.table import count, percent, times

    manifest, costs = made.manifest, made.costs
    changed = [layer for layer in manifest.layers if layer.scheme != "dense"]
    predicted = costs.predicted_speedup
    out.line(
        f"{manifest.model.source}: {len(changed)} of {len(manifest.layers)} layers compressed with "
        f"{manifest.scheme}; {count(costs.dense_macs)} MACs became {count(costs.macs)}"
    )
    if predicted is not None:
        out.line(
            f"operation counts promise {times(predicted.macs)} by MACs and "
            f"{times(predicted.bops)} by BOPs"
        )
    errors = [(layer.error, layer.name) for layer in changed if layer.error is not None]
    if errors:
        worst, name = max(errors)
        out.line(f"largest relative output error of a layer: {worst:.2e} ({name})")
    accuracy = manifest.accuracy
    if accuracy is not None:
        out.line(
            f"top-1 accuracy in PyTorch: {percent(accuracy.compressed)} % (dense "
            f"{percent(accuracy.dense)} %) on {accuracy.samples} samples"
        )
    for note in manifest.notes:
        out.warn(note)
    out.line(f"run directory: {run}")


def _description(made: CompressedModel, run: Path) -> dict[str, Any]:
    return {"run": os.fspath(run), **made.manifest.model_dump(mode="json")}


def compress(
    model: o.ModelName,
    calibration: o.Calibration,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RUN",
            help="The run directory to make (not with --dry-run).",
            rich_help_panel="Results",
            show_default=False,
        ),
    ] = None,
    scheme: o.SchemeText = None,
    budget: o.BudgetText = None,
    max_drop: o.MaxDrop = None,
    by: o.DropMetric = o.MetricName.LATENCY,
    weights: o.WeightsName = None,
    target: o.TargetName = None,
    skip: o.Skip = None,
    layer: o.LayerSchemes = None,
    fallback: o.Fallback = None,
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
    bn_reestimate: o.Reestimate = True,
    sequential: o.Sequential = False,
    evaluation: o.Evaluation = None,
    scale: o.PixelScale = None,
    mean: o.PixelMean = None,
    std: o.PixelDeviation = None,
    resize: o.Resize = 256,
    crop: o.Crop = 224,
    seed: o.Seed = 0,
    no_baselines: o.NoBaselines = False,
    overwrite: o.Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be done to each layer, write nothing and stop.",
            rich_help_panel="Results",
        ),
    ] = False,
    json: o.JsonFile = None,
) -> None:
    """Compress a trained model after training, and write a run directory."""
    out = Output(json)
    run = None if dry_run and output is None else _free_run(output, overwrite=overwrite)
    work = request(
        model=model, weights=weights, calibration=calibration, evaluation=evaluation,
        data=o.DataOptions(scale, mean, std, resize, crop), samples=samples, passes=passes,
        scheme=DEFAULT_SCHEME if scheme is None else scheme,
        target=target, skip=skip, layer=layer, fallback=fallback, method=method, ranges=ranges,
        damping=damping, dtype=dtype, bn_reestimate=bn_reestimate, sequential=sequential,
        batch_size=batch_size, device=device, device_memory=device_memory, seed=seed,
        no_baselines=no_baselines,
    )  # fmt: skip
    wish = _wish(
        budget=budget, max_drop=max_drop, metric=by.value, scheme_given=scheme is not None,
        search_seconds=search_time, database=database, families=levels, free_edges=free_edges,
        latency_file=latency_table, allow_foreign_latency=allow_foreign_latency, threads=threads,
        measured_batch=measured_batch,
    )  # fmt: skip
    _check_wish(work, wish)
    if dry_run or run is None:
        if wish is None:
            _show_plan(out, work)
        else:
            show_estimate(out, work, wish)
        return
    made = _compress_to(out, work, run, overwrite=overwrite, wish=wish)
    if work.target.measured:
        labelled = f" --data {evaluation}" if evaluation else ""
        out.line(f"next: obc-deploy bench {run}{labelled}")
    else:
        out.line(f"next: obc-deploy export {run} --engine")
    out.results(_description(made, run))


def run(
    model: o.ModelName,
    calibration: o.Calibration,
    output: o.RunOutput,
    scheme: o.SchemeText = None,
    budget: o.BudgetText = None,
    max_drop: o.MaxDrop = None,
    by: o.DropMetric = o.MetricName.LATENCY,
    weights: o.WeightsName = None,
    target: o.TargetName = None,
    skip: o.Skip = None,
    layer: o.LayerSchemes = None,
    fallback: o.Fallback = None,
    search_time: o.SearchTime = 60.0,
    database: o.DatabaseFolder = None,
    levels: o.Families = None,
    free_edges: o.FreeEdges = False,
    method: o.MethodName = o.Method.EXACT_OBS,
    samples: o.SampleCount = o.DEFAULT_SAMPLES,
    passes: o.Passes = 1,
    batch_size: o.BatchSize = 64,
    device: o.Device = "auto",
    device_memory: o.DeviceMemory = None,
    damping: o.Damping = 0.01,
    dtype: o.PrecisionName = o.Precision.FLOAT32,
    ranges: o.RangesName = o.Ranges.MSE,
    bn_reestimate: o.Reestimate = True,
    sequential: o.Sequential = False,
    evaluation: o.Evaluation = None,
    scale: o.PixelScale = None,
    mean: o.PixelMean = None,
    std: o.PixelDeviation = None,
    resize: o.Resize = 256,
    crop: o.Crop = 224,
    seed: o.Seed = 0,
    no_baselines: o.NoBaselines = False,
    overwrite: o.Overwrite = False,
    runtime: o.RuntimeNames = None,
    threads: o.Threads = None,
    rounds: o.Rounds = 5,
    samples_per_round: Annotated[
        int,
        typer.Option(
            "--samples-per-round",
            min=1,
            metavar="N",
            help="Inferences timed in a round.",
            rich_help_panel="Measuring",
        ),
    ] = 10,
    measured_batch: Annotated[
        int,
        typer.Option(
            "--measured-batch",
            min=1,
            metavar="N",
            help="Samples in a timed inference.",
            rich_help_panel="Measuring",
        ),
    ] = 1,
    processes: o.Processes = 2,
    time_budget: o.TimeBudget = 20.0,
    allow_slower: o.AllowSlower = False,
    report: o.ReportFile = None,
    json: o.JsonFile = None,
) -> None:
    """Compress, export, measure in every runtime that works here, and write the report."""
    out = Output(json)
    free = _free_run(output, overwrite=overwrite)
    plan = MeasuringPlan(
        runtime, threads, measured_batch, rounds, samples_per_round, processes, time_budget, seed
    )
    require_runtimes(runtime)
    work = request(
        model=model, weights=weights, calibration=calibration, evaluation=evaluation,
        data=o.DataOptions(scale, mean, std, resize, crop), samples=samples, passes=passes,
        scheme=DEFAULT_SCHEME if scheme is None else scheme,
        target=target, skip=skip, layer=layer, fallback=fallback, method=method, ranges=ranges,
        damping=damping, dtype=dtype, bn_reestimate=bn_reestimate, sequential=sequential,
        batch_size=batch_size, device=device, device_memory=device_memory, seed=seed,
        no_baselines=no_baselines,
    )  # fmt: skip
    wish = _wish(
        budget=budget, max_drop=max_drop, metric=by.value, scheme_given=scheme is not None,
        search_seconds=search_time, database=database, families=levels, free_edges=free_edges,
        latency_file=None, allow_foreign_latency=False, threads=threads,
        measured_batch=measured_batch,
    )  # fmt: skip
    _check_wish(work, wish)
    _compress_to(out, work, free, overwrite=overwrite, wish=wish)
    export_run(out, free, target_of(free))
    labelled = None if evaluation is None else work.data.load(evaluation)
    bench_runs(out, [free], plan, labelled, report=report, allow_slower=allow_slower)
