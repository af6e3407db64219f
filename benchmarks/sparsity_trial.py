"""Whether sparse kernels pay: an engine that may take them beside one that may not, in turns.

    with       the engine as it was built, 2:4 layers on sparse kernels where the builder chose them
    without    an engine of the same file and options, built with the flag off

A builder's log says which layers got a sparse kernel, and not what that gains; elsewhere in the
engine it may have chosen other kernels and fused other steps because of it. So both are timed as
wholes by CUDA events, interleaved, and profiled layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.benchmarks.statistics import flatten, median, speedup, speedup_interval
from obc_deploy.errors import ArtifactError
from obc_deploy.exporters.engine import Engine, EngineOptions, Profile, build_engine

if TYPE_CHECKING:
    import numpy as np

    from obc_deploy.manifest import EngineManifest
    from obc_deploy.runtimes.contract import LayerProfile
    from obc_deploy.runtimes.session import Session

Progress = Callable[[str, float], None]

ROUNDS = 8
SAMPLES_PER_ROUND = 50
WARMUP = 20
PROFILED = 30
"""Inferences of each profile."""


@dataclass(frozen=True)
class LayerTrial:
    """One layer in both engines; times are None where no step of the engine computes it alone.

    Attributes:
        node: its ONNX node.
        with_ms: median milliseconds where sparse kernels are allowed.
        without_ms: the same where they are not.
        kernel: what runs it where they are allowed, as the engine's inspector names it.
    """

    node: str
    with_ms: float | None = None
    without_ms: float | None = None
    kernel: str = ""

    @property
    def speedup(self) -> float | None:
        """Time without over time with sparse kernels; None where either is unknown."""
        if not self.with_ms or not self.without_ms:
            return None
        return self.without_ms / self.with_ms


@dataclass(frozen=True)
class SparsityTrial:
    """Both engines, timed on the device without copies.

    Attributes:
        device: the GPU.
        with_ms: median milliseconds of the engine with sparse kernels.
        without_ms: the same without.
        speedup: median over rounds of the second over the first.
        interval: of that, at 95 %.
        layers: by ONNX node.
    """

    device: str
    with_ms: float
    without_ms: float
    speedup: float
    interval: tuple[float, float]
    layers: Mapping[str, LayerTrial] = field(default_factory=dict)

    @property
    def faster(self) -> bool | None:
        """Whether sparse kernels pay; None where the interval holds both answers."""
        low, high = self.interval
        if low <= 1.0 <= high:
            return None
        return low > 1.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        layers = [{**asdict(each), "speedup": each.speedup} for each in self.layers.values()]
        own = {**asdict(self), "interval": list(self.interval), "faster": self.faster}
        return {**own, "layers": layers}


def options_of(manifest: EngineManifest, *, sparse: bool) -> EngineOptions:
    """What a builder was told, for an engine that differs in nothing but its sparse kernels."""
    ahead = manifest.library == "tensorrt_rtx"
    return EngineOptions(
        sparse=sparse,
        profiles={
            name: Profile(tuple(each.minimum), tuple(each.optimum), tuple(each.maximum))
            for name, each in manifest.profiles.items()
        },
        optimization_level=manifest.optimization_level,
        workspace_bytes=manifest.workspace_bytes,
        capabilities=tuple(manifest.capabilities) if ahead else (),
    )


def counterpart(
    engine: Engine, onnx_file: Path, place: Path, *, progress: Progress | None = None
) -> Engine:
    """The same engine without sparse kernels, built now.

    Args:
        engine: one that may have them.
        onnx_file: what it was built from.
        place: where the other engine is written.
        progress: as `build_engine` takes it.

    Raises:
        ArtifactError: the engine was built without sparse kernels.
        ExportError: the builder failed.
        RuntimeMissingError: no builder of its library is here.
    """
    made = engine.manifest
    if not made.sparse:
        raise ArtifactError(
            f"'{engine.path}' was built without sparse kernels (--no-sparsity), so there is "
            "nothing to compare; build it again with them"
        )
    return build_engine(
        onnx_file, place, options_of(made, sparse=False), library=made.library, progress=progress
    )


def step_of(node: str, layers: Iterable[str], steps: Sequence[LayerProfile]) -> LayerProfile | None:
    """The step of an engine that computes a layer and no other; None where there is none.

    Args:
        node: the layer's ONNX node.
        layers: all layers' nodes.
        steps: of the engine's profile. A step whose ONNX nodes are not known is told by its name,
            in which fused nodes are joined by plus signs.
    """
    others = set(layers) - {node}
    found = []
    for step in steps:
        held = set(step.nodes) or {part.strip() for part in step.name.split(" + ")}
        if node in held and not held & others:
            found.append(step)
    # A layer that is computed in parts (a split convolution) has no one step either.
    return found[0] if len(found) == 1 else None


def layer_trials(
    nodes: Sequence[str], allowed: Sequence[LayerProfile], forbidden: Sequence[LayerProfile]
) -> dict[str, LayerTrial]:
    """Each layer's time in both profiles.

    Args:
        nodes: the layers' ONNX nodes.
        allowed: the profile where sparse kernels are allowed.
        forbidden: where they are not.
    """
    trials = {}
    for node in nodes:
        ours, theirs = (step_of(node, nodes, steps) for steps in (allowed, forbidden))
        trials[node] = LayerTrial(
            node,
            None if ours is None else ours.ms,
            None if theirs is None else theirs.ms,
            "" if ours is None else ours.kind,
        )
    return trials


def run_trial(
    allowed: Session,
    forbidden: Session,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    nodes: Sequence[str],
    *,
    rounds: int = ROUNDS,
    samples: int = SAMPLES_PER_ROUND,
    progress: Progress | None = None,
) -> SparsityTrial:
    """Time both engines in turns, then profile them.

    Args:
        allowed: a session of the engine with sparse kernels.
        forbidden: of the one without.
        inputs: what they run on.
        nodes: ONNX nodes of the layers.
        rounds: turns that each takes.
        samples: inferences in a turn.
        progress: called with what is being done and the share of it.

    Raises:
        RuntimeFailedError: a run failed, or a session computes on the CPU.
    """
    taken: tuple[list[list[float]], list[list[float]]] = ([], [])
    for number in range(rounds):
        if progress is not None:
            progress("timing with and without sparse kernels", number / rounds)
        # Which goes first changes from round to round: the second finds the device warmer.
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            session = (allowed, forbidden)[which]
            times = session.time_on_device(inputs, warmup=WARMUP, samples=samples)
            taken[which].append([float(ms) for ms in times.compute_ms])
    ours, theirs = ([each] for each in taken)
    if progress is not None:
        progress("profiling layers", 0.0)
    profiles = [each.profile(inputs, iterations=PROFILED) for each in (allowed, forbidden)]
    return SparsityTrial(
        device=str(allowed.facts.get("device", "")),
        with_ms=median(flatten(ours)),
        without_ms=median(flatten(theirs)),
        speedup=speedup(theirs, ours),
        interval=speedup_interval(theirs, ours),
        layers=layer_trials(nodes, *profiles),
    )
