"""Budgets on the command line: what `compress` and `curve` do where schemes are searched for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from obc_deploy.errors import BudgetError, CalibrationError

if TYPE_CHECKING:
    from obc_deploy.calibrated import CalibratedModel
    from obc_deploy.commands.compress import Compression
    from obc_deploy.commands.output import Output, Stage
    from obc_deploy.compression import CompressedModel
    from obc_deploy.data import Samples
    from obc_deploy.planning import FoundPlan, Planner, PlanSettings
    from obc_deploy.search import Metric


@dataclass(frozen=True)
class Wish:
    """What a search was asked for, and with what.

    Attributes:
        budgets: what the network may cost, one text a plan; none where a drop is given.
        max_drop: points of accuracy that may be lost, or None.
        metric: what is saved within that drop.
        search_seconds: time for the search of one plan.
        database: its folder, or None for the cache.
        families: what may be chosen from, or None.
        free_edges: prune the first and the last layer too.
        latency_file: a latency table, or None.
        allow_foreign_latency: take it from another machine too.
        threads: threads that latencies are measured with.
        measured_batch: samples in a timed inference.
    """

    budgets: tuple[str, ...]
    max_drop: float | None
    metric: str
    search_seconds: float
    database: Path | None
    families: str | None
    free_edges: bool
    latency_file: Path | None
    allow_foreign_latency: bool
    threads: int | None
    measured_batch: int

    def __post_init__(self) -> None:
        from obc_deploy.search import as_budgets

        for text in self.budgets:
            as_budgets(text)
        if self.max_drop is not None and not (
            math.isfinite(self.max_drop) and self.max_drop >= 0.0
        ):
            raise BudgetError(
                f"--max-drop {self.max_drop:g}: give points of accuracy, 0 or more, such as 1.0"
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What plans are limited in."""
        from obc_deploy.search import Metric, as_budgets

        if self.max_drop is not None:
            return (Metric(self.metric),)
        return tuple(dict.fromkeys(one.metric for text in self.budgets for one in as_budgets(text)))

    def settings(self, calibrated: CalibratedModel, work: Compression) -> PlanSettings:
        """How plans are looked for.

        Raises:
            LayerError: a name matches nothing.
            SchemeError: a scheme or a family cannot be read, or does not divide a layer.
        """
        from obc_deploy.assignment import fixed_schemes
        from obc_deploy.database import as_families
        from obc_deploy.planning import PlanSettings

        return PlanSettings(
            database=self.database,
            families=None if self.families is None else as_families(self.families),
            free_edges=self.free_edges,
            fixed=fixed_schemes(
                calibrated.layers, skip=work.skip, layer_schemes=work.layer_schemes
            ),
            threads=self.threads,
            measured_batch=self.measured_batch,
            latency_file=self.latency_file,
            allow_foreign_latency=self.allow_foreign_latency,
            search_seconds=self.search_seconds,
            method=work.method,
            damping=work.damping,
            dtype=work.dtype,
            seed=work.seed,
        )


def planner_of(work: Compression, wish: Wish, calibrated: CalibratedModel, say: Stage) -> Planner:
    """The planner for a wish.

    Raises:
        ObcDeployError: as in `planner_for`.
    """
    from obc_deploy.planning import planner_for

    return planner_for(
        calibrated, wish.metrics, wish.settings(calibrated, work), target=work.target, progress=say
    )


def compress_within(work: Compression, wish: Wish, say: Stage) -> tuple[CompressedModel, list[str]]:
    """Compress for one budget or within a drop, and what to tell about it.

    Raises:
        ObcDeployError: no plan keeps the budget, or the model or the data cannot be used.
    """
    calibrated, evaluation = work.calibrate(say)
    if wish.max_drop is not None and evaluation is None:
        raise CalibrationError("--max-drop needs labelled samples: add --eval DATA")
    planner = planner_of(work, wish, calibrated, say)
    if wish.max_drop is None:
        found = planner.find(wish.budgets[0], progress=say)
        planner.hand_over(found.plan.schemes)
        make = work.maker(calibrated, evaluation, say)
        return make(plan=found, baselines=work.baselines), []
    return _within_drop(work, wish, calibrated, evaluation, planner, say)


def _within_drop(
    work: Compression,
    wish: Wish,
    calibrated: CalibratedModel,
    evaluation: Samples | None,
    planner: Planner,
    say: Stage,
) -> tuple[CompressedModel, list[str]]:
    from obc_deploy.benchmarks.table import times
    from obc_deploy.max_drop import DEFAULT_PROBES, fastest_within
    from obc_deploy.schemes import DENSE

    assert wish.max_drop is not None
    # The search's time is for the whole answer, not for each probe.
    searched = replace(planner.settings, search_seconds=wish.search_seconds / DEFAULT_PROBES)
    planner = replace(planner, settings=searched)
    made = work.maker(calibrated, evaluation, say)

    def make(plan: FoundPlan) -> CompressedModel:
        planner.hand_over(plan.plan.schemes)
        return made(plan=plan, baselines=False)

    (metric,) = wish.metrics
    found = fastest_within(planner, wish.max_drop, make, metric=metric)
    notes = [
        f"{metric.value}:{times(probe.factor)} loses {probe.drop:.2f} points"
        f"{'' if probe.kept else ': too many'}"
        for probe in found.probes
    ]
    if found.model is None:
        notes.append(
            f"no plan loses {wish.max_drop:g} points or less: the dense network is the answer"
        )
        dense = {layer.name: DENSE for layer in calibrated.layers}
        return made(layer_schemes=dense, baselines=work.baselines), notes
    if work.baselines:
        from obc_deploy.compression import dense_baselines

        baselines = dense_baselines(calibrated, target=work.target, progress=say)
        return replace(found.model, baselines=baselines), notes
    return found.model, notes


def show_estimate(out: Output, work: Compression, wish: Wish) -> None:
    """Say what a search would take: time, memory and disk of its database; nothing is written."""
    from obc_deploy.benchmarks.latency import count_networks
    from obc_deploy.planning import described, estimate, layer_choices
    from obc_deploy.search import Metric

    with out.working() as say:
        calibrated, _ = work.calibrate(say)
        settings = wish.settings(calibrated, work)
        latency = Metric.LATENCY in wish.metrics
        choices = layer_choices(calibrated, work.target, settings, latency=latency)
        expected = estimate(calibrated, choices, settings)
    count = sum(len(schemes) for schemes in choices.values())
    networks = count_networks(choices, work.target) if latency else 0
    out.line(f"{work.model}: {len(choices)} layers, {count} choices")
    out.line(f"database: {described(expected)}")
    if latency:
        out.line(f"latency table: {networks} networks to time, unless the cache has it")
    out.line("nothing was written")
    out.results(
        {
            "model": work.model,
            "target": work.target.name,
            "budgets": list(wish.budgets),
            "max_drop": wish.max_drop,
            "choices": {name: [str(one) for one in schemes] for name, schemes in choices.items()},
            "database": {
                "missing": expected.missing,
                "seconds": expected.seconds,
                "memory_bytes": expected.memory_bytes,
                "disk_bytes": expected.disk_bytes,
                "dense_bytes": expected.dense_bytes,
            },
            "networks_to_time": networks if latency else 0,
        }
    )


def show_found(out: Output, made: CompressedModel, notes: list[str]) -> None:
    """Say what was chosen for which layer, and what it is predicted to be worth."""
    from rich.table import Table

    from obc_deploy.benchmarks.table import times

    manifest = made.manifest
    table = Table("layer", "scheme", title=f"Plan for {manifest.scheme}", title_justify="left")
    table.add_column("relative error", justify="right")
    for layer in manifest.layers:
        table.add_row(layer.name, layer.scheme, "" if layer.error is None else f"{layer.error:.1e}")
    out.show(table)
    for note in notes:
        out.line(note)
    plan = manifest.plan
    if plan is None:
        return
    if plan.edges:
        out.line(f"kept out of pruning, as first and last layer: {', '.join(plan.edges)}")
    factors = ", ".join(f"{name} {times(value)}" for name, value in plan.factors.items())
    out.line(f"predicted, over dense: {factors}")
    if plan.start_loss is not None and plan.calibration_loss is not None:
        out.line(
            f"loss on calibration samples: {plan.start_loss:.3g} solved, "
            f"{plan.calibration_loss:.3g} after {plan.evaluations} plans tried"
        )
