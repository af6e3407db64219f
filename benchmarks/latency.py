"""Measuring a latency table: every layer at every level, inside the whole network, in the runtime.

For each level the whole network is made uniform (pruned by magnitude, rounded to nearest: times
depend on where the zeros are, not on the other weights), exported for the target, and

    timed       end to end, interleaved with the dense float network, as a ratio to it
    profiled    step by step by the runtime itself, as shares of the whole

A layer's time at that level is its share of the end-to-end time. So layers are timed where they
will run, between their neighbours, in the layouts and fusions that the runtime chose there. Steps
between layers (additions, pools, changes of layout) count with the layer that ran before them: a
sparse kernel may add the shortcut itself, where a dense one leaves it to another operator. What
runs before the first layer is the fixed part, the median over all networks. A step that computes
several layers is shared out among them by their multiply-accumulates. Of a grid of sparsities a
dozen are timed (`timed_levels`), the others lie between.

Where a target fuses neighbours that are alike, networks whose dense and sparse layers take turns
are timed too (`mixed_networks`): what they take beyond the sum is what changes cost.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from obc_deploy.artifacts import Artifact
from obc_deploy.benchmarks.interleaving import Candidate, measure_interleaved
from obc_deploy.benchmarks.mixed_networks import cost_of_a_change, mixed_networks
from obc_deploy.benchmarks.pruned_copies import pruned_copy
from obc_deploy.benchmarks.statistics import flatten, speedup
from obc_deploy.benchmarks.timed_levels import between, timed_levels
from obc_deploy.calibrated import CalibratedModel, silent
from obc_deploy.compression import CompressedModel, compress
from obc_deploy.costs import layer_cost
from obc_deploy.errors import LatencyError
from obc_deploy.exporters.exporter_checksum import exporter_checksum
from obc_deploy.latency import (
    LatencyTable,
    TimedNetwork,
    network_key,
    read_table,
    table_file,
    write_table,
)
from obc_deploy.manifest import command_line, now
from obc_deploy.runtimes.audit import Audit, audit
from obc_deploy.runtimes.fingerprint import take_fingerprint
from obc_deploy.runtimes.registry import check_measured, require_target
from obc_deploy.runtimes.session import open_session
from obc_deploy.schemes import DENSE, Scheme
from obc_deploy.targets import Target

Stage = Callable[[str, float], None]
Levels = Mapping[str, Sequence[Scheme]]
"""Layer name to the schemes that are to be timed."""

RANGE_SAMPLES = 32
"""Calibration samples for activation ranges, which no time depends on."""
AT_ONCE = 12
"""Networks that are timed in one interleaved run; more would only wait for one another."""
ROUNDS = 8
SAMPLES_PER_ROUND = 10
PROFILED = 30
"""Inferences of each profile."""
_DENSE = "dense"


@dataclass(frozen=True)
class LatencySettings:
    """How a table is measured.

    Attributes:
        threads: threads of the runtime; None for the physical cores.
        batch_size: samples in one inference.
        rounds: rounds in which the networks take turns.
        seed: of the order.
    """

    threads: int | None = None
    batch_size: int = 1
    rounds: int = ROUNDS
    seed: int = 0


@dataclass(frozen=True)
class _Wanted:
    """One network to time: uniform, as far as its layers' levels allow, or mixed."""

    name: str
    schemes: Mapping[str, Scheme]
    mixed: bool = False


@dataclass(frozen=True)
class _Written:
    """One network to time, as a file; names of layers to the values that they compute in it."""

    wanted: _Wanted
    path: Path
    outputs: Mapping[str, str]


def latency_table(
    calibrated: CalibratedModel,
    target: Target,
    levels: Levels,
    settings: LatencySettings | None = None,
    *,
    file: Path | None = None,
    allow_foreign: bool = False,
    progress: Stage | None = None,
) -> LatencyTable:
    """The table of this network on this machine: from the cache where it is there, else measured.

    Args:
        calibrated: the network.
        target: where it is to run.
        levels: what each layer is to be timed at.
        settings: how.
        file: a table to take instead of the cache's.
        allow_foreign: take a named table of another machine.
        progress: called with what is being done and the share of it.

    Raises:
        LatencyError: a named table is damaged, of another network or another machine, or lacks a
            level.
        TargetError: the target is not measured.
        RuntimeMissingError: the target's runtime does not work here.
        RuntimeFailedError: the runtime refused the dense network.
    """
    check_measured(target)
    settings = settings or LatencySettings()
    machine, exporter = take_fingerprint().as_dict(), exporter_checksum(target)
    if file is not None:
        table = read_table(file)
        if table.target != target.name:
            raise LatencyError(
                f"latency table '{file}' is of target {table.target}, not {target.name}; measure it"
            )
        table.check(calibrated.layers, machine, exporter=exporter, allow_foreign=allow_foreign)
        for name, schemes in levels.items():
            for scheme in schemes:
                table.ms(name, scheme)
        return table
    info = require_target(target)
    cached = table_file(
        calibrated.layers, machine, target=target.name, runtime_version=info.version or "",
        threads=settings.threads, batch_size=settings.batch_size, exporter=exporter,
    )  # fmt: skip
    known = _known(cached)
    if known is not None and all(
        str(scheme) in known.layers.get(name, {})
        for name, schemes in levels.items()
        for scheme in schemes
    ):
        return known
    table = measure_table(calibrated, target, levels, settings, progress=progress)
    write_table(cached, table)
    return table


def _known(file: Path) -> LatencyTable | None:
    try:
        return read_table(file)
    except LatencyError:
        return None


def measure_table(
    calibrated: CalibratedModel,
    target: Target,
    levels: Levels,
    settings: LatencySettings,
    *,
    progress: Stage | None = None,
) -> LatencyTable:
    """Time every layer at every level now; arguments and errors as in `latency_table`."""
    say = progress or silent
    info = require_target(target)
    few = replace(calibrated, samples=calibrated.samples.take(RANGE_SAMPLES), pruned={})
    with tempfile.TemporaryDirectory(prefix="obc-latency-") as folder:
        dense = compress(few, scheme=DENSE, method="rtn", baselines=False)
        anchor = _export(dense, target, Path(folder) / "dense" / "model.onnx", settings)
        inputs = _inputs(dense, settings.batch_size)
        wanted = _wanted(levels, target)
        written = list(_written(few, target, wanted, Path(folder), settings, say))
        dense_ms, ratios = _timed(anchor, written, target, inputs, settings, say)
        rows: dict[str, dict[Scheme, list[float]]] = {name: {} for name in levels}
        networks, fixed = [], []
        timed = [network for network in written if network.path in ratios]
        uniform = [network for network in timed if not network.wanted.mixed]
        for index, network in enumerate(uniform):
            say("profiling networks", index / len(uniform))
            whole = dense_ms * ratios[network.path]
            shares = _shares(calibrated, network, target, inputs, settings)
            for name, share in shares.items():
                scheme = network.wanted.schemes[name]
                rows[name].setdefault(scheme, []).append(share * whole)
            layers_ms = whole * math.fsum(shares.values())
            fixed.append(whole - layers_ms)
            networks.append(TimedNetwork(scheme=network.wanted.name, ms=whole, layers_ms=layers_ms))
    if not networks:
        raise LatencyError(f"no network could be timed in {info.title}; try 'obc-deploy doctor'")
    table = LatencyTable(
        target=target.name,
        runtime=target.runtime,
        runtime_version=info.version or "",
        exporter=exporter_checksum(target),
        threads=settings.threads or take_fingerprint().physical_cores,
        batch_size=settings.batch_size,
        machine=take_fingerprint().as_dict(),
        network=network_key(calibrated.layers),
        layers={
            name: {
                str(scheme): ms
                for scheme, ms in between(
                    {scheme: median(times) for scheme, times in rows[name].items()}, schemes
                ).items()
            }
            for name, schemes in levels.items()
        },
        fixed_ms=median(fixed),
        dense_ms=dense_ms,
        networks=tuple(networks),
        created=now(),
        command=command_line(),
    )
    mixed = [
        TimedNetwork(
            scheme=network.wanted.name,
            ms=dense_ms * ratios[network.path],
            layers_ms=table.predict(network.wanted.schemes) - table.fixed_ms,
            changes=table.changes(network.wanted.schemes),
        )
        for network in timed
        if network.wanted.mixed
    ]
    return table.model_copy(
        update={
            "change_ms": cost_of_a_change(mixed, table.fixed_ms),
            "networks": (*table.networks, *mixed),
        }
    )


def count_networks(levels: Levels, target: Target) -> int:
    """How many networks a table of these levels is measured on."""
    return len(_wanted(levels, target))


def _wanted(levels: Levels, target: Target) -> list[_Wanted]:
    """Networks that have, taken together, every layer at every timed level; then the mixed ones."""
    found = []
    for scheme in timed_levels(levels.values()):
        # A layer without the level gets its first one, the least that can be done to it.
        schemes = {name: scheme if scheme in own else own[0] for name, own in levels.items()}
        found.append(_Wanted(str(scheme), schemes))
    if target.fuses_alike:
        found += [
            _Wanted(name, schemes, mixed=True) for name, schemes in mixed_networks(levels).items()
        ]
    return found


def _written(
    calibrated: CalibratedModel,
    target: Target,
    wanted: Sequence[_Wanted],
    folder: Path,
    settings: LatencySettings,
    say: Stage,
) -> Iterator[_Written]:
    """The networks as files: one is exported for each quantization, the others are its copies."""
    whole: dict[tuple[Scheme, ...], Artifact] = {}
    for index, network in enumerate(wanted):
        say("writing networks to time", index / len(wanted))
        schemes = network.schemes
        path = folder / str(index) / "model.onnx"
        # Where zeros choose the operators, zeros written into a file would come too late; and
        # float weights have no codes to write them to.
        copied = not target.sparse_operators and all(
            one.quantization is not None for one in schemes.values() if one.skips_zeros
        )
        made_with = {
            name: Scheme(None, own.quantization) if copied else own for name, own in schemes.items()
        }
        base = tuple(made_with.values())
        if base not in whole:
            made = compress(
                calibrated, scheme=DENSE, target=target, bn_reestimate=False, baselines=False,
                layer_schemes=made_with, method="magnitude",
            )  # fmt: skip
            file = folder / f"whole-{len(whole)}" / "model.onnx"
            whole[base] = _export(made, target, file, settings)
        artifact = whole[base]
        outputs = {layer.name: layer.output for layer in artifact.manifest.layers}
        if copied and any(one.skips_zeros for one in schemes.values()):
            pruned_copy(artifact, calibrated.folded_layers, schemes, path)
        else:
            path = artifact.path
        yield _Written(network, path, outputs)


def _export(
    model: CompressedModel, target: Target, path: Path, settings: LatencySettings
) -> Artifact:
    return model.export(path, target=target, batch_size=settings.batch_size, check=False)


def _inputs(model: CompressedModel, batch_size: int) -> dict[str, npt.NDArray[Any]]:
    index = np.arange(batch_size) % len(model.samples)
    chunks = [model.samples.arrays(int(i), int(i) + 1) for i in index]
    names = list(model.manifest.model.inputs)
    return {
        name: np.ascontiguousarray(np.concatenate([chunk[place] for chunk in chunks]))
        for place, name in enumerate(names)
    }


def _timed(
    anchor: Artifact,
    networks: Sequence[_Written],
    target: Target,
    inputs: Mapping[str, npt.NDArray[Any]],
    settings: LatencySettings,
    say: Stage,
) -> tuple[float, dict[Path, float]]:
    """The dense network's ms, and each network's share of it, by file."""
    ratios: dict[Path, float] = {}
    dense: list[float] = []
    groups = [networks[start : start + AT_ONCE] for start in range(0, len(networks), AT_ONCE)]
    for place, group in enumerate(groups):
        candidates = [Candidate(_DENSE, target.runtime, anchor.path, inputs)]
        candidates += [Candidate(each.path, target.runtime, each.path, inputs) for each in group]

        def report(share: float, place: int = place) -> None:
            say("timing networks, interleaved", (place + share) / len(groups))

        timed = measure_interleaved(
            candidates, rounds=settings.rounds, samples_per_round=SAMPLES_PER_ROUND,
            threads=settings.threads, batch_size=settings.batch_size, processes=1,
            seed=settings.seed, progress=report,
        )  # fmt: skip
        base = timed[_DENSE]
        if not base.workers:
            raise LatencyError(f"the dense network could not be timed: {base.error}")
        before = [worker.rounds for worker in base.workers]
        dense += flatten(before)
        for each in group:
            found = timed[each.path]
            if found.workers and found.error is None:
                after = [worker.rounds for worker in found.workers]
                ratios[each.path] = 1.0 / speedup(before, after)
    return median(dense), ratios


def _shares(
    calibrated: CalibratedModel,
    network: _Written,
    target: Target,
    inputs: Mapping[str, npt.NDArray[Any]],
    settings: LatencySettings,
) -> dict[str, float]:
    """Each layer's share of the profiled time; the rest belongs to no layer."""
    with open_session(
        target.runtime, network.path, threads=settings.threads, batch_size=settings.batch_size
    ) as session:
        found = audit(session, inputs, iterations=PROFILED)
    macs = {
        layer.name: layer_cost(
            layer.name, layer.macs, network.wanted.schemes[layer.name], weights=layer.weights
        ).macs_left
        for layer in calibrated.layers
    }
    return layer_shares(found, network.outputs, macs)


def layer_shares(
    found: Audit, outputs: Mapping[str, str], macs: Mapping[str, float]
) -> dict[str, float]:
    """Each layer's share of the time of all steps; what runs before the first layer is no one's.

    A step that computes no layer (an addition, a change of layout) goes to the layer that ran last
    before it: whether it is there, and how long it takes, depends on how that layer is computed.

    Args:
        found: how the runtime ran the network, its steps in the order in which they ran.
        outputs: layer name to the ONNX value that its node computes.
        macs: layer name to multiply-accumulates: a step's time is shared out by them among the
            layers that it computes.
    """
    whole = math.fsum(step.ms for step in found.steps)
    layers = {value: layer for layer in reversed(found.layers) for value in layer.outputs[1:]}
    layers.update({layer.outputs[0]: layer for layer in found.layers})
    of_step: dict[str, list[str]] = {}
    for name, output in outputs.items():
        layer = layers.get(output)
        if layer is not None and layer.step is not None:
            of_step.setdefault(layer.step, []).append(name)
    shares = dict.fromkeys(outputs, 0.0)
    owners: list[str] = []
    for step in found.steps:
        owners = of_step.get(step.name, owners)
        together = math.fsum(macs[name] for name in owners)
        for name in owners:
            part = macs[name] / together if together > 0.0 else 1.0 / len(owners)
            shares[name] += part * step.ms / whole if whole > 0.0 else 0.0
    return shares
