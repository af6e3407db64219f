"""The compressed networks of a curve: one a budget, one a uniform scheme, kept as they are made.

All come from one planner, so from one database. With a folder, each is written there as soon as it
is made, and found there by the next run: a curve that was interrupted goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from obc_deploy.calibrated import Stage, silent
from obc_deploy.compression import CompressedModel
from obc_deploy.errors import RunDirectoryError
from obc_deploy.planning import FoundPlan, Planner
from obc_deploy.run_directory import load_run
from obc_deploy.schemes import Scheme


class Make(Protocol):
    """`compress` with everything given but what the layers get."""

    def __call__(
        self,
        *,
        plan: FoundPlan | None = None,
        scheme: Scheme | str = ...,
        layer_schemes: Mapping[str, Scheme] | None = None,
        baselines: bool = ...,
    ) -> CompressedModel:
        """A network by a plan, or by schemes."""
        ...


def curve_networks(
    planner: Planner,
    budgets: Sequence[str],
    uniform: Sequence[str],
    make: Make,
    *,
    folder: Path | None = None,
    progress: Stage | None = None,
) -> dict[str, CompressedModel]:
    """Every network of a curve by name, budgets first; the first has the dense ones with it.

    Args:
        planner: finds the plans, and has their layers.
        budgets: one network for each.
        uniform: schemes; each on all layers that can have it.
        make: compresses.
        folder: where networks are kept, a run directory each; None keeps none.
        progress: called with what is being done and the share of it.

    Raises:
        BudgetError: no plan keeps a budget.
        ObcDeployError: a network cannot be compressed or written.
    """
    say = progress or silent
    models: dict[str, CompressedModel] = {}
    names = (*budgets, *uniform)
    for place, name in enumerate(names):
        say(f"network {name}", place / len(names))
        known = _known(folder, name)
        if known is not None:
            models[name] = known
            continue
        if name in budgets:
            found = planner.find(name, progress=progress)
            planner.hand_over(found.plan.schemes)
            made = make(plan=found, baselines=not models)
        else:
            schemes = planner.uniform(Scheme.parse(name))
            planner.hand_over(schemes)
            made = make(scheme=name, layer_schemes=schemes, baselines=not models)
        if folder is not None:
            made.save(run_of(folder, name), overwrite=True)
        models[name] = made
    return models


def run_of(folder: Path, name: str) -> Path:
    """The run directory of a budget or a scheme."""
    return folder / name.replace(":", "-").replace(",", "_")


def _known(folder: Path | None, name: str) -> CompressedModel | None:
    try:
        return None if folder is None else load_run(run_of(folder, name))
    except RunDirectoryError:
        return None


def predicted_speedups(
    planner: Planner, models: Mapping[str, CompressedModel]
) -> dict[str, float | None]:
    """Each network's speedup over the dense float one by the latency table; None without one."""
    table = planner.table
    return {
        name: None
        if table is None
        else table.speedup({one.name: one.scheme for one in model.manifest.layers})
        for name, model in models.items()
    }
