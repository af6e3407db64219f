"""ONNX files become engines: one path for TensorRT 10 and 11 and for TensorRT-RTX.

The network is strongly typed, so all that is asked of the builder is where it may look for kernels.
TensorRT builds on the GPU that the engine is for; TensorRT-RTX builds ahead of time on any machine.
"""

from __future__ import annotations

import importlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from obc_deploy.artifacts import file_sha256
from obc_deploy.data import first_line
from obc_deploy.errors import ExportError, RuntimeMissingError
from obc_deploy.exporters.builder_log import SparseTactics, sparse_tactics
from obc_deploy.manifest import EngineManifest, EngineProfile, now, write_json
from obc_deploy.runtimes.engine_file import engine_manifest_path, read_engine_manifest
from obc_deploy.runtimes.tensorrt import LIBRARIES
from obc_deploy.whole_files import whole_file

INSTALL = {
    "tensorrt": "pip install tensorrt-cu13 (10.x or 11.x, from NVIDIA's own package index)",
    "tensorrt_rtx": "pip install 'obc-deploy[tensorrt-rtx]'",
}
LEAST_MAJOR = {"tensorrt": 10, "tensorrt_rtx": 1}
AHEAD_OF_TIME = "ahead of time"
_NO_GPU = "factory function returned nullptr"
_MEMORY = ("out of memory", "outofmemory", "insufficient memory")

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Profile:
    """The sizes of one input that an engine takes, and those it is tuned for.

    Attributes:
        minimum: smallest size of each dimension.
        optimum: what kernels are chosen for.
        maximum: largest size of each dimension.
    """

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (self.minimum, self.optimum, self.maximum)
        text = ":".join("x".join(map(str, shape)) for shape in sizes)
        if len({len(shape) for shape in sizes}) != 1:
            raise ExportError(f"the profile {text} has shapes of different rank")
        if any(
            not 0 < low <= best <= high
            for low, best, high in zip(self.minimum, self.optimum, self.maximum, strict=True)
        ):
            raise ExportError(
                f"the profile {text} is not in order: give smallest:usual:largest, all of 1 or more"
            )


@dataclass(frozen=True)
class EngineOptions:
    """What a builder is told.

    Attributes:
        sparse: it may take sparse kernels for 2:4 weights.
        profiles: sizes of inputs with open dimensions, by input name.
        optimization_level: 0 to 5, how long it looks for kernels; its own default where None.
        workspace_bytes: most scratch memory on the device; unlimited where None.
        timing_cache: a file that timings of kernels are kept in between builds; TensorRT-RTX times
            none and leaves it alone.
        capabilities: compute capabilities to build for, as in "8.6"; TensorRT-RTX only, its own
            choice where empty.
    """

    sparse: bool = True
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise ExportError(f"builder optimization level {level}: give 0 to 5")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ExportError(f"workspace of {self.workspace_bytes} bytes: give 1 or more")


@dataclass(frozen=True)
class Engine:
    """A serialized engine and what is known of it.

    Attributes:
        path: the engine file.
        manifest: how it was built, from what, for what.
    """

    path: Path
    manifest: EngineManifest

    @property
    def tactics(self) -> SparseTactics:
        """The builder's account of sparse kernels."""
        made = self.manifest
        return SparseTactics(
            None if made.sparse_found is None else tuple(made.sparse_found),
            None if made.sparse_chosen is None else tuple(made.sparse_chosen),
            made.sparse_found_count,
            made.sparse_chosen_count,
        )


def find_library(name: str | None = None) -> tuple[str, ModuleType]:
    """A library that parses ONNX and builds engines, and its name.

    Args:
        name: "tensorrt" or "tensorrt_rtx"; the first that is here where None.

    Raises:
        RuntimeMissingError: none is here, or not one with a builder, or of too old a version.
    """
    reasons = []
    wanted = LIBRARIES if name is None else {name: LIBRARIES.get(name, ())}
    for library, modules in wanted.items():
        for module_name in modules:
            try:
                module = importlib.import_module(module_name)
            except Exception as error:  # wheels without their libraries fail in many ways
                if not isinstance(error, ModuleNotFoundError) or error.name != module_name:
                    reasons.append(f"{module_name} does not load ({first_line(error)})")
                continue
            if not hasattr(module, "Builder") or not hasattr(module, "OnnxParser"):
                reasons.append(f"{module_name} has no builder (a runtime-only package)")
                continue
            version = str(module.__version__)
            if int(version.partition(".")[0]) < LEAST_MAJOR[library]:
                reasons.append(f"{module_name} is of version {version}, too old")
                continue
            return library, module
    fix = "; or ".join(INSTALL[library] for library in wanted if library in INSTALL)
    why = "; ".join(reasons) or "not installed"
    raise RuntimeMissingError(
        f"no TensorRT with a builder here ({why}); {fix or 'choose tensorrt or tensorrt_rtx'}"
    )


def _logger(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        """Keeps what the builder says instead of printing it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            self.lines.append((str(severity).rpartition(".")[2].lower(), msg))

    return Log()


def _monitor(trt: ModuleType, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        """Hands the builder's phases on; stops it where our side raises."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: dict[str, tuple[int, int]] = {}
            self.failure: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outer[phase_name] = (0, max(num_steps, 1))
            self._say(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.outer:
                self.outer[phase_name] = (step + 1, self.outer[phase_name][1])
                self._say(phase_name)
            return self.failure is None

        def phase_finish(self, phase_name: str) -> None:
            self.outer.pop(phase_name, None)

        def _say(self, what: str) -> None:
            done, steps = next(iter(self.outer.values()), (0, 1))
            try:
                progress(f"TensorRT: {what.lower()}", done / steps)
            except BaseException as error:  # raising through the builder would end the process
                self.failure = error

    return Monitor()


def _parsed(trt: ModuleType, builder: Any, log: Any, onnx_file: Path) -> tuple[Any, Any]:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(onnx_file)):
        return network, parser
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        operator = error.node_operator()
        node = error.node_name() or f"number {error.node()}"
        place = f"node '{node}' ({operator}): " if operator else ""
        reasons.append(f"{place}{' '.join(error.desc().split())[:300]}")
    raise ExportError(
        f"TensorRT {trt.__version__} does not take '{onnx_file.name}': "
        f"{'; '.join(reasons) or 'it does not say why'}"
    )


def _add_profiles(trt: ModuleType, builder: Any, network: Any, config: Any,
                  profiles: Mapping[str, Profile]) -> dict[str, Profile]:  # fmt: skip
    """One optimization profile for all inputs with open sizes."""
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape)
              for i in range(network.num_inputs)}  # fmt: skip
    unknown = sorted(set(profiles) - set(inputs))
    if unknown:
        raise ExportError(
            f"a profile is for '{unknown[0]}', which is no input; the inputs are "
            f"{', '.join(sorted(inputs))}"
        )
    used: dict[str, Profile] = {}
    chosen = builder.create_optimization_profile()
    for name, shape in inputs.items():
        given = profiles.get(name)
        if given is None:
            if any(size < 0 for size in shape):
                raise ExportError(
                    f"input '{name}' has open sizes {list(shape)} (-1): give a profile of its "
                    "smallest, usual and largest shape (--batches 1:8:32)"
                )
            continue
        fits = len(given.minimum) == len(shape) and all(
            size < 0 or low == high == size
            for size, low, high in zip(shape, given.minimum, given.maximum, strict=True)
        )
        if not fits:
            raise ExportError(
                f"the profile of '{name}' ({list(given.minimum)} to {list(given.maximum)}) does "
                f"not fit its shape {list(shape)}; -1 is open, all else is fixed"
            )
        chosen.set_shape(name, given.minimum, given.optimum, given.maximum)
        used[name] = given
    if used and config.add_optimization_profile(chosen) < 0:
        raise ExportError(f"TensorRT {trt.__version__} refuses the profiles of {sorted(used)}")
    return used


def _configure(trt: ModuleType, config: Any, library: str, options: EngineOptions) -> None:
    if options.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    # So that its inspector can say which ONNX nodes a layer of the engine came from.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if not options.capabilities:
        return
    known = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    if library != "tensorrt_rtx" or not known:
        raise ExportError(
            f"compute capabilities {', '.join(options.capabilities)} are for TensorRT-RTX; "
            "TensorRT builds for the GPU it runs on"
        )
    config.num_compute_capabilities = len(options.capabilities)
    for index, text in enumerate(options.capabilities):
        member = known.get("SM" + text.replace(".", ""))
        if member is None:
            raise ExportError(
                f"compute capability '{text}' is not one that TensorRT-RTX {trt.__version__} "
                f"builds for; those are {', '.join(_capability_texts(known))}"
            )
        config.set_compute_capability(member, index)


def _capability_texts(known: Mapping[str, Any]) -> list[str]:
    numbers = (name.removeprefix("SM") for name in known if name.startswith("SM"))
    return [f"{number[:-1]}.{number[-1]}" for number in numbers]


def _set_timing_cache(trt: ModuleType, config: Any, path: Path | None) -> None:
    if path is None:
        return
    try:
        stored = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ExportError(f"cannot read the timing cache '{path}': {error.strerror}") from error
    try:
        cache = config.create_timing_cache(stored)
        taken = cache is not None and config.set_timing_cache(cache, False)
    except (TypeError, RuntimeError):
        taken = False
    if not taken:
        raise ExportError(
            f"the timing cache '{path}' is damaged, or of another TensorRT than {trt.__version__} "
            "or of another GPU; delete it or name another file"
        )


def _write_whole(path: Path, content: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise ExportError(
            f"cannot write '{path}': {error.strerror}; choose a writable place"
        ) from error


def _device(library: str, options: EngineOptions) -> tuple[str, list[str]]:
    """The GPU that the engine is for, and its compute capability, as far as they are known."""
    from obc_deploy.runtimes.worker.worker_cuda import CudaError, Device

    if library == "tensorrt_rtx":
        return AHEAD_OF_TIME, list(options.capabilities)
    try:
        device = Device()
    except CudaError:
        return "unknown", []
    return device.name, [".".join(map(str, device.capability))]


def _builder(trt: ModuleType, log: Any) -> Any:
    try:
        builder = trt.Builder(log)
    except TypeError as error:
        if _NO_GPU not in str(error):
            raise
        raise RuntimeMissingError(
            f"TensorRT {trt.__version__} finds no CUDA device or driver, and builds on the GPU "
            "that an engine is for; build there, or ahead of time with TensorRT-RTX "
            f"({INSTALL['tensorrt_rtx']})"
        ) from error
    return builder


def _failure(trt: ModuleType, onnx_file: Path, log: Any) -> ExportError:
    errors = [" ".join(text.split()) for severity, text in log.lines
              if severity in {"error", "internal_error"}]  # fmt: skip
    said = errors[-1][:400] if errors else "it does not say why"
    fix = ""
    if any(word in text.lower() for text in errors for word in _MEMORY):
        fix = "; the device is out of memory: give --workspace, a smaller batch, or free it"
    return ExportError(f"TensorRT {trt.__version__} cannot build '{onnx_file.name}': {said}{fix}")


def build_engine(
    onnx_file: Path | str,
    engine: Path | str | None = None,
    options: EngineOptions | None = None,
    *,
    library: str | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Build a strongly typed engine from an ONNX file; its log and manifest lie beside it.

    Args:
        onnx_file: the file; weights beside it are found.
        engine: where to write; the file's name with `.engine` where None.
        options: what the builder is told.
        library: "tensorrt" or "tensorrt_rtx"; the first that is here where None.
        progress: called with what is being done and the share of it; what it raises stops the
            build.

    Raises:
        RuntimeMissingError: no library with a builder is here, or TensorRT finds no GPU.
        ArtifactError: the file is missing or no ONNX file.
        ExportError: the file holds what TensorRT refuses, with the names of its nodes; or a
            profile does not fit, or building fails.
    """
    source, chosen = Path(onnx_file), options or EngineOptions()
    target = Path(engine) if engine is not None else source.with_suffix(".engine")
    check_buildable(source)
    name, trt = find_library(library)
    log = _logger(trt)
    builder = _builder(trt, log)
    network, parser = _parsed(trt, builder, log, source)
    config = builder.create_builder_config()
    _configure(trt, config, name, chosen)
    used = _add_profiles(trt, builder, network, config, chosen.profiles)
    cache_file = None if name == "tensorrt_rtx" else chosen.timing_cache
    _set_timing_cache(trt, config, cache_file)
    monitor = None
    if progress is not None:
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor
    start = time.monotonic()
    made = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - start
    del parser  # the network's weights are the parser's: it may go only now
    if monitor is not None and monitor.failure is not None:
        raise monitor.failure
    if made is None:
        raise _failure(trt, source, log)
    _write_whole(target, memoryview(made))
    cache = None if cache_file is None else config.get_timing_cache()
    if cache_file is not None and cache is not None:
        _write_whole(cache_file, memoryview(cache.serialize()))
    text = "".join(f"[{severity}] {line}\n" for severity, line in log.lines)
    _write_whole(target.with_name(f"{target.name}.log"), text.encode())
    manifest = _manifest(trt, name, source, target, chosen, used, log, seconds)
    write_json(engine_manifest_path(target), manifest)
    return Engine(target, manifest)


def check_buildable(source: Path) -> None:
    """Whether a file is an ONNX file that TensorRT would read as it is meant.

    Raises:
        ArtifactError: it is missing or no ONNX file.
        ExportError: it holds something TensorRT refuses or would misread.
    """
    import onnx

    from obc_deploy.exporters.tensorrt_refusals import refusals
    from obc_deploy.runtimes.onnx_graph import read_onnx_graph

    read_onnx_graph(source)
    found = refusals(onnx.load(source, load_external_data=False))
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ExportError(f"TensorRT does not take '{source.name}': {found[0]}{more}")


def _manifest(
    trt: ModuleType,
    library: str,
    source: Path,
    target: Path,
    options: EngineOptions,
    used: Mapping[str, Profile],
    log: Any,
    seconds: float,
) -> EngineManifest:
    tactics = sparse_tactics(text for _, text in log.lines)
    warnings = dict.fromkeys(
        " ".join(text.split()) for severity, text in log.lines if severity == "warning"
    )
    if options.timing_cache is not None and library == "tensorrt_rtx":
        warnings[f"TensorRT-RTX keeps no timings: '{options.timing_cache.name}' was not used"] = (
            None
        )
    gpu, capabilities = _device(library, options)
    return EngineManifest(
        library=library,
        version=str(trt.__version__),
        gpu=gpu,
        capabilities=capabilities,
        onnx_file=source.name,
        onnx_sha256=file_sha256(source),
        file=target.name,
        file_sha256=file_sha256(target),
        size_bytes=target.stat().st_size,
        sparse=options.sparse,
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_bytes,
        profiles={
            name: EngineProfile(
                minimum=list(p.minimum), optimum=list(p.optimum), maximum=list(p.maximum)
            )
            for name, p in used.items()
        },
        sparse_found=None if tactics.found is None else list(tactics.found),
        sparse_chosen=None if tactics.chosen is None else list(tactics.chosen),
        sparse_found_count=tactics.found_count,
        sparse_chosen_count=tactics.chosen_count,
        warnings=list(warnings),
        seconds=round(seconds, 3),
        created=now(),
    )


def load_engine(path: Path | str) -> Engine:
    """An engine from its file, checked against its manifest.

    Raises:
        ArtifactError: a file is missing, damaged, or not the one the manifest describes.
    """
    return Engine(Path(path), read_engine_manifest(path))


def _sizes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, sizes))}" for name, sizes in shapes.items())


def trtexec_command(onnx_file: Path | str, options: EngineOptions | None = None) -> str:
    """The command that builds the same engine on a machine with TensorRT.

    Args:
        onnx_file: the file, by the name it will have there.
        options: what the builder is told.
    """
    chosen, source = options or EngineOptions(), Path(onnx_file)
    parts = [
        "trtexec",
        f"--onnx={source}",
        "--stronglyTyped",
        f"--sparsity={'enable' if chosen.sparse else 'disable'}",
        f"--saveEngine={source.with_suffix('.engine')}",
        f"--timingCacheFile={chosen.timing_cache or source.with_suffix('.timing')}",
        "--profilingVerbosity=detailed",
    ]
    if chosen.optimization_level is not None:
        parts.append(f"--builderOptimizationLevel={chosen.optimization_level}")
    if chosen.workspace_bytes is not None:
        parts.append(f"--memPoolSize=workspace:{max(1, chosen.workspace_bytes >> 20)}M")
    if chosen.profiles:
        for option, part in (("min", "minimum"), ("opt", "optimum"), ("max", "maximum")):
            shapes = {name: getattr(profile, part) for name, profile in chosen.profiles.items()}
            parts.append(f"--{option}Shapes={_sizes(shapes)}")
    return shlex.join(parts)
