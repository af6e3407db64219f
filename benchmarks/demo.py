"""The demo: the main job on an embedded network, from a trained model to measured speedups.

A digits classifier of 0.83 million weights is compressed by four schemes, exported, run in every
runtime that works here, and measured against its dense float and dense int8 selves.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from obc_deploy.benchmarks.comparison import benchmark
from obc_deploy.benchmarks.measurement import Measurement, write_measurements
from obc_deploy.benchmarks.report import write_plot, write_report
from obc_deploy.benchmarks.table import markdown_table
from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress, dense_baselines
from obc_deploy.errors import RunDirectoryError
from obc_deploy.targets import DEEPSPARSE

SCHEMES = ("w8a8", "2:4+w8a8", "block4@0.8+w8a8", "block4@0.9+w8a8")
QUICK_SCHEMES = ("block4@0.9+w8a8",)
CALIBRATION_SAMPLES = 256
MODEL = "obc_deploy.demo_network:digits_net"
MARKER = ".obc-deploy-demo"


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        measurements: one a variant and runtime.
        report: the HTML report.
        measurements_file: the same measurements as JSON.
        runs: run directories by scheme.
    """

    measurements: Sequence[Measurement]
    report: Path
    measurements_file: Path
    runs: dict[str, Path]


def _clear(output: Path) -> None:
    """Empty the folder of an earlier demo, and no other."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARKER).is_file():
            raise RunDirectoryError(
                f"'{output}' holds something else than an earlier demo; choose another with -o"
            )
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).write_text("made by 'obc-deploy demo'; it may be made anew\n")
    except OSError as error:
        raise RunDirectoryError(f"cannot write to '{output}': {error.strerror}") from error


def run_demo(
    output: Path,
    *,
    threads: int | None = 1,
    quick: bool = False,
    runtimes: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> DemoResult:
    """Compress, export, run and measure the embedded digits network.

    Args:
        output: folder for run directories, artifacts, measurements and the report.
        threads: threads of the runtimes.
        quick: one scheme and few samples: shows that all parts work.
        runtimes: targets to measure; every one that works here where None.
        seed: of every random choice.
        progress: called with what is being done and the share of it.

    Raises:
        RunDirectoryError: `output` holds something else, or cannot be written.
        CalibrationError: scikit-learn, which has the digits, is not installed.
    """
    from obc_deploy.demo_network import calibration_samples, digits_net, test_samples

    say = progress or (lambda what, share: None)
    evaluation = test_samples()
    _clear(output)
    schemes = QUICK_SCHEMES if quick else SCHEMES
    calibrated = calibrate(
        digits_net(),
        calibration_samples(),
        limit=64 if quick else CALIBRATION_SAMPLES,
        source=MODEL,
        levels=schemes,
        seed=seed,
    )
    runs: dict[str, Path] = {}
    baselines = dense_baselines(calibrated, target=DEEPSPARSE, progress=say)
    models = []
    for scheme in schemes:
        # The first layer reads a single channel, which no block divides: it stays dense in int8.
        model = compress(
            calibrated,
            scheme=scheme,
            target=DEEPSPARSE,
            fallback="w8a8",
            evaluation=evaluation,
            baselines=False,
            seed=seed,
            progress=lambda what, share, scheme=scheme: say(f"{scheme}: {what}", share),  # type: ignore[misc]
        )
        models.append(model)
        runs[scheme] = model.save(output / "runs" / scheme.replace(":", "-"))
    measurements = benchmark(
        [*baselines, *models],
        runtimes=runtimes,
        data=evaluation.take(100) if quick else evaluation,
        threads=threads,
        rounds=2 if quick else 16,
        samples_per_round=5 if quick else 10,
        processes=1 if quick else 2,
        artifacts=output / "artifacts",
        seed=seed,
        progress=progress,
    )
    file = write_measurements(output / "measurements.json", measurements)
    report = output / "report.html"
    write_report(report, models[-1].manifest.model_dump(mode="json"), measurements)
    (output / "table.md").write_text(markdown_table(measurements) + "\n", encoding="utf-8")
    write_plot(output / "predicted.svg", measurements)
    return DemoResult(measurements, report, file, runs)
