"""Ways to choose a plan, at equal cost: uniform, knapsack, and the searches past it.

    python -m obc_deploy.benchmarks.search --network cifar10_resnet20 --budget macs:3x

needs the trained networks and images that `reference_networks` describes. Every way gets the same
database, budget and number of evaluated candidates; judged are the loss on calibration samples that
the searches see, and accuracy on test images that they do not. Writes `results/search-<network>`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from obc_deploy.benchmarks.record import RESULTS, take_record
from obc_deploy.benchmarks.reference_networks import load_network, load_samples, needed_shared_data
from obc_deploy.benchmarks.statistics import wilson_interval
from obc_deploy.benchmarks.table import percent
from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress
from obc_deploy.database import as_families
from obc_deploy.errors import ObcDeployError
from obc_deploy.planning import FoundPlan, Planner, PlanSettings, make_planner
from obc_deploy.search import (
    Budget,
    Choice,
    LayerChoices,
    Move,
    Plan,
    SearchSpace,
    as_budgets,
    refine,
    solve_dynamic,
    solve_milp,
)

MOVES = {
    "mutations": (Move.MUTATION,),
    "coefficients": (Move.COEFFICIENTS,),
    "both": (Move.MUTATION, Move.COEFFICIENTS),
}


@dataclass(frozen=True)
class Row:
    """One way to choose.

    Attributes:
        budget: its text.
        way: what was done.
        loss: on calibration samples.
        accuracy: on test images.
        interval: 95 % Wilson interval of it.
        factor: how many times less than dense it costs.
    """

    budget: str
    way: str
    loss: float
    accuracy: float
    interval: tuple[float, float]
    factor: float


def uniform_plan(planner: Planner, budget: Budget) -> Plan | None:
    """The least sparse scheme for all layers that keeps the budget, or None."""
    widest = max(planner.space.layers, key=lambda layer: len(layer.choices))
    fitting = []
    for choice in widest.choices:
        plan = planner.space.plan(planner.uniform(choice.scheme), method="uniform")
        if planner.space.fits(plan, (budget,)):
            fitting.append(plan)
    return min(fitting, key=lambda plan: plan.loss, default=None)


def unweighed(space: SearchSpace, sensitivities: dict[str, float]) -> SearchSpace:
    """The space whose losses are layer errors as they are, whatever the network makes of them."""
    layers = tuple(
        LayerChoices(
            layer.name,
            tuple(
                Choice(
                    choice.scheme,
                    choice.loss / sensitivities[layer.name] if sensitivities[layer.name] else 0.0,
                    choice.costs,
                )
                for choice in layer.choices
            ),
        )
        for layer in space.layers
    )
    return replace(space, layers=layers)


def ways(planner: Planner, budget: Budget, evaluations: int, seed: int) -> dict[str, Plan]:
    """A plan by each way that has one."""
    found: dict[str, Plan] = {}
    uniform = uniform_plan(planner, budget)
    if uniform is not None:
        found["one scheme for all layers"] = uniform
    bare = solve_milp(unweighed(planner.space, dict(planner.sensitivities)), (budget,))
    found["knapsack of layer errors"] = planner.space.plan(bare.schemes, method="milp")
    found["knapsack, errors times sensitivities"] = solve_milp(planner.space, (budget,))
    found["the same by dynamic programming"] = solve_dynamic(planner.space, (budget,))
    start = found["knapsack, errors times sensitivities"]
    for name, moves in MOVES.items():
        found[f"then {evaluations} candidates: {name}"] = refine(
            start, planner.space, (budget,), lambda plan: planner.stitched.loss(plan.schemes),
            evaluations=evaluations, seed=seed, moves=moves,
        ).plan  # fmt: skip
    return found


def compare(
    planner: Planner, budget: Budget, *, evaluations: int, seed: int, accuracy: Callable[..., float]
) -> list[tuple[str, Plan, float, float]]:
    """Way, plan, calibration loss and accuracy."""
    rows = []
    for way, plan in ways(planner, budget, evaluations, seed).items():
        rows.append((way, plan, planner.stitched.loss(plan.schemes), accuracy(plan)))
        print(f"{budget}: {way}", file=sys.stderr, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Compare on one network and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="cifar10_resnet20")
    parser.add_argument("--budget", action="append", help="may be given several times")
    parser.add_argument("--levels", default="block4,dense")
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--calibration", type=int, default=1024)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--database", type=Path, help="the cache's where not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    budgets = [as_budgets(text)[0] for text in options.budget or ("macs:2x", "macs:3x", "macs:4x")]
    record = take_record("search")
    rows: list[Row] = []
    try:
        shared = needed_shared_data()
        calibrated = calibrate(
            load_network(options.network, shared),
            load_samples(options.network, "calib", shared),
            limit=options.calibration,
            source=options.network,
            batch_size=128,
            seed=options.seed,
        )
        test = load_samples(options.network, "test", shared).take(options.images)
        settings = PlanSettings(
            database=options.database, families=as_families(options.levels), seed=options.seed
        )
        planner = make_planner(calibrated, settings)
        dense = 0.0

        def accuracy(plan: Plan) -> float:
            nonlocal dense
            planner.hand_over(plan.schemes)
            found = FoundPlan((), plan, planner.space, None, planner.edges, None)
            made = compress(calibrated, plan=found, evaluation=test, baselines=False)
            assert made.manifest.accuracy is not None
            dense = made.manifest.accuracy.dense
            return made.manifest.accuracy.compressed

        for budget in budgets:
            for way, plan, loss, share in compare(
                planner, budget, evaluations=options.evaluations, seed=options.seed,
                accuracy=accuracy,
            ):  # fmt: skip
                factor = planner.space.dense_cost(budget.metric) / plan.costs[budget.metric]
                interval = wilson_interval(round(share * len(test)), len(test))
                rows.append(Row(str(budget), way, loss, share, interval, factor))
    except ObcDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    lines = [
        f"# {options.network}: ways to choose a plan\n",
        f"{record.head}, PyTorch, {len(planner.stitched.samples)} calibration samples judge, "
        f"{len(test)} test images; dense {percent(dense)} %.\n",
        "| budget | way | calibration loss | accuracy, % | 95 % interval | reached |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.budget} | {row.way} | {row.loss:.4g} | {100 * row.accuracy:.2f} | "
        f"{100 * row.interval[0]:.2f} to {100 * row.interval[1]:.2f} | {row.factor:.2f}x |"
        for row in rows
    ]
    name = f"search-{options.network}".replace("_", "-")
    record.write(
        options.output, name, {"dense": dense, "rows": [asdict(row) for row in rows]},
        "\n".join(lines) + "\n",
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
