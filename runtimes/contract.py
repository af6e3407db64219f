"""What every runtime tells about itself, and what a session hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from obc_deploy.runtimes.onnx_graph import OnnxGraph


@dataclass(frozen=True)
class RuntimeInfo:
    """Whether a runtime can be used here.

    Attributes:
        name: the name used on the command line and in manifests ("onnxruntime", "deepsparse").
        title: the name used in prose.
        works: it can be used, as far as `reason` does not say otherwise.
        version: its version, or None where it is not installed.
        reason: why it does not work, in one line; None where it works.
        install_command: the command that installs it.
        python: the interpreter its worker runs in, or None.
        licence: what a user must know before choosing it, or None.
    """

    name: str
    title: str
    works: bool
    version: str | None
    reason: str | None
    install_command: str
    python: Path | None
    licence: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "python": None if self.python is None else str(self.python)}


def _nothing(graph: OnnxGraph) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Runtime:
    """One runtime, as functions and facts.

    Attributes:
        name: as in `RuntimeInfo`.
        title: as in `RuntimeInfo`.
        info: looks for the runtime without starting it.
        refusals: reasons why the runtime will not load a graph at all, each with the fix.
        fallbacks: reasons why the runtime will load a graph but not run it in its own engine.
        environment: variables its worker is started with.
    """

    name: str
    title: str
    info: Callable[[], RuntimeInfo]
    refusals: Callable[[OnnxGraph], tuple[str, ...]] = _nothing
    fallbacks: Callable[[OnnxGraph], tuple[str, ...]] = _nothing
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an artifact; a size is a number, a name, or None where it is free."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str


@dataclass(frozen=True)
class SessionOptions:
    """What else a runtime is told when it opens an artifact.

    Attributes:
        optimize: ONNX Runtime's graph optimizations (DeepSparse has no such choice).
        custom_ops: shared libraries with custom operators, for ONNX Runtime.
        modules: names that the engine's library may be imported as, for TensorRT; the session finds
            them by the engine.
    """

    optimize: bool = True
    custom_ops: tuple[Path, ...] = ()
    modules: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "optimize": self.optimize,
            "custom_ops": [str(path) for path in self.custom_ops],
            "modules": list(self.modules),
        }


@dataclass(frozen=True)
class TimedSamples:
    """Raw times of one session, in the order taken.

    Attributes:
        warmup_ms: (warmup,) float64 milliseconds of the runs that do not count.
        samples_ms: (samples,) float64 milliseconds.
    """

    warmup_ms: np.ndarray[Any, Any]
    samples_ms: np.ndarray[Any, Any]


@dataclass(frozen=True)
class DeviceTimes:
    """Raw times between CUDA events on the device, in the order taken; either kind in turn.

    Attributes:
        compute_ms: (samples,) float64 milliseconds of the engine alone.
        with_copies_ms: (samples,) float64 milliseconds with inputs and outputs copied from and to
            pinned host memory.
    """

    compute_ms: np.ndarray[Any, Any]
    with_copies_ms: np.ndarray[Any, Any]


@dataclass(frozen=True)
class LayerProfile:
    """One step of the runtime's own schedule.

    Attributes:
        name: the runtime's name of the step.
        kind: the runtime's name of the operation or algorithm.
        ms: milliseconds, median (ONNX Runtime) or mean (DeepSparse) of the profiled runs.
        kernel_sparsity: fraction of zero weights the runtime says it skips, or None where it does
            not say.
        native: the runtime's own engine ran it (False: handed on to another); None where the
            question makes no sense.
        outputs: names of the ONNX values that this step computes, where known.
        int8: the step multiplies 8-bit integers; None where unknown or where nothing is multiplied.
        nodes: names of the ONNX nodes that this step came from, where the runtime says them.
    """

    name: str
    kind: str
    ms: float
    kernel_sparsity: float | None = None
    native: bool | None = None
    outputs: tuple[str, ...] = ()
    int8: bool | None = None
    nodes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "outputs": list(self.outputs), "nodes": list(self.nodes)}
