"""Budgets on the CIFAR-10 networks: accuracy against measured speedup, planned and uniform.

    python -m obc_deploy.benchmarks.budgets --network cifar10_resnet20 --budget latency:8x

needs the trained networks and images that `reference_networks` describes. Plans for all budgets
and uniform schemes come from one database, are compressed, exported and measured in one interleaved
run with the dense networks. Writes `results/budgets-<network>-<target>` as JSON, Markdown and SVG.
With `--runs FOLDER` compressed networks are kept there, and not made again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from obc_deploy.benchmarks.comparison import benchmark
from obc_deploy.benchmarks.curve import curve_of, curve_table, plot_curve, schemes_of
from obc_deploy.benchmarks.record import RESULTS, take_record
from obc_deploy.benchmarks.reference_networks import load_network, load_samples, needed_shared_data
from obc_deploy.benchmarks.table import percent
from obc_deploy.calibrated import CalibratedModel, Stage, calibrate
from obc_deploy.compression import CompressedModel, compress, dense_baselines
from obc_deploy.data import Samples
from obc_deploy.database import as_families
from obc_deploy.errors import ObcDeployError, RunDirectoryError
from obc_deploy.planning import Planner, PlanSettings, planner_for
from obc_deploy.run_directory import load_run
from obc_deploy.schemes import Scheme
from obc_deploy.search import as_budgets
from obc_deploy.targets import Target, as_target


@dataclass(frozen=True)
class Making:
    """What every network of the curve is made with.

    Attributes:
        calibrated: the dense network.
        target: where it is measured.
        test: labelled images.
        sequential: whether layers are calibrated on compressed inputs.
        runs: folder of compressed networks, or None.
        say: told what is being done.
    """

    calibrated: CalibratedModel
    target: Target
    test: Samples
    sequential: bool
    runs: Path | None
    say: Stage

    def planned(self, planner: Planner, budget: str) -> CompressedModel:
        """A network for a budget."""
        found = planner.find(budget, progress=self.say)
        planner.hand_over(found.plan.schemes)
        return compress(
            self.calibrated, plan=found, target=self.target, evaluation=self.test,
            sequential=self.sequential, baselines=False, progress=self.say,
        )  # fmt: skip

    def uniform(self, planner: Planner, text: str) -> CompressedModel:
        """One scheme on every layer that can have it."""
        schemes = planner.uniform(Scheme.parse(text))
        planner.hand_over(schemes)
        return compress(
            self.calibrated, scheme=text, layer_schemes=schemes, target=self.target,
            evaluation=self.test, sequential=self.sequential, baselines=False, progress=self.say,
        )  # fmt: skip

    def kept(self, name: str) -> Path | None:
        """Where a network is kept."""
        return None if self.runs is None else self.runs / name.replace(":", "-").replace(",", "_")

    def known(self, name: str) -> CompressedModel | None:
        """A network that was kept."""
        folder = self.kept(name)
        try:
            return None if folder is None else load_run(folder)
        except RunDirectoryError:
            return None


def networks(
    making: Making, planner: Planner, budgets: list[str], uniform: list[str]
) -> dict[str, CompressedModel]:
    """Every network of the curve by name; the first has the dense ones it is measured against."""
    models: dict[str, CompressedModel] = {}
    for name in (*budgets, *uniform):
        model = making.known(name)
        if model is None:
            print(name, file=sys.stderr, flush=True)
            make = making.planned if name in budgets else making.uniform
            model = make(planner, name)
            if not models:
                baselines = dense_baselines(making.calibrated, target=making.target)
                model = replace(model, baselines=baselines)
            if (folder := making.kept(name)) is not None:
                model.save(folder)
        models[name] = model
    return models


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
    last = ""

    def say(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            print(what, file=sys.stderr, flush=True)
            last = what

    try:
        budgets = [",".join(map(str, as_budgets(text))) for text in options.budget]
        shared = needed_shared_data()
        target = as_target(options.target)
        test = load_samples(options.network, "test", shared)
        calibrated = calibrate(
            load_network(options.network, shared),
            load_samples(options.network, "calib", shared),
            limit=options.calibration,
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
        making = Making(
            calibrated, target, test.take(options.images), options.sequential, options.runs, say
        )
        models = networks(making, planner, budgets, options.uniform or [])
        measurements = benchmark(
            list(models.values()), runtimes=[target.name], data=test.take(options.timed),
            threads=options.threads, rounds=options.rounds, processes=3, seed=options.seed,
            progress=say,
        )  # fmt: skip
    except ObcDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    table = planner.table
    predicted = {
        name: None if table is None else table.speedup(schemes_of(model))
        for name, model in models.items()
    }
    curve = curve_of(models, predicted, measurements, target=target.name)
    error_text = (
        ""
        if curve.median_latency_error is None
        else f"\nPredicted latencies of the plans are off by "
        f"{100 * curve.median_latency_error:.0f} % in the median.\n"
    )
    dense = "" if curve.dense_accuracy is None else f", dense {percent(curve.dense_accuracy)} %"
    mode = "sequential" if options.sequential else "independent"
    name = f"budgets-{options.network}-{target.name}".replace("_", "-")
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
        f"{error_text}"
    )
    plot_curve(options.output / f"{name}.svg", curve)
    record.write(
        options.output, name,
        {
            "curve": curve.model_dump(mode="json"),
            "median_latency_error": curve.median_latency_error,
            "plans": plans,
            "table": None if table is None else table.model_dump(mode="json"),
            "measurements": kept,
        },
        text,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
