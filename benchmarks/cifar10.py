"""CIFAR-10 networks: accuracy before and after, predicted against measured speedup.

    python -m obc_deploy.benchmarks.cifar10 --network cifar10_resnet20

needs the trained networks and images that `reference_networks` describes. Writes
`results/<network>-<method>.json` (measurements with every sample, machine, command) and the same as
a table, `.md`. With `--runs FOLDER` each compressed network is kept there, and not made again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from obc_deploy.benchmarks.comparison import benchmark
from obc_deploy.benchmarks.measurement import Measurement
from obc_deploy.benchmarks.record import RESULTS, say_stages, take_record
from obc_deploy.benchmarks.reference_networks import load_network, load_samples, needed_shared_data
from obc_deploy.benchmarks.statistics import wilson_interval
from obc_deploy.benchmarks.table import markdown_table
from obc_deploy.calibrated import CalibratedModel, calibrate
from obc_deploy.compression import CompressedModel, compress, dense_baselines
from obc_deploy.errors import ObcDeployError
from obc_deploy.run_directory import load_run
from obc_deploy.targets import DEEPSPARSE

SCHEMES = ("w8a8", "2:4+w8a8", "block4@0.5+w8a8", "block4@0.8+w8a8", "block4@0.9+w8a8")


def accuracy_rows(models: list[CompressedModel]) -> list[dict[str, Any]]:
    """Top-1 accuracies in PyTorch, quantizers simulated, beside the dense network's."""
    rows = []
    for model in models:
        accuracy = model.manifest.accuracy
        if accuracy is None:
            continue
        low, high = wilson_interval(round(accuracy.compressed * accuracy.samples), accuracy.samples)
        rows.append(
            {
                "scheme": model.scheme,
                "dense": accuracy.dense,
                "compressed": accuracy.compressed,
                "interval": [low, high],
                "samples": accuracy.samples,
                "seconds": model.manifest.seconds,
                "layers": [
                    {"name": r.name, "scheme": r.scheme, "error": r.error, "density": r.density}
                    for r in model.manifest.layers
                ],
            }
        )
    return rows


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """The same as a Markdown table."""
    lines = [
        "| scheme | dense, % | compressed, % | 95 % interval | images | compression, s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['scheme']} | {100 * row['dense']:.2f} | {100 * row['compressed']:.2f} | "
        f"{100 * row['interval'][0]:.2f} to {100 * row['interval'][1]:.2f} | {row['samples']} | "
        f"{row['seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def evaluate(
    network: str, *, schemes: tuple[str, ...], method: str, calibration: int, images: int,
    timed: int, threads: int, seed: int, runs: Path | None = None,
    runtimes: list[str] | None = None,
) -> tuple[list[CompressedModel], list[Measurement]]:  # fmt: skip
    """Compress one network by each scheme, then measure all of them side by side."""
    shared = needed_shared_data()
    test = load_samples(network, "test", shared)
    say = say_stages()

    @cache
    def calibrated() -> CalibratedModel:
        return calibrate(
            load_network(network, shared),
            load_samples(network, "calib", shared),
            limit=calibration,
            source=network,
            batch_size=128,
            levels=schemes,
            seed=seed,
        )

    models = []
    for scheme in schemes:
        kept = None if runs is None else runs / f"{network}-{method}-{scheme.replace(':', '-')}"
        if kept is not None and kept.is_dir():
            models.append(load_run(kept))
            continue
        print(f"{network}: {scheme}", file=sys.stderr, flush=True)
        model = compress(
            calibrated(),
            scheme=scheme,
            target=DEEPSPARSE,
            fallback="w8a8",
            method=method,
            evaluation=test.take(images),
            baselines=False,
            seed=seed,
            progress=say,
        )
        if not models:
            model = replace(model, baselines=dense_baselines(calibrated(), target=DEEPSPARSE))
        if kept is not None:
            model.save(kept)
        models.append(model)
    if not timed:
        return models, []
    dense, int8 = models[0].baselines
    measurements = benchmark(
        [dense, int8, *models], runtimes=runtimes, data=test.take(timed), threads=threads,
        rounds=16, samples_per_round=10, processes=3, seed=seed, progress=say,
    )  # fmt: skip
    return models, measurements


def main(arguments: list[str] | None = None) -> int:
    """Run one network and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="cifar10_resnet20")
    parser.add_argument("--scheme", action="append", help="may be given several times")
    parser.add_argument("--method", default="exact_obs")
    parser.add_argument("--calibration", type=int, default=1024, help="calibration images")
    parser.add_argument("--images", type=int, default=5000, help="test images in PyTorch")
    parser.add_argument(
        "--timed", type=int, default=1000, help="test images in each runtime; 0: do not time"
    )
    parser.add_argument("--runtime", action="append", help="where to time; all that work here")
    parser.add_argument("--runs", type=Path, help="keep compressed networks in this folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    try:
        models, measurements = evaluate(
            options.network,
            schemes=tuple(options.scheme or SCHEMES),
            method=options.method,
            calibration=options.calibration,
            images=options.images,
            timed=options.timed,
            threads=options.threads,
            seed=options.seed,
            runs=options.runs,
            runtimes=options.runtime,
        )
    except ObcDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not measurements:
        print(accuracy_table(accuracy_rows(models)))
        return 0
    name = f"{options.network}-{options.method}".replace("_", "-")
    rows = accuracy_rows(models)
    # Raw samples by worker stay; the flat copies of them would double the file.
    kept = [
        row.model_dump(mode="json", exclude={"latency_ms": {"samples"}, "end_to_end": {"samples"}})
        for row in measurements
    ]
    record = take_record("cifar10")
    text = (
        f"# {options.network}, {options.method}\n\n{record.head}, "
        f"{options.threads} thread, batch 1.\n\n## Accuracy in PyTorch, quantizers simulated\n\n"
        f"{accuracy_table(rows)}\n\n## Measured in the runtimes\n\n{markdown_table(measurements)}\n"
    )
    record.write(options.output, name, {"accuracy": rows, "measurements": kept}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
