"""Budgets on the CIFAR-10 networks: accuracy against measured speedup, planned and uniform.

    python -m obc_deploy.benchmarks.budgets --network cifar10_resnet20 --budget latency:8x

needs the trained networks and images that `reference_networks` describes. Plans for all budgets
and uniform schemes come from one database, are compressed, exported and measured in one interleaved
run with the dense networks. Writes `results/budgets-<network>-<target>` as JSON, Markdown and SVG,
`-sequential` behind it with `--sequential`.
With `--runs FOLDER` compressed networks are kept there, and not made again.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from obc_deploy.benchmarks.comparison import benchmark
from obc_deploy.benchmarks.curve import curve_of, curve_table, plot_curve
from obc_deploy.benchmarks.curve_networks import curve_networks, predicted_speedups
from obc_deploy.benchmarks.record import RESULTS, say_stages, take_record
from obc_deploy.benchmarks.reference_networks import load_network, load_samples, needed_shared_data
from obc_deploy.benchmarks.table import percent
from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress
from obc_deploy.database import as_families
from obc_deploy.errors import ObcDeployError
from obc_deploy.planning import PlanSettings, planner_for
from obc_deploy.search import as_budgets
from obc_deploy.targets import as_target


def main(arguments: list[str] | None = None) -> int:
    """Make one network's curve and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="cifar10_resnet20")
    parser.add_argument("--target", default="deepsparse")
    parser.add_argument("--budget", action="append", required=True, help="may be repeated")
    parser.add_argument("--uniform", action="append", help="schemes for all layers")
    parser.add_argument("--levels", default="block4+w8a8,w8a8")
    parser.add_argument("--search-time", type=float, default=60.0, help="seconds a plan")
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--calibration", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=1, help="over the calibration images")
    parser.add_argument("--images", type=int, default=5000, help="test images in PyTorch")
    parser.add_argument("--timed", type=int, default=500, help="test images in the runtime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--database", type=Path, help="the cache's where not given")
    parser.add_argument("--runs", type=Path, help="keep compressed networks in this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    record = take_record("budgets")
    say = say_stages()
    try:
        budgets = [",".join(map(str, as_budgets(text))) for text in options.budget]
        shared = needed_shared_data()
        target = as_target(options.target)
        test = load_samples(options.network, "test", shared)
        calibrated = calibrate(
            load_network(options.network, shared),
            load_samples(options.network, "calib", shared),
            limit=options.calibration,
            passes=options.passes,
            source=options.network,
            batch_size=128,
            seed=options.seed,
        )
        settings = PlanSettings(
            database=options.database, families=as_families(options.levels),
            search_seconds=options.search_time, threads=options.threads, seed=options.seed,
        )  # fmt: skip
        metrics = [one.metric for text in budgets for one in as_budgets(text)]
        planner = planner_for(calibrated, metrics, settings, target=target, progress=say)
        make = partial(
            compress, calibrated, target=target, evaluation=test.take(options.images),
            sequential=options.sequential, progress=say,
        )  # fmt: skip
        models = curve_networks(
            planner, budgets, options.uniform or [], make, folder=options.runs, progress=say
        )
        measurements = benchmark(
            list(models.values()), runtimes=[target.name], data=test.take(options.timed),
            threads=options.threads, rounds=options.rounds, processes=3, seed=options.seed,
            progress=say,
        )  # fmt: skip
    except ObcDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    table = planner.table
    change = ""
    if table is not None and table.change_ms > 0.0:
        change = (
            "\nWhere a layer that skips zeros is next to one that does not, the runtime takes "
            f"{1e3 * table.change_ms:.0f} us more; plans count that.\n"
        )
    predicted = predicted_speedups(planner, models)
    curve = curve_of(models, predicted, measurements, target=target.name)
    error_text = f"\n{curve.accuracy_of_predictions}\n" if curve.accuracy_of_predictions else ""
    dense = "" if curve.dense_accuracy is None else f", dense {percent(curve.dense_accuracy)} %"
    mode = "sequential" if options.sequential else "independent"
    suffix = "-sequential" if options.sequential else ""
    name = f"budgets-{options.network}-{target.name}{suffix}".replace("_", "-")
    kept = [
        row.model_dump(mode="json", exclude={"latency_ms": {"samples"}, "end_to_end": {"samples"}})
        for row in measurements
    ]
    plans = {
        key: {layer.name: layer.scheme for layer in model.manifest.layers}
        for key, model in models.items()
    }
    text = (
        f"# {options.network} on {target.name}: budgets\n\n{record.head}, {options.threads} "
        f"thread, batch 1, {mode}; accuracy in PyTorch on {curve.samples} test images{dense}; "
        f"speedups over dense fp32 in the same runtime and run.\n\n{curve_table(curve)}\n"
        f"{error_text}{change}"
    )
    record.write(
        options.output, name,
        {
            "curve": curve.model_dump(mode="json"),
            "median_latency_error": curve.median_latency_error,
            "drift": curve.drift,
            "median_error_beyond_drift": curve.median_error_beyond_drift,
            "plans": plans,
            "table": None if table is None else table.model_dump(mode="json"),
            "measurements": kept,
        },
        text,
    )  # fmt: skip
    plot_curve(options.output / f"{name}.svg", curve)
    return 0


if __name__ == "__main__":
    sys.exit(main())
