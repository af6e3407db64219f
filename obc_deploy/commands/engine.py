"""The TensorRT part of `obc-deploy export`: the engine, or the command that builds it elsewhere."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.commands.output import Output
from obc_deploy.errors import ExportError, RuntimeMissingError
from obc_deploy.targets import EightBit, Precision, Target

if TYPE_CHECKING:
    from obc_deploy.artifacts import Artifact
    from obc_deploy.compression import CompressedModel
    from obc_deploy.exporters.engine import Engine, EngineOptions, Profile
    from obc_deploy.manifest import EngineManifest

USUAL_BATCHES = "1:8:32"


class PrecisionName(Enum):
    """Precisions as they are typed."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def precision(self) -> Precision:
        """The precision itself."""
        return {
            "fp16": Precision.FLOAT16, "bf16": Precision.BFLOAT16, "fp32": Precision.FLOAT32,
        }[self.value]  # fmt: skip


@dataclass(frozen=True)
class EngineRequest:
    """What was typed about an engine.

    Attributes:
        build: build it, where a library that can is here.
        batches: smallest, usual and largest batch size of a file with an open one, as "1:8:32".
        optimization_level: 0 to 5.
        workspace_mib: most scratch memory on the device.
        timing_cache: a file for timings.
        sparse: the builder may take sparse kernels.
    """

    build: bool = False
    batches: str | None = None
    optimization_level: int | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    sparse: bool = True

    def check(self, goal: Target, dynamic_batch: bool) -> None:
        """Whether it goes with the target.

        Raises:
            ExportError: it does not.
        """
        if goal.runtime != "tensorrt" and self != EngineRequest():
            raise ExportError(
                f"--engine and its options are for --target tensorrt, not for '{goal.name}'"
            )
        if self.batches is not None:
            _batch_sizes(self.batches)
            if not dynamic_batch:
                raise ExportError(
                    f"--batches {self.batches} is for a file with an open batch size: add "
                    "--dynamic-batch, or give --batch-size alone"
                )


def with_precision(goal: Target, precision: PrecisionName | None, *, fp8: bool) -> Target:
    """The target with the number formats that were asked for.

    Raises:
        ExportError: the target has none to choose.
    """
    if goal.runtime != "tensorrt":
        if precision is None and not fp8:
            return goal
        given = "--fp8" if precision is None else f"--precision {precision.value}"
        raise ExportError(
            f"{given} is for --target tensorrt; '{goal.name}' computes in float32 what is not int8"
        )
    if precision is not None:
        goal = replace(goal, precision=precision.precision)
    if fp8:
        goal = replace(goal, placement=replace(goal.placement, eight_bit=EightBit.FP8))
    return goal


def _batch_sizes(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ExportError(
            f"--batches '{text}' is no smallest:usual:largest batch size, as in {USUAL_BATCHES}"
        )
    low, best, high = (int(part) for part in parts)
    if not 0 < low <= best <= high:
        raise ExportError(f"--batches '{text}': give sizes of 1 or more, smallest first")
    return low, best, high


def _profiles(artifact: Artifact, batches: str | None) -> dict[str, Profile]:
    from obc_deploy.exporters.engine import Profile

    if not artifact.manifest.dynamic_batch:
        return {}
    import onnx

    sizes = _batch_sizes(batches or USUAL_BATCHES)
    found = {}
    for value in onnx.load(artifact.path, load_external_data=False).graph.input:
        rest = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)[1:]
        low, best, high = ((size, *rest) for size in sizes)
        found[value.name] = Profile(low, best, high)
    return found


def engine_options(request: EngineRequest, artifact: Artifact) -> EngineOptions:
    """The builder's options for an artifact."""
    from obc_deploy.exporters.engine import EngineOptions

    workspace = None if request.workspace_mib is None else request.workspace_mib << 20
    return EngineOptions(
        sparse=request.sparse,
        profiles=_profiles(artifact, request.batches),
        optimization_level=request.optimization_level,
        workspace_bytes=workspace,
        timing_cache=request.timing_cache,
    )


def _for(made: EngineManifest) -> str:
    return made.gpu if made.library == "tensorrt_rtx" else f"for {made.gpu}"


def make_engine(
    out: Output, model: CompressedModel, goal: Target, artifact: Artifact, request: EngineRequest
) -> dict[str, Any]:
    """Build the engine where that was asked for and can be done; else print the command.

    Returns:
        JSON-ready values.

    Raises:
        ExportError: a builder is here and refuses the file.
    """
    from obc_deploy.benchmarks.table import size
    from obc_deploy.exporters.engine import build_engine, trtexec_command
    from obc_deploy.runtimes.tensorrt import TITLES

    options = engine_options(request, artifact)
    command = trtexec_command(artifact.path, options)
    result: dict[str, Any] = {"trtexec": command, "engine": None}
    if request.build:
        try:
            with out.working() as say:
                engine = build_engine(artifact.path, options=options, progress=say)
        except RuntimeMissingError as error:
            out.warn(f"no engine was built: {error}")
        else:
            made = engine.manifest
            out.line(
                f"{engine.path}: {size(made.size_bytes)}, {TITLES[made.library]} {made.version}, "
                f"built {_for(made)} in {made.seconds:.1f} s"
            )
            if made.sparse and made.sparse_chosen_count is not None:
                out.line(
                    f"sparse kernels: {made.sparse_chosen_count} layers of "
                    f"{made.sparse_found_count} that could have one"
                )
            for warning in made.warnings[:5]:
                out.warn(f"the builder: {warning[:300]}")
            result["engine"] = {"path": os.fspath(engine.path), **made.model_dump(mode="json")}
            result["run"] = try_engine(out, model, goal, artifact, engine)
            if made.library == "tensorrt":
                return result
    out.line("to build the engine where a GPU and TensorRT 10 or 11 are:")
    out.line(f"  {command}")
    return result


def try_engine(
    out: Output, model: CompressedModel, goal: Target, artifact: Artifact, engine: Engine
) -> dict[str, Any] | None:
    """Run an engine where a GPU is here: its outputs against PyTorch's, and its time on the device.

    Returns:
        JSON-ready values, or None where it was not run.

    Raises:
        RuntimeFailedError: the engine does not load or run here.
    """
    from obc_deploy.benchmarks.table import milliseconds, percent
    from obc_deploy.exporters import CHECKED_SAMPLES, sample_batches
    from obc_deploy.exporters.engine_parity import compare_outputs, device_latency
    from obc_deploy.runtimes.registry import runtime_info
    from obc_deploy.runtimes.session import open_session
    from obc_deploy.runtimes.tensorrt import why_no_gpu

    info = runtime_info(goal.runtime)
    if not info.works:
        out.line(f"the engine was not run: {why_no_gpu() or info.reason}")
        return None
    profile = next(iter(engine.manifest.profiles.values()), None)
    size = artifact.manifest.batch_size or (profile.optimum[0] if profile else 1)
    batches = sample_batches(model, size)[: max(1, CHECKED_SAMPLES // size)]
    with out.working() as say:
        say("running the engine", 0.0)
        with open_session(goal.runtime, engine.path, threads=1) as session:
            parity = compare_outputs(session, model, goal, batches)
            latency = device_latency(session, batches[0])
            facts = session.facts
    out.line(
        f"outputs in {info.title} against PyTorch's on {parity.samples} samples: relative error "
        f"{parity.relative_error:.1e}, {percent(parity.agreement)} % same answer"
    )
    if not parity.relative_error <= parity.tolerance:
        out.warn(
            f"the engine's outputs differ by more than {parity.tolerance:g}: compare its accuracy "
            "before it ships, or export with --precision fp32"
        )
    out.line(
        f"{facts['device']}, batch {size}: {milliseconds(latency.compute_ms)} ms, "
        f"{milliseconds(latency.with_copies_ms)} ms with copies from and to the host (medians)"
    )
    if facts["cuda_graph"] is not True:
        out.warn(f"timed without a CUDA graph: the engine {facts['cuda_graph']}")
    return {"parity": parity.as_dict(), "latency": asdict(latency), "facts": facts}
