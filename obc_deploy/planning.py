"""Planning: from a budget to a scheme for every layer.

    database of levels ──► loss of each level ┐
    costs, latency table ─────────────────────┴─► knapsack (exact) ──► refinement ──► plan

A level's loss is its layer's relative squared output error times the layer's sensitivity: what one
unit of that error costs the whole network's outputs on calibration samples, found by stitching each
layer alone at one level. Their sum is the knapsack's objective; what the refinement judges by is
the stitched network itself.

The first and the last layer keep all their weights, in 8 bits where the others have bits, as OBC
does (arXiv 2208.11580, section 6): they are small, and the network suffers most from them.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from obc_deploy.calibrated import CalibratedModel, Stage, silent
from obc_deploy.capture import get_tensor
from obc_deploy.costs import LayerCost, layer_cost, total
from obc_deploy.database import (
    BuildPlan,
    Database,
    Family,
    LayerOutline,
    build,
    choice_error,
    levels_for,
    outline_of_layer,
    plan_build,
    stored_levels,
)
from obc_deploy.errors import BudgetError, LayerError
from obc_deploy.latency import LatencyTable, cache_folder
from obc_deploy.layers import Layer, weight_to_matrix
from obc_deploy.manifest import PlanRecord
from obc_deploy.schemes import DENSE, Scheme
from obc_deploy.search import (
    Budget,
    Budgets,
    ChangeCosts,
    Choice,
    LayerChoices,
    Metric,
    Plan,
    Refinement,
    SearchSpace,
    as_budgets,
    counted_costs,
    refine,
    solve_milp,
)
from obc_deploy.solvers.contract import DEFAULT_DAMPING, LayerProblem
from obc_deploy.stitching import StitchedNetwork
from obc_deploy.targets import Target

PROBED_ERROR = 0.05
"""Layers are probed at the level whose relative output error is nearest to this."""
_NEGLIGIBLE_ERROR = 1e-9
_FEWEST_SAMPLES = 32
_CONFIRMING = 4
"""Times as many samples as candidates are tried on must confirm that one is better."""
_PROBING_SHARE = 0.5
"""Share of the search time that probing the layers may take; with fewer samples if need be."""


@dataclass(frozen=True)
class PlanSettings:
    """How plans are looked for.

    Attributes:
        database: folder of the database; None keeps it in the cache folder.
        families: kinds of schemes to choose from; None: all that the target gains from.
        free_edges: let the search choose the first and the last layer's schemes too.
        search_seconds: time for the search past the exact knapsack; 0 does without.
        search_samples: calibration samples that candidates are judged on, at most.
        fixed: schemes of layers that the search has no say in, by layer name.
        threads: threads that latencies are measured with; None: the physical cores.
        measured_batch: samples in a timed inference.
        latency_file: a latency table to take instead of measuring.
        allow_foreign_latency: take it from another machine too.
        method: the solver, as in `compress`.
        damping: as in `compress`.
        dtype: as in `compress`.
        seed: of the search.
    """

    database: Path | None = None
    families: tuple[Family, ...] | None = None
    free_edges: bool = False
    fixed: Mapping[str, Scheme] = field(default_factory=dict)
    threads: int | None = None
    measured_batch: int = 1
    latency_file: Path | None = None
    allow_foreign_latency: bool = False
    search_seconds: float = 60.0
    search_samples: int = 256
    method: str | None = None
    damping: float = DEFAULT_DAMPING
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.search_seconds) and self.search_seconds >= 0.0):
            raise BudgetError(
                f"search time {self.search_seconds:g} s; give 0 (no search) or more seconds"
            )
        if self.search_samples < 1:
            raise BudgetError(f"{self.search_samples} samples for the search; give 1 or more")


@dataclass(frozen=True)
class FoundPlan:
    """A plan and how it was found.

    Attributes:
        budgets: what it keeps.
        plan: a scheme for every layer.
        space: what it was chosen from.
        refinement: the search past the knapsack, where there was one.
        edges: layers that were kept out of pruning.
        table: the latency table, where latency was asked for.
    """

    budgets: tuple[Budget, ...]
    plan: Plan
    space: SearchSpace
    refinement: Refinement | None
    edges: tuple[str, ...]
    table: LatencyTable | None

    @property
    def text(self) -> str:
        """The budgets' text: what the compressed model is called."""
        return ",".join(map(str, self.budgets)) or "least loss"

    @property
    def factors(self) -> dict[Metric, float]:
        """How many times less than dense the plan costs, by metric."""
        return {
            metric: self.space.dense_cost(metric) / cost
            for metric, cost in self.plan.costs.items()
            if cost > 0.0
        }

    def record(self) -> PlanRecord:
        """What a manifest keeps of it."""
        refinement = self.refinement
        return PlanRecord(
            budgets=self.text,
            method=self.plan.method,
            loss=self.plan.loss,
            gap=self.plan.gap,
            calibration_loss=self.plan.evaluated,
            start_loss=None if refinement is None else refinement.start.evaluated,
            evaluations=0 if refinement is None else len(refinement.evaluations),
            factors={metric.value: factor for metric, factor in self.factors.items()},
            edges=list(self.edges),
            predicted_ms=None if self.table is None else self.plan.costs[Metric.LATENCY],
            dense_ms=None if self.table is None else self.table.dense_ms,
        )


@dataclass(frozen=True)
class Planner:
    """Everything that budgets of one model and target have in common.

    Attributes:
        calibrated: the model.
        database: its layers at every level.
        stitched: judges plans on a few calibration samples.
        judge: confirms on more of them what looked better; None where there are no more.
        space: the choices with their losses and costs.
        sensitivities: what a unit of each layer's error costs the network's outputs.
        edges: layers that are kept out of pruning.
        table: latencies, where they were measured.
        settings: how plans are looked for.
    """

    calibrated: CalibratedModel
    database: Database
    stitched: StitchedNetwork
    judge: StitchedNetwork | None
    space: SearchSpace
    sensitivities: Mapping[str, float]
    edges: tuple[str, ...]
    table: LatencyTable | None
    settings: PlanSettings

    def find(self, budgets: Budgets, *, progress: Stage | None = None) -> FoundPlan:
        """The plan of least loss that keeps the budgets: exactly solved, then refined.

        Raises:
            BudgetError: no plan keeps them; the message says what could be reached, and what is in
                the way.
        """
        say = progress or silent
        limits = as_budgets(budgets)
        say("solving the knapsack", 0.0)
        plan = solve_milp(self.space, limits)
        refinement = None
        if limits and self.settings.search_seconds > 0.0:
            judge = self.judge
            refinement = refine(
                plan, self.space, limits, lambda each: self.stitched.loss(each.schemes),
                confirm=None if judge is None else lambda each: judge.loss(each.schemes),
                seconds=self.settings.search_seconds, seed=self.settings.seed,
                progress=lambda share: say("searching for a better plan", share),
            )  # fmt: skip
            plan = refinement.plan
        return FoundPlan(limits, plan, self.space, refinement, self.edges, self.table)

    def least_lossy(self) -> FoundPlan:
        """The plan that no budget limits: every layer's choice of least loss."""
        schemes = {
            layer.name: min(layer.choices, key=lambda choice: choice.loss).scheme
            for layer in self.space.layers
        }
        return FoundPlan((), self.space.plan(schemes), self.space, None, self.edges, self.table)

    def uniform(self, scheme: Scheme) -> dict[str, Scheme]:
        """The scheme on every layer that can have it, and on the others the least lossy choice."""
        chosen = {}
        for layer in self.space.layers:
            texts = {str(choice.scheme) for choice in layer.choices}
            least = min(layer.choices, key=lambda choice: choice.loss).scheme
            chosen[layer.name] = scheme if str(scheme) in texts else least
        return chosen

    def hand_over(self, schemes: Mapping[str, Scheme]) -> None:
        """Give the model the pruned layers of a plan, so that `compress` need not solve them."""
        settings = self.settings
        for name, scheme in schemes.items():
            if scheme.pattern is None:
                continue
            pattern = Scheme(scheme.pattern, None)
            key = (name, str(pattern), settings.method, settings.damping, settings.dtype)
            if key not in self.calibrated.pruned:
                self.calibrated.pruned[key] = self.database.load(name, pattern)


def edges_of(layers: Sequence[Layer], settings: PlanSettings) -> tuple[str, ...]:
    """Names of the first and the last layer, unless they are free or there is nothing between."""
    if settings.free_edges or len(layers) < 3:
        return ()
    ends = (layers[0].name, layers[-1].name)
    return tuple(name for name in ends if name not in settings.fixed)


def choices_of(
    outline: LayerOutline,
    target: Target | None,
    settings: PlanSettings,
    *,
    edge: bool,
    latency: bool = False,
) -> tuple[Scheme, ...]:
    """What may be done to a layer.

    Args:
        outline: its shape.
        target: where it is to run.
        settings: what families to choose from.
        edge: it is the first or the last layer: no pattern, no fewer than 8 bits.
        latency: times are asked for: then integer targets run all layers in 8 bits, because what
            changing between float and integer layers costs belongs to no layer; and zeros that are
            too few to be skipped are not worth their loss.
    """
    if settings.families is None:
        levels = levels_for(target, outline.channels, outline.cols)
        if latency:
            levels = tuple(level for level in levels if level.quantization is not None)
    else:
        levels = tuple(level for family in settings.families for level in family.levels(outline))
    if latency and target is not None:
        levels = tuple(
            level
            for level in levels
            if not level.skips_zeros or 1.0 - level.density >= target.skips_from
        )
    if edge:
        whole = [Scheme(None, level.quantization) for level in levels]
        levels = tuple(
            level for level in whole if level.quantization is None or level.weight_bits >= 8
        )
    return tuple(dict.fromkeys(levels)) or (DENSE,)


def database_folder(calibrated: CalibratedModel, settings: PlanSettings) -> Path:
    """The named folder, or one in the cache that goes by the weights and the samples."""
    if settings.database is not None:
        return settings.database
    digest = hashlib.sha256(calibrated.samples.sha256().encode())
    for layer in calibrated.layers:
        weight = get_tensor(calibrated.network.module, layer.weight_name)
        digest.update(f"{layer.name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().numpy().data)
    digest.update(f"{settings.method} {settings.damping} {settings.dtype}".encode())
    return cache_folder() / "databases" / digest.hexdigest()[:20]


def layer_choices(
    calibrated: CalibratedModel,
    target: Target | None,
    settings: PlanSettings,
    *,
    latency: bool = False,
) -> dict[str, tuple[Scheme, ...]]:
    """What may be done to each layer, by name.

    Raises:
        LayerError: the network has no layers.
    """
    if not calibrated.layers:
        raise LayerError("the model has no layers that could be compressed; nothing to plan")
    edges = edges_of(calibrated.layers, settings)
    return {
        layer.name: (settings.fixed[layer.name],)
        if layer.name in settings.fixed
        else choices_of(
            outline_of_layer(layer), target, settings, edge=layer.name in edges, latency=latency
        )
        for layer in calibrated.layers
    }


def estimate(
    calibrated: CalibratedModel,
    choices: Mapping[str, Sequence[Scheme]],
    settings: PlanSettings,
) -> BuildPlan:
    """Seconds, memory and disk that the database will take; what is there already costs nothing."""
    return plan_build(
        [outline_of_layer(layer) for layer in calibrated.layers],
        lambda outline: stored_levels(choices[outline.name]),
        database_folder(calibrated, settings),
        method=settings.method,
        dtype=settings.dtype,
        device=calibrated.device,
    )


def build_database(
    calibrated: CalibratedModel,
    choices: Mapping[str, Sequence[Scheme]],
    settings: PlanSettings,
    *,
    progress: Stage | None = None,
) -> Database:
    """The database of these choices: what is missing is solved.

    Raises:
        DatabaseError: the named folder is of another model or calibration, or cannot be written.
    """
    say = progress or silent
    expected = estimate(calibrated, choices, settings)
    if expected.missing:
        say(f"database: {described(expected)}", 0.0)
    statistics = calibrated.hessians(calibrated.layers, torch.float64, say)

    def problems() -> Iterable[LayerProblem]:
        for layer in calibrated.layers:
            weight = get_tensor(calibrated.network.module, layer.weight_name)
            yield LayerProblem(
                weight=weight_to_matrix(layer, weight),
                hessian=statistics[layer.name].hessian,
                damping=settings.damping,
                channels=layer.channels,
                name=layer.name,
            )

    return build(
        problems(),
        lambda outline: stored_levels(choices[outline.name]),
        database_folder(calibrated, settings),
        method=settings.method,
        dtype=settings.dtype,
        device=calibrated.device,
        plan=expected,
        # A folder in the cache goes by the samples; another Hessian of them is as good.
        overwrite=settings.database is None,
        progress=lambda layer, share: say(f"solving {layer}", share),
    )


def described(plan: BuildPlan) -> str:
    """A build's estimate in words."""
    seconds = plan.seconds
    if seconds is None:
        took = "time unknown"
    else:
        took = f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.1f} min"
    return (
        f"{plan.missing} levels of {len(plan.layers)} layers to solve, {took}, "
        f"{plan.memory_bytes / 2**20:.0f} MiB of memory, {plan.disk_bytes / 2**20:.1f} MiB on disk "
        f"({plan.dense_bytes / 2**20:.0f} MiB as dense copies)"
    )


def planner_for(
    calibrated: CalibratedModel,
    metrics: Iterable[Metric],
    settings: PlanSettings,
    *,
    target: Target | None = None,
    progress: Stage | None = None,
) -> Planner:
    """A planner for budgets of these metrics; measures latencies where one of them is latency.

    Args:
        calibrated: the model.
        metrics: what budgets will limit.
        settings: how plans are looked for.
        target: where the model is to run; needed for latency.
        progress: called with what is being done and the share of it.

    Raises:
        BudgetError: a latency without a target.
        LatencyError: a named latency table does not fit.
        TargetError: the target is not measured.
        RuntimeMissingError: the target's runtime does not work here.
        DatabaseError: as in `build_database`.
        LayerError: the network has no layers.
    """
    table = None
    if Metric.LATENCY in set(metrics):
        if target is None:
            raise BudgetError(
                "a latency budget needs a target to measure on; add --target, such as "
                "--target ort-sparse"
            )
        # Measuring runs artifacts, which the core does not know how to do.
        from obc_deploy.benchmarks.latency import LatencySettings, latency_table

        table = latency_table(
            calibrated,
            target,
            layer_choices(calibrated, target, settings, latency=True),
            LatencySettings(settings.threads, settings.measured_batch, seed=settings.seed),
            file=settings.latency_file,
            allow_foreign=settings.allow_foreign_latency,
            progress=progress,
        )
    return make_planner(calibrated, settings, target=target, table=table, progress=progress)


def make_planner(
    calibrated: CalibratedModel,
    settings: PlanSettings,
    *,
    target: Target | None = None,
    table: LatencyTable | None = None,
    progress: Stage | None = None,
) -> Planner:
    """Build the database, probe the layers, and lay out what plans are chosen from.

    Args:
        calibrated: the model.
        settings: how plans are looked for.
        target: where the model is to run.
        table: latencies of its layers there, where budgets will be of latency.
        progress: called with what is being done and the share of it.

    Raises:
        DatabaseError: as in `build_database`.
        LatencyError: the table lacks a level.
        LayerError: the network has no layers.
    """
    say = progress or silent
    choices = layer_choices(calibrated, target, settings, latency=table is not None)
    database = build_database(calibrated, choices, settings, progress=say)
    errors = {
        layer.name: {
            scheme: choice_error(database.errors(layer.name), scheme)
            for scheme in choices[layer.name]
        }
        for layer in calibrated.layers
    }
    stitched, judge = _stitched(calibrated, database, settings)
    found = probe(stitched, errors, progress=say)
    space = _space(calibrated.layers, errors, found, table)
    edges = edges_of(calibrated.layers, settings)
    return Planner(calibrated, database, stitched, judge, space, found, edges, table, settings)


def probe(
    stitched: StitchedNetwork,
    errors: Mapping[str, Mapping[Scheme, float]],
    *,
    progress: Stage | None = None,
) -> dict[str, float]:
    """Each layer's sensitivity: loss of the network with that layer alone compressed, over error.

    Args:
        stitched: judges.
        errors: layer name to scheme to relative squared output error.
        progress: called with what is being done and the share of it.
    """
    say = progress or silent
    found = {}
    for index, (name, levels) in enumerate(errors.items()):
        say("probing layers", index / len(errors))
        # On a logarithmic scale: errors of levels span orders of magnitude.
        seen = {scheme: error for scheme, error in levels.items() if error > _NEGLIGIBLE_ERROR}
        if not seen:
            found[name] = 0.0
            continue
        scheme = min(seen, key=lambda each: abs(math.log(seen[each] / PROBED_ERROR)))
        found[name] = max(0.0, stitched.loss({name: scheme})) / seen[scheme]
    return found


def _stitched(
    calibrated: CalibratedModel, database: Database, settings: PlanSettings
) -> tuple[StitchedNetwork, StitchedNetwork | None]:
    """With as many samples as the search time allows, and one that confirms with more."""
    samples = calibrated.samples.take(settings.search_samples, settings.seed)
    if settings.search_seconds > 0.0 and len(samples) > _FEWEST_SAMPLES:
        few = StitchedNetwork(calibrated, database, samples.take(_FEWEST_SAMPLES))
        start = time.monotonic()
        few.loss({})
        seconds = (time.monotonic() - start) / _FEWEST_SAMPLES
        allowed = _PROBING_SHARE * settings.search_seconds / (seconds * len(calibrated.layers))
        if allowed < len(samples):
            samples = samples.take(max(_FEWEST_SAMPLES, int(allowed)))
    stitched = StitchedNetwork(calibrated, database, samples)
    more = calibrated.samples.take(_CONFIRMING * len(samples), settings.seed)
    confirms = settings.search_seconds > 0.0 and len(more) > len(samples)
    return stitched, stitched.on(more) if confirms else None


def _space(
    layers: Sequence[Layer],
    errors: Mapping[str, Mapping[Scheme, float]],
    sensitivities: Mapping[str, float],
    table: LatencyTable | None,
) -> SearchSpace:
    found = []
    dense: list[LayerCost] = []
    for layer in layers:
        dense.append(layer_cost(layer.name, layer.macs, weights=layer.weights))
        choices = []
        for scheme, error in errors[layer.name].items():
            costs = counted_costs(layer_cost(layer.name, layer.macs, scheme, weights=layer.weights))
            if table is not None:
                costs[Metric.LATENCY] = table.ms(layer.name, scheme)
            choices.append(Choice(scheme, sensitivities[layer.name] * error, costs))
        found.append(LayerChoices(layer.name, tuple(choices)))
    whole = total(dense)
    costs = {
        Metric.MACS: float(whole.dense_macs),
        Metric.BOPS: float(whole.dense_bops),
        Metric.BIT_OPERATIONS: float(whole.dense_bit_operations),
        Metric.SIZE: float(whole.dense_bytes),
    }
    fixed = {}
    changes = None
    if table is not None:
        costs[Metric.LATENCY] = table.dense_ms
        fixed[Metric.LATENCY] = table.fixed_ms
        changes = ChangeCosts(table.neighbours, {Metric.LATENCY: table.change_ms})
    return SearchSpace(tuple(found), fixed=fixed, dense=costs, changes=changes)
