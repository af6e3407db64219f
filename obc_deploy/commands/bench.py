"""`obc-deploy bench`, `report` and `demo`: what it was worth, in numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obc_deploy.commands import options as o
from obc_deploy.commands.output import Output, check_writable
from obc_deploy.errors import CalibrationError, MeasurementError, SlowerThanDenseError
from obc_deploy.targets import TARGETS, as_target

if TYPE_CHECKING:
    from obc_deploy.benchmarks.demo import DemoResult
    from obc_deploy.benchmarks.measurement import Measurement
    from obc_deploy.data import Samples

MEASUREMENTS = "measurements.json"
REPORT = "report.html"
ARTIFACTS = "artifacts"
DEMO_FOLDER = Path("obc-demo")


@dataclass(frozen=True)
class MeasuringPlan:
    """What is measured, where and how often.

    Attributes:
        targets: names of targets; None for those whose runtime works here.
        threads: threads of the runtime; None for the physical cores.
        batch_size: samples in one inference.
        rounds: rounds in which all variants take turns.
        samples: inferences in a round.
        processes: fresh workers a variant.
        seconds: after which a slow network takes fewer samples.
        seed: of every random choice.
    """

    targets: Sequence[str] | None
    threads: int | None
    batch_size: int
    rounds: int
    samples: int
    processes: int
    seconds: float
    seed: int


def require_runtimes(names: Sequence[str] | None) -> None:
    """Make sure that the runtimes of these targets are there, before the work that they measure.

    Raises:
        TargetError: there is no such target, or it is not measured.
        RuntimeMissingError: its runtime does not work here.
    """
    from obc_deploy.runtimes.registry import require_target

    for name in names or ():
        require_target(as_target(name))


def bench_runs(
    out: Output,
    runs: Sequence[Path],
    plan: MeasuringPlan,
    data: Samples | None,
    *,
    report: Path | None = None,
    allow_slower: bool = False,
) -> None:
    """Measure, print the table, and write measurements, report and JSON.

    Raises:
        MeasurementError: no compressed network could be timed.
        SlowerThanDenseError: one is slower than a dense baseline wherever it was measured.
    """
    from obc_deploy.benchmarks.comparison import benchmark
    from obc_deploy.benchmarks.measurement import write_measurements

    first = runs[0] if runs[0].is_dir() else None
    with out.working() as say:
        rows = benchmark(
            list(runs),
            runtimes=plan.targets,
            data=data,
            threads=plan.threads,
            batch_size=plan.batch_size,
            rounds=plan.rounds,
            samples_per_round=plan.samples,
            processes=plan.processes,
            time_budget_s=plan.seconds,
            seed=plan.seed,
            artifacts=first / ARTIFACTS if first is not None else None,
            progress=say,
        )
    _show_measurements(out, rows)
    if first is not None:
        out.line(f"measurements: {write_measurements(first / MEASUREMENTS, rows)}")
    place = report or (first / REPORT if first is not None else None)
    if place is not None:
        out.line(f"report: {_write_report(place, runs[0], rows)}")
    out.results([row.model_dump(mode="json") for row in rows])
    check_worth(rows, allow_slower=allow_slower)


def _show_measurements(out: Output, rows: Sequence[Measurement]) -> None:
    from obc_deploy.benchmarks.statistics import is_noise
    from obc_deploy.benchmarks.table import rich_table

    out.show(rich_table(rows, width=out.console.width))
    about: dict[str, list[str]] = {}
    spread: set[tuple[str, str]] = set()
    for row in rows:
        for message in (*((row.error,) if row.error else ()), *row.warnings):
            if is_noise(message):
                spread.add((row.variant, row.runtime))
            else:
                about.setdefault(message, []).append(row.variant)
    for message, names in about.items():
        out.warn(f"{', '.join(dict.fromkeys(names))}: {message}")
    if spread:
        out.warn(
            f"{len(spread)} of {len(rows)} rows have noisy timings: the report says how; stop "
            "other work on this machine, or take more rounds"
        )


def _write_report(place: Path, run: Path, rows: Sequence[Measurement]) -> Path:
    from obc_deploy.artifacts import manifest_path
    from obc_deploy.benchmarks.report import manifest_of, write_report
    from obc_deploy.manifest import FILE_NAME

    if run.is_dir():
        return write_report(place, manifest_of(run / FILE_NAME), rows)
    compression = manifest_of(manifest_path(run)).get("compression")
    return write_report(place, compression if isinstance(compression, dict) else {}, rows)


def check_worth(rows: Sequence[Measurement], *, allow_slower: bool) -> None:
    """Whether compression was worth it: each compressed network, somewhere, against the dense ones.

    Raises:
        MeasurementError: no compressed network could be timed.
        SlowerThanDenseError: one is slower than a dense baseline wherever it was measured.
    """
    compressed = [row for row in rows if row.role == "compressed"]
    timed = [row for row in compressed if row.latency_ms is not None]
    if compressed and not timed:
        raise MeasurementError(
            f"'{compressed[0].variant}' could not be measured in {compressed[0].runtime}: "
            f"{compressed[0].error or 'there are no timings'}"
        )
    if allow_slower:
        return
    for variant in dict.fromkeys(row.variant for row in timed):
        own = [row for row in timed if row.variant == variant]
        if all(row.slower_than_dense for row in own):
            ratios = ", ".join(f"{_worst_ratio(row):.2f}x in {row.runtime}" for row in own)
            raise SlowerThanDenseError(
                f"'{variant}' is slower than a dense network wherever it was measured ({ratios}); "
                "use the dense int8 network, another scheme or runtime, or pass --allow-slower"
            )


def _worst_ratio(row: Measurement) -> float:
    ratios = (row.speedup_vs_dense_fp32, row.speedup_vs_dense_int8)
    return min(ratio for ratio in ratios if ratio is not None)


def _labelled(name: str, options: o.DataOptions, run: Path) -> Samples:
    """Labelled samples; uint8 ones are pre-processed as the run's own unless told otherwise."""
    from obc_deploy.data import Preprocessing
    from obc_deploy.manifest import read_manifest

    found = options.load(name)
    if found.labels is None:
        raise CalibrationError(
            f"--data '{name}' has no labels to measure accuracy against; add an array 'labels', or "
            "leave --data out"
        )
    own = None
    if run.is_dir():
        own = read_manifest(run).calibration.preprocessing
    if found.preprocessing is None and own is not None:
        found = replace(found, preprocessing=Preprocessing.from_dict(own))
    return found


def _check_subjects(runs: Sequence[Path]) -> None:
    from obc_deploy.artifacts import load_artifact
    from obc_deploy.manifest import read_manifest

    for run in runs:
        if run.suffix == ".onnx":
            load_artifact(run)
        else:
            read_manifest(run)


def bench(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            show_default=False,
            help="Run directories, or exported .onnx files with their manifests; or .onnx files "
            "from anywhere, which are timed beside the first of them.",
        ),
    ],
    runtime: o.RuntimeNames = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="DATA",
            rich_help_panel="Data",
            show_default="none",
            help="Labelled samples: accuracy, and agreement with PyTorch, in each runtime.",
        ),
    ] = None,
    scale: o.PixelScale = None,
    mean: o.PixelMean = None,
    std: o.PixelDeviation = None,
    resize: o.Resize = 256,
    crop: o.Crop = 224,
    threads: o.Threads = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            min=1,
            metavar="N",
            help="Samples in a timed inference.",
            rich_help_panel="Measuring",
        ),
    ] = 1,
    rounds: o.Rounds = 5,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            "--samples-per-round",
            min=1,
            metavar="N",
            help="Inferences timed in a round.",
            rich_help_panel="Measuring",
        ),
    ] = 10,
    processes: o.Processes = 2,
    time_budget: o.TimeBudget = 20.0,
    seed: o.Seed = 0,
    allow_slower: o.AllowSlower = False,
    report: o.ReportFile = None,
    json: o.JsonFile = None,
) -> None:
    """Measure run directories beside their dense fp32 and int8 baselines, in turns.

    Of .onnx files from elsewhere, without manifests, the speed is measured alone, beside the first.
    """
    from obc_deploy.commands.bench_files import are_plain, bench_files
    from obc_deploy.commands.compress import look_here

    look_here()
    out = Output(json)
    if report is not None:
        check_writable(report, "the report")
    plan = MeasuringPlan(
        runtime, threads, batch_size, rounds, samples, processes, time_budget, seed
    )
    require_runtimes(runtime)
    if are_plain(runs):
        if data is not None or report is not None:
            option = "--data" if data is not None else "--report"
            raise MeasurementError(
                f"{option} needs what an exported file's manifest says: leave it out, or measure "
                "files that 'obc-deploy export RUN' made, beside their manifests"
            )
        bench_files(out, runs, plan)
        return
    _check_subjects(runs)
    labelled = None
    if data is not None:
        labelled = _labelled(data, o.DataOptions(scale, mean, std, resize, crop), runs[0])
    bench_runs(out, runs, plan, labelled, report=report, allow_slower=allow_slower)


def report(
    run: o.RunDirectory,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where it goes.",
            show_default="RUN/report.html",
        ),
    ] = None,
    json: o.JsonFile = None,
) -> None:
    """Draw a run's report.html again, from its manifest and measurements alone."""
    from obc_deploy.benchmarks.measurement import read_measurements
    from obc_deploy.manifest import read_manifest

    out = Output(json)
    read_manifest(run)
    rows = read_measurements(run / MEASUREMENTS)
    written = _write_report(output or run / REPORT, run, rows)
    out.line(f"report: {written}")
    out.results({"report": os.fspath(written), "measurements": len(rows)})


def demo(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for runs, table and report."),
    ] = DEMO_FOLDER,
    runtime: o.RuntimeNames = None,
    threads: Annotated[
        int,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            help="Threads of the runtimes, each pinned to a core.",
            rich_help_panel="Measuring",
        ),
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One scheme and few samples.")] = False,
    seed: o.Seed = 0,
    json: o.JsonFile = None,
) -> None:
    """Compress, export and measure a small digits network that comes with the package."""
    out = Output(json)
    require_runtimes(runtime)
    with out.working() as say:
        say("loading the digits and their network", 0.0)
        from obc_deploy.benchmarks.demo import run_demo

        made = run_demo(
            output, threads=threads, quick=quick, runtimes=runtime, seed=seed, progress=say
        )
    _show_measurements(out, made.measurements)
    out.line(f"measurements: {made.measurements_file}")
    out.line(f"report: {made.report}")
    out.results([row.model_dump(mode="json") for row in made.measurements])
    for command in _next_commands(made):
        out.line(f"next: {command}")


def _next_commands(made: DemoResult) -> list[str]:
    """What to try after the demo, with the paths and runtimes that are there."""
    from obc_deploy.runtimes.registry import RUNTIMES

    timed = [row for row in made.measurements if row.variant in made.runs and row.latency_ms]
    commands = []
    if timed:
        best = min(timed, key=lambda row: row.latency_ms.p50 if row.latency_ms else math.inf)
        commands.append(f"obc-deploy audit {made.runs[best.variant]} --runtime {best.runtime}")
    measured = {target.runtime for target in TARGETS.values() if target.measured}
    known = (each.info() for name, each in RUNTIMES.items() if name in measured)
    missing = [info for info in known if not info.works]
    commands += [info.install_command for info in missing]
    commands.append("obc-deploy inspect torchvision:resnet18")
    commands.append("obc-deploy run --help")
    return commands[:3]
