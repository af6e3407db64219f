"""TensorRT and TensorRT-RTX, inside a worker: one engine on the first visible GPU.

    host to device, engine, device to host     one CUDA graph ("whole")
    engine                                     another ("compute")

Inputs and outputs lie in pinned memory. A call copies into it, launches the whole graph and waits.
An engine that cannot be captured is enqueued kernel by kernel; `facts["cuda_graph"]` says which.
"""

from __future__ import annotations

import importlib
import statistics
from collections import defaultdict
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
from worker_backend import BadArtifact, Explained, Missing, NoDevice
from worker_cuda import OUT_OF_MEMORY, Buffer, CudaError, Device, Stream
from worker_inspector import EngineLayer, engine_layers
from worker_profiles import Profile, choose_profile

Feed = Dict[str, "np.ndarray[Any, Any]"]

_MEMORY = ("out of memory", "outofmemory", "memory allocation")
_FOREIGN = ("incompatible", "compute capability", "version", "magic tag")


def _library(modules: List[str]) -> Any:
    reasons = []
    for name in modules:
        try:
            return importlib.import_module(name)
        except Exception as error:  # wheels without their libraries fail in many ways
            reasons.append("%s: %s" % (name, error))
    raise Missing("; ".join(reasons))


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps what went wrong."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: List[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

        def said(self) -> str:
            """What went wrong first: the rest follows from it."""
            return self.errors[0][:200] if self.errors else "it does not say why"

    return Log()


def _layer_times(trt: Any) -> Any:
    class LayerTimes(trt.IProfiler):
        """Milliseconds of each layer, run by run."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.taken: Dict[str, List[float]] = defaultdict(list)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.taken[layer_name].append(ms)

    return LayerTimes()


class _Plan:
    """Buffers and graphs for inputs of certain shapes."""

    def __init__(self) -> None:
        self.inputs: Dict[str, Buffer] = {}
        self.outputs: Dict[str, Buffer] = {}
        self.whole = 0
        self.compute = 0


class Backend:
    """One engine, deserialized; `options` say which library to import."""

    def __init__(self, path: str, threads: int, batch_size: int, options: Dict[str, Any]) -> None:
        try:
            self._device = device = Device()
            device.make_current()
        except CudaError as error:
            if error.code == OUT_OF_MEMORY:
                raise Explained("the GPU is %s; end what else runs there" % error) from error
            raise NoDevice(str(error)) from error
        self._trt = trt = _library(options["modules"])
        self.version = str(trt.__version__)
        self._log = _logger(trt)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise BadArtifact(str(error)) from error
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise self._not_deserialized()
        try:
            self._stream = Stream(device.driver)
            self._context = self._new_context()
        except CudaError as error:
            raise self._failed("a stream", error) from error
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        entering = trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == entering]
        self._outputs = [name for name in names if engine.get_tensor_mode(name) != entering]
        self._dtypes = {name: self._dtype(name) for name in names}
        self._profiles: List[Profile] = [
            {
                name: tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
                for name in self._inputs
            }
            for index in range(engine.num_optimization_profiles)
        ]
        self._profile = 0
        self._plan: Optional[_Plan] = None
        self._shapes: Dict[str, Tuple[int, ...]] = {}
        self.inputs = [self._spec(name) for name in self._inputs]
        self.outputs = [self._spec(name) for name in self._outputs]
        self.facts: Dict[str, Any] = {
            "device": device.name,
            "compute_capability": list(device.capability),
            "library": trt.__name__,
            "layers": engine.num_layers,
            "profiles": len(self._profiles),
            "cuda_graph": None,
        }

    def _not_deserialized(self) -> Exception:
        said = self._log.said()
        low = said.lower()
        if any(word in low for word in _MEMORY):
            return self._no_memory(said)
        if any(word in low for word in _FOREIGN):
            return Explained(
                "TensorRT %s does not take the engine on %s (%s): engines run in the version and "
                "on the kind of GPU that they were built for; build it here"
                % (self.version, self._device.name, said)
            )
        return BadArtifact("%s; build the engine again" % said)

    def _no_memory(self, said: str) -> Explained:
        free, total = self._device.memory()
        return Explained(
            "%s is out of memory (%d MiB of %d MiB free: %s); give it a smaller batch, or end what "
            "else runs there" % (self._device.name, free >> 20, total >> 20, said)
        )

    def _failed(self, what: str, error: Optional[Exception] = None) -> Exception:
        said = self._log.said() if error is None or self._log.errors else str(error)
        full = isinstance(error, CudaError) and error.code == OUT_OF_MEMORY
        if full or any(word in said.lower() for word in _MEMORY):
            return self._no_memory(said)
        return RuntimeError("%s: %s" % (what, said))

    def _new_context(self) -> Any:
        engine, trt = self._engine, self._trt
        eager = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if eager is None:
            context = engine.create_execution_context()
        else:
            # TensorRT-RTX would make kernels for a new shape in the background, while it is timed.
            config = engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = eager.EAGER
            context = engine.create_execution_context(config)
        if context is None:
            raise self._failed("no execution context")
        return context

    def _dtype(self, name: str) -> "np.dtype[Any]":
        kind = self._engine.get_tensor_dtype(name)
        try:
            return np.dtype(self._trt.nptype(kind))
        except TypeError:
            raise Explained(
                "'%s' is of type %s, which numpy has not; export with float32 inputs and outputs"
                % (name, kind)
            ) from None

    def _spec(self, name: str) -> Dict[str, Any]:
        shape = [size if size >= 0 else None for size in self._engine.get_tensor_shape(name)]
        return {"name": name, "shape": shape, "dtype": str(self._dtypes[name])}

    def _shaped(self, context: Any, feed: Feed) -> None:
        """Tell a context the shapes of its inputs."""
        for name in self._inputs:
            if not context.set_input_shape(name, feed[name].shape):
                raise self._failed("shape %s of '%s'" % (list(feed[name].shape), name))
        missing = context.infer_shapes()
        if missing:
            raise self._failed("the shapes of %s are not known" % ", ".join(missing))

    def _take_profile(self, context: Any, number: int) -> None:
        if not context.set_optimization_profile_async(number, self._stream.handle):
            raise self._failed("profile %d" % number)
        self._stream.wait()

    def _drop_plan(self) -> None:
        plan, self._plan = self._plan, None
        if plan is None:
            return
        self._stream.drop([graph for graph in (plan.whole, plan.compute) if graph])
        for buffer in (*plan.inputs.values(), *plan.outputs.values()):
            buffer.free()

    def _prepared(self, feed: Feed) -> _Plan:
        """Buffers and graphs for a feed; those of the last one where its shapes are the same."""
        shapes = {name: tuple(feed[name].shape) for name in self._inputs}
        if self._plan is not None and shapes == self._shapes:
            return self._plan
        number = choose_profile(shapes, self._profiles) if self._profiles else 0
        self._drop_plan()
        self._log.errors.clear()
        context = self._context
        try:
            if number != self._profile:
                self._take_profile(context, number)
                self._profile = number
            self._shaped(context, feed)
            self._plan = plan = _Plan()
            driver = self._device.driver
            for name in (*self._inputs, *self._outputs):
                shape = tuple(context.get_tensor_shape(name))
                if any(size < 0 for size in shape):
                    raise Explained(
                        "the size of output '%s' depends on the values of the inputs (%s), which "
                        "no session takes; export a network with fixed sizes" % (name, list(shape))
                    )
                buffer = Buffer(driver, shape, self._dtypes[name])
                (plan.inputs if name in self._inputs else plan.outputs)[name] = buffer
                context.set_tensor_address(name, buffer.address)
            # Kernels are made and memory is taken in the first run, which no graph may hold.
            self._copy_in(plan, feed)
            self._whole(plan)
            self._stream.wait()
            self._capture(plan)
        except CudaError as error:
            self._drop_plan()
            raise self._failed("the first run", error) from error
        except Exception:
            self._drop_plan()
            raise
        self._shapes = shapes
        return plan

    def _capture(self, plan: _Plan) -> None:
        try:
            plan.compute = self._stream.capture(self._enqueue)
            plan.whole = self._stream.capture(lambda: self._whole(plan))
        except CudaError as error:
            self._stream.drop([plan.compute] if plan.compute else [])
            plan.compute = plan.whole = 0
            self.facts["cuda_graph"] = str(error)
        else:
            self.facts["cuda_graph"] = True

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._failed("the engine")

    def _whole(self, plan: _Plan) -> None:
        for buffer in plan.inputs.values():
            buffer.to_device(self._stream.handle)
        self._enqueue()
        for buffer in plan.outputs.values():
            buffer.to_host(self._stream.handle)

    def _run_whole(self, plan: _Plan) -> None:
        if plan.whole:
            self._stream.launch(plan.whole)
        else:
            self._whole(plan)

    def _run_compute(self, plan: _Plan) -> None:
        if plan.compute:
            self._stream.launch(plan.compute)
        else:
            self._enqueue()

    @staticmethod
    def _copy_in(plan: _Plan, feed: Feed) -> None:
        for name, buffer in plan.inputs.items():
            np.copyto(buffer.host, feed[name], casting="no")

    def infer(self, feed: Feed) -> List[Any]:
        """All outputs, in the engine's order."""
        plan = self._prepared(feed)
        self._copy_in(plan, feed)
        try:
            self._run_whole(plan)
            self._stream.wait()
        except CudaError as error:
            raise self._failed("a run", error) from error
        return [plan.outputs[name].host.copy() for name in self._outputs]

    def device_times(
        self, feed: Feed, count: int, progress: Callable[[int], None]
    ) -> "np.ndarray[Any, Any]":
        """(2, count) milliseconds between CUDA events: of the engine alone, and with both copies.

        Both are measured in turn. Each holds the launch of one graph, which takes a few
        microseconds.
        """
        plan = self._prepared(feed)
        self._copy_in(plan, feed)
        taken = np.empty((2, count), dtype=np.float64)
        for index in range(count):
            taken[0, index] = self._stream.timed(lambda: self._run_compute(plan))
            taken[1, index] = self._stream.timed(lambda: self._run_whole(plan))
            if index % 256 == 255:
                progress(index + 1)
        return taken

    def profile(
        self, feed: Feed, warmup: int, iterations: int, options: Dict[str, Any]
    ) -> Dict[str, Any]:
        """Median milliseconds a layer, as the engine reports them, in a context of its own."""
        plan = self._prepared(feed)
        context = self._new_context()
        if self._profile:
            self._take_profile(context, self._profile)
        self._shaped(context, feed)
        for name, buffer in (*plan.inputs.items(), *plan.outputs.items()):
            context.set_tensor_address(name, buffer.address)
        self._copy_in(plan, feed)
        for buffer in plan.inputs.values():
            buffer.to_device(self._stream.handle)
        times = _layer_times(self._trt)
        for run in range(warmup + iterations):
            if run == warmup:
                context.profiler = times
            if not context.execute_async_v3(self._stream.handle):
                raise self._failed("a profiled run")
            self._stream.wait()
        known = self._inspected()
        unknown = EngineLayer("", [])
        layers = [
            {
                "name": name,
                "kind": known.get(name, unknown).kernel,
                "ms": statistics.median(taken),
                "native": True,
                "nodes": known.get(name, unknown).nodes,
            }
            for name, taken in times.taken.items()
        ]
        return {"layers": layers, "facts": dict(self.facts)}

    def _inspected(self) -> Dict[str, EngineLayer]:
        """The engine's layers as its inspector knows them; none where it does not answer."""
        inspector = self._engine.create_engine_inspector()
        if inspector is None:
            return {}
        return engine_layers(
            inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        )
