"""PyTorch on an NVIDIA GPU: 16-bit floats, 2:4, int8, fp8 and 4-bit weights under a CUDA graph.

The route that needs no TensorRT. A compressed model's linears and 1x1 convolutions get products of
their own (`cuda_layers` says which, `cuda_products` computes them), everything else runs in 16-bit
floats. Each product is compared with float32 arithmetic on the layer's own input before it is used,
and left out where it is wrong, refused or slower than the dense one; `layers` says so layer by
layer. Unlike other runtimes this one works in the caller's process, on a model instead of a file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from obc_deploy.activations import ActivationGrid, ActivationRange, activation_grid
from obc_deploy.capture import get_tensor, set_tensor
from obc_deploy.data import first_line
from obc_deploy.errors import DeviceMemoryError, RuntimeFailedError, RuntimeMissingError
from obc_deploy.layers import Layer, LayerKind, weight_to_matrix
from obc_deploy.runtimes.contract import LayerProfile, TensorSpec, TimedSamples
from obc_deploy.runtimes.cuda_layers import (
    Arithmetic,
    GpuAbilities,
    Kernel,
    KernelChoice,
    choose_kernel,
    layer_facts,
)
from obc_deploy.runtimes.cuda_products import DenseProduct, Product, products

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel
    from obc_deploy.solvers.contract import CompressedLayer

NAME = "torch-cuda"
TITLE = "PyTorch on CUDA"
TOLERANCE = 0.01
"""Root-mean-square error of a product beside float32 arithmetic, as a share of the outputs'."""
_CALLS_PER_GRAPH = 10
_GRAPH_REPEATS = 7
_WARM_RUNS = 3

aten = torch.ops.aten


@dataclass(frozen=True)
class CudaOptions:
    """How a session computes.

    Attributes:
        arithmetic: of the products.
        sparse: whether 2:4 products may be used.
        faster_only: leave a layer dense where its product was not measured to be faster.
        compiled: pass the network through torch.compile (needs Triton).
        graph: replay a CUDA graph instead of launching kernels one by one.
        float_dtype: of everything else; None is bfloat16 for "bf16" and "int4", else float16 (on
            the CPU float32).
    """

    arithmetic: Arithmetic = Arithmetic.FLOAT16
    sparse: bool = True
    faster_only: bool = True
    compiled: bool = False
    graph: bool = True
    float_dtype: torch.dtype | None = None

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The float that the network runs in."""
        if self.float_dtype is not None:
            return self.float_dtype
        if device.type != "cuda":
            return torch.float32
        wide = self.arithmetic in (Arithmetic.BFLOAT16, Arithmetic.INT4, Arithmetic.FP8)
        return torch.bfloat16 if wide else torch.float16


class LinearLayer(nn.Module):
    """A product over the last dimension."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        """(..., cols) -> (..., rows)."""
        found: Tensor = self.product(x.reshape(-1, x.shape[-1]))
        return found.reshape(*x.shape[:-1], found.shape[-1])


class PointwiseLayer(nn.Module):
    """A 1x1 convolution as a product over the pixels of a channels-last tensor."""

    def __init__(self, product: Product, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.product = product
        self._stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, rows, h / stride, w / stride), channels last."""
        down, right = self._stride
        pixels = x[:, :, ::down, ::right].permute(0, 2, 3, 1)
        found: Tensor = self.product(pixels.reshape(-1, pixels.shape[-1]))
        return found.reshape(*pixels.shape[:-1], found.shape[-1]).permute(0, 3, 1, 2)


def require_device(name: str = "cuda") -> torch.device:
    """The device of that name.

    Raises:
        RuntimeMissingError: it is a CUDA device, and there is none.
    """
    from obc_deploy.errors import ProblemError
    from obc_deploy.solvers.dispatch import torch_device

    try:
        return torch_device(name)
    except ProblemError as error:
        raise RuntimeMissingError(f"{TITLE}: {error}") from error


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call: on CUDA inside a graph of several, so that launches do not count.

    Raises:
        RuntimeError: the call fails, or cannot be captured.
    """
    for _ in range(_WARM_RUNS):
        call()
    if device.type != "cuda":
        taken = []
        for _ in range(_GRAPH_REPEATS):
            begin = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(taken)
    replay = captured(lambda: [call() for _ in range(_CALLS_PER_GRAPH)])
    replay()
    times = [timed_on_device(replay) for _ in range(_GRAPH_REPEATS)]
    return statistics.median(times) / _CALLS_PER_GRAPH


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of a call that has run before; replaying it repeats all of its kernels.

    Raises:
        RuntimeError: the call does something that a graph cannot hold.
    """
    torch.cuda.synchronize()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay(kept: object = kept) -> None:
        # The outputs live as long as the graph that writes them.
        graph.replay()

    return replay


def timed_on_device(call: Callable[[], object]) -> float:
    """Milliseconds between CUDA events before and after a call."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    lost = (found.float() - wanted.float()).square().mean().sqrt()
    whole = wanted.float().square().mean().sqrt()
    if not bool(torch.isfinite(lost)):
        return float("inf")
    return float(lost / whole.clamp(min=1e-12))


@dataclass(frozen=True)
class Verdict:
    """What was measured of a product, for others of its shape.

    Attributes:
        algorithm: the fastest 2:4 algorithm; empty for dense products.
        slower: that the dense product was faster; None where it was not.
    """

    algorithm: dict[str, Any]
    slower: str | None = None


class _Builder(fx.Interpreter):
    """Runs the 16-bit network once and gives each layer's call sites their product."""

    def __init__(
        self, module: fx.GraphModule, model: CompressedModel, options: CudaOptions,
        device: torch.device, gpu: GpuAbilities,
    ) -> None:  # fmt: skip
        super().__init__(module)
        self._model = model
        self._options = options
        self._device = device
        self._gpu = gpu
        self._sites = {site: layer for layer in model.layers for site in layer.call_sites}
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self.choices: dict[str, KernelChoice] = {}
        self.made: dict[str, nn.Module] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; where it is a layer, choose what it will run on."""
        layer = self._sites.get(n.name)
        if layer is not None:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            self._choose(layer, n, arguments[0])
        return super().run_node(n)

    def _choose(self, layer: Layer, site: fx.Node, x: Tensor) -> None:
        source = site.args[0]
        assert isinstance(source, fx.Node)
        known = self._model.ranges.get(source.name)
        form = self._model.forms.get(layer.name)
        original = get_tensor(self._model.network.module, layer.weight_name)
        weight = weight_to_matrix(layer, original.detach())
        facts = layer_facts(layer, weight, form, has_range=known is not None)
        choice = choose_kernel(
            facts, self._options.arithmetic, self._gpu, sparse=self._options.sparse
        )
        if choice.kernel is not Kernel.DENSE:
            found = self._product(layer, choice, weight, form, known, x, site)
            if isinstance(found, str):
                choice = KernelChoice(layer.name, Kernel.DENSE, found)
            else:
                self.made[site.name] = (
                    LinearLayer(found)
                    if layer.kind is LayerKind.LINEAR
                    else PointwiseLayer(found, layer.stride)
                )
        before = self.choices.get(layer.name)
        # A layer with several call sites is as good as the worst of them.
        if before is None or choice.reason is not None:
            self.choices[layer.name] = choice

    def _product(
        self, layer: Layer, choice: KernelChoice, weight: Tensor,
        form: CompressedLayer[Tensor] | None, known: ActivationRange | None, x: Tensor,
        site: fx.Node,
    ) -> Product | str:  # fmt: skip
        """The fastest right product for one call site, or why there is none."""
        dtype, device = self._options.dtype_on(self._device), self._device
        # In the float that the layer would else run in: what it multiplies is compared, not
        # whether float16 holds the weights.
        matrix = weight.to(device)
        name = _bias_name(site)
        bias = None
        if name is not None:
            bias = get_tensor(self._model.network.module, name).detach().to(device)
        bits = 8 if form is None else min(8, form.scheme.activation_bits)
        grid = None if known is None else activation_grid(known, bits=bits)
        largest = None if known is None else max(-known.low, known.high)
        vectors = _vectors(layer, x)
        dense = DenseProduct(matrix, bias, dtype).to(device)
        return fitting_product(
            choice.kernel, matrix, bias, form, grid, largest, dtype, vectors,
            against=dense if self._options.faster_only and device.type == "cuda" else None,
            verdicts=self._verdicts,
        )  # fmt: skip


def fitting_product(
    kernel: Kernel,
    weight: Tensor,
    bias: Tensor | None,
    form: CompressedLayer[Tensor] | None,
    grid: ActivationGrid | None,
    largest: float | None,
    dtype: torch.dtype,
    x: Tensor,
    *,
    against: Product | None = None,
    verdicts: dict[tuple[object, ...], Verdict] | None = None,
) -> Product | str:
    """The first product of a kernel that is right on an input, and faster than another; or why not.

    Args:
        kernel: which.
        weight: (rows, cols) float, on the device.
        bias: (rows,), or None.
        form: codes and scales, for integer kernels.
        grid: of the input, for int8.
        largest: magnitude of the input, for fp8.
        dtype: float of inputs and outputs.
        x: (m, cols) an input.
        against: what it must be faster than, if anything.
        verdicts: what was found for products of the same shape, which is not measured again.
    """
    known = {} if verdicts is None else verdicts
    failures: list[str] = []
    makers = 2 if kernel is Kernel.SPARSE_INT8 else 1
    for index in range(makers):
        key = (kernel, index, *weight.shape, len(x), bias is None)
        verdict = known.get(key)
        if verdict is not None and verdict.slower is not None:
            return verdict.slower
        try:
            product = products(kernel, weight, bias, form, grid, largest, dtype)[index]
            product.to(x.device)
            sparse = product.sparse_weight
            if verdict is None:
                product.tune(x)
            elif sparse is not None:
                sparse.algorithm = verdict.algorithm
            error = relative_rms(product(x), product.expected(x))
            if error > TOLERANCE:
                failures.append(f"its outputs are off by {100 * error:.2g} %")
                continue
            product.forget()
            algorithm = {} if sparse is None else sparse.algorithm
            if against is not None and verdict is None:
                ours, dense = (milliseconds(lambda p=p: p(x), x.device) for p in (product, against))  # type: ignore[misc]
                if ours >= dense:
                    slower = f"{kernel.value} took {ours:.4f} ms, dense {dense:.4f} ms"
                    known[key] = Verdict(algorithm, slower)
                    return slower
            known[key] = Verdict(algorithm)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            failures.append(first_line(error))
            continue
        return product
    return f"{kernel.value}: {'; '.join(dict.fromkeys(failures))}"


def _bias_name(site: fx.Node) -> str | None:
    from obc_deploy.capture import parameter_name

    return parameter_name(site.args[2]) if len(site.args) > 2 else None


def _vectors(layer: Layer, x: Tensor) -> Tensor:
    """A layer's input as the rows of a matrix."""
    if layer.kind is LayerKind.LINEAR:
        return x.reshape(-1, x.shape[-1])
    down, right = layer.stride
    pixels = x[:, :, ::down, ::right].permute(0, 2, 3, 1)
    return pixels.reshape(-1, pixels.shape[-1])


def in_float(module: fx.GraphModule, dtype: torch.dtype, device: torch.device) -> None:
    """Move a captured graph to a device and a float, its constants and its casts included."""
    module.to(device=device, dtype=dtype)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(module, str(node.target))
            if isinstance(tensor, Tensor):
                wanted = dtype if tensor.is_floating_point() else tensor.dtype
                if tensor.dtype != wanted or tensor.device != device:
                    set_tensor(module, str(node.target), tensor.detach().to(device, wanted))
            continue
        # Images are held channels last: what was a view there may have to copy here.
        if node.target is aten.view.default:
            node.target = aten.reshape.default

        def placed(value: Any) -> Any:
            if value is torch.float32:
                return dtype
            return device if isinstance(value, torch.device) else value

        node.args = fx.node.map_aggregate(node.args, placed)
        node.kwargs = fx.node.map_aggregate(node.kwargs, placed)
    module.recompile()


class TorchCudaSession:
    """A compressed model that can be run, timed and profiled; made by `open_torch_cuda`.

    A context manager. The same methods as `obc_deploy.runtimes.session.Session`.

    Attributes:
        runtime: NAME.
        version: PyTorch's.
        batch_size: samples of an inference.
        inputs: what `run` takes.
        outputs: what `run` returns.
        layers: what each layer runs on, and why not on something faster.
        notes: what else was asked for and is not so.
        facts: all that in JSON-ready values.
    """

    def __init__(
        self, model: CompressedModel, options: CudaOptions, device: torch.device, batch_size: int
    ) -> None:
        """See `open_torch_cuda`."""
        self.runtime = NAME
        self.version = torch.__version__
        self.batch_size = batch_size
        self.options = options
        self.notes: list[str] = []
        self._device = device
        self._dtype = options.dtype_on(device)
        network = model.network.copy()
        module = network.module
        in_float(module, self._dtype, device)
        _channels_last(module)
        samples = model.samples.arrays(0, min(batch_size, len(model.samples)))
        example = [torch.from_numpy(_at_batch(array, batch_size)) for array in samples]
        self.inputs = tuple(
            TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for name, t in zip(network.input_names, example, strict=True)
        )
        self._held = [self._placed(tensor) for tensor in example]
        gpu = GpuAbilities.of(device)
        builder = _Builder(module, model, options, device, gpu)
        with torch.no_grad():
            builder.run(*self._held)
        self.layers = tuple(
            builder.choices[layer.name] for layer in model.layers if layer.name in builder.choices
        )
        _replace_sites(module, builder.made)
        self._module = module
        self._call: Callable[..., Any] = module
        if options.compiled:
            self._compile()
        self._replay: Callable[[], None] | None = None
        self._results = self._eager()
        if device.type == "cuda" and options.graph:
            self._capture()
        self._names = tuple(
            "output" if len(self._results) == 1 else f"output{i}" for i in range(len(self._results))
        )
        self.outputs = tuple(
            TensorSpec(name, tuple(t.shape), "float32")
            for name, t in zip(self._names, self._results, strict=True)
        )
        self.facts: dict[str, Any] = {
            "device": gpu.name,
            "arithmetic": options.arithmetic.value,
            "dtype": str(self._dtype).removeprefix("torch."),
            "graph": self._replay is not None,
            "layers": [choice.as_dict() for choice in self.layers],
            "notes": list(self.notes),
        }

    def _placed(self, tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point()
        placed = tensor.to(self._device, self._dtype if floating else tensor.dtype)
        if placed.dim() == 4:
            return placed.contiguous(memory_format=torch.channels_last)
        return placed.contiguous()

    def _eager(self) -> list[Tensor]:
        with torch.no_grad():
            found = self._call(*self._held)
        return list(found) if isinstance(found, list | tuple) else [found]

    def _compile(self) -> None:
        try:
            self._call = torch.compile(self._module, dynamic=False)
            self._eager()
        except Exception as error:
            # Whatever the compiler lacks here (Triton, a C compiler, an operator): it is optional.
            self.notes.append(f"torch.compile failed: {first_line(error)}")
            self._call = self._module

    def _capture(self) -> None:
        def call() -> list[Tensor]:
            self._results = self._eager()
            return self._results

        try:
            self._replay = captured(call)
        except RuntimeError as error:
            self.notes.append(f"no CUDA graph: {first_line(error)}")
            self._results = self._eager()

    def _infer(self) -> None:
        if self._replay is not None:
            self._replay()
        else:
            self._results = self._eager()

    def __enter__(self) -> TorchCudaSession:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give the device's memory back; nothing happens the second time."""
        self._replay = None
        self._held, self._results = [], []
        self._call = self._module = nn.Module()  # type: ignore[assignment]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[Tensor]:
        """The inputs in pinned memory, checked."""
        if not self._held:
            raise RuntimeFailedError("the session is closed; open a new one")
        wanted = [spec.name for spec in self.inputs]
        if sorted(inputs) != sorted(wanted):
            raise RuntimeFailedError(
                f"inputs {sorted(inputs)} were given and the model takes {wanted}; name exactly "
                "these"
            )
        loaded = []
        for spec, held in zip(self.inputs, self._held, strict=True):
            array = inputs[spec.name]
            if array.shape != spec.shape or str(array.dtype) != spec.dtype:
                raise RuntimeFailedError(
                    f"input '{spec.name}' is {array.dtype} {array.shape} and the session takes "
                    f"{spec.dtype} {spec.shape}; convert it, or open a session for that batch"
                )
            given = torch.from_numpy(np.ascontiguousarray(array)).to(held.dtype)
            loaded.append(given.pin_memory() if held.is_cuda else given)
        return loaded

    def _put(self, loaded: list[Tensor]) -> None:
        for held, given in zip(self._held, loaded, strict=True):
            held.copy_(given, non_blocking=True)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name, float32, for one set of inputs by name.

        Raises:
            RuntimeFailedError: inputs that do not fit, or a closed session.
        """
        self._put(self._load(inputs))
        self._infer()
        found = [t.detach().float().cpu().numpy() for t in self._results]
        return dict(zip(self._names, found, strict=True))

    def time(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        warmup: int = 10,
        samples: int = 100,
        copies: bool = False,
    ) -> TimedSamples:
        """Milliseconds of each run, between CUDA events.

        Args:
            inputs: the network's inputs.
            warmup: runs that do not count, returned apart.
            samples: runs that count.
            copies: count copies of inputs from, and of outputs to, pinned memory.

        Raises:
            RuntimeFailedError: as in `run`, or nothing to time.
        """
        if warmup < 0 or samples < 1:
            raise RuntimeFailedError(
                f"{warmup} warm-up runs and {samples} samples cannot be timed; ask for 0 or more "
                "and 1 or more"
            )
        loaded = self._load(inputs)
        self._put(loaded)
        pinned = self._device.type == "cuda"
        back = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in self._results]

        def once() -> None:
            if copies:
                self._put(loaded)
            self._infer()
            if copies:
                for host, result in zip(back, self._results, strict=True):
                    host.copy_(result, non_blocking=True)

        taken = [self._timed(once) for _ in range(warmup + samples)]
        return TimedSamples(np.array(taken[:warmup]), np.array(taken[warmup:]))

    def _timed(self, call: Callable[[], None]) -> float:
        if self._device.type == "cuda":
            return timed_on_device(call)
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)

    def profile(
        self, inputs: Mapping[str, np.ndarray[Any, Any]], *, warmup: int = 3, iterations: int = 10
    ) -> list[LayerProfile]:
        """The network operator by operator, each launched by itself, with median milliseconds.

        Launches count here: the sum exceeds what a CUDA graph takes.

        Raises:
            RuntimeFailedError: as in `run`.
        """
        self._put(self._load(inputs))
        profiler = _Profiler(self._module, self._timed)
        with torch.no_grad():
            for _ in range(warmup):
                profiler.run(*self._held)
            profiler.taken.clear()
            for _ in range(iterations):
                profiler.run(*self._held)
        kernels = {choice.layer: choice.kernel for choice in self.layers}
        return [
            _layer_profile(name, target, statistics.median(times), self._module, kernels)
            for (name, target), times in profiler.taken.items()
        ]


class _Profiler(fx.Interpreter):
    """Times every operator of a graph."""

    def __init__(
        self, module: fx.GraphModule, timed: Callable[[Callable[[], None]], float]
    ) -> None:
        super().__init__(module)
        self._timed = timed
        self.taken: dict[tuple[str, str], list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node between two events."""
        if n.op not in ("call_function", "call_module"):
            return super().run_node(n)
        result: list[Any] = []
        ms = self._timed(lambda: result.append(super(_Profiler, self).run_node(n)))
        self.taken.setdefault((n.name, str(n.target)), []).append(ms)
        return result[0]


def _layer_profile(
    name: str, target: str, ms: float, module: fx.GraphModule, kernels: Mapping[str, Kernel]
) -> LayerProfile:
    owner = getattr(module, target, None) if "." not in target else None
    if not isinstance(owner, LinearLayer | PointwiseLayer):
        return LayerProfile(name, target, ms, outputs=(name,))
    product = type(owner.product).__name__
    return LayerProfile(
        name, product, ms, kernel_sparsity=0.5 if product.startswith("Sparse") else 0.0,
        native=True, outputs=(name,), int8="Int8" in product,
    )  # fmt: skip


def _at_batch(array: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """Samples repeated up to a batch."""
    return np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:])))


def _channels_last(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        if parameter.dim() == 4:
            last = parameter.detach().contiguous(memory_format=torch.channels_last)
            set_tensor(module, name, last)


def _replace_sites(module: fx.GraphModule, made: Mapping[str, nn.Module]) -> None:
    """Put layers of their own in place of call sites; weights that nobody reads any more go."""
    for index, node in enumerate(list(module.graph.nodes)):
        layer = made.get(node.name)
        if layer is None:
            continue
        name = f"product_{index}"
        module.add_submodule(name, layer)
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def open_torch_cuda(
    model: CompressedModel | Path | str,
    options: CudaOptions | None = None,
    *,
    batch_size: int = 1,
    device: str = "cuda",
) -> TorchCudaSession:
    """Open a compressed model, or its run directory, on a GPU.

    Args:
        model: the model, or a run directory.
        options: arithmetic, sparsity, graphs.
        batch_size: samples of an inference.
        device: "cuda" or "cuda:1"; on "cpu" the integer products run too, to be checked.

    Raises:
        DeviceMemoryError: it does not fit the device.
        RunDirectoryError: there is no such run.
        RuntimeFailedError: PyTorch cannot run the network there.
        RuntimeMissingError: there is no CUDA device.
    """
    place = require_device(device)
    chosen = options or CudaOptions()
    if batch_size < 1:
        raise RuntimeFailedError(f"batch size {batch_size}: give 1 or more")
    if isinstance(model, Path | str):
        from obc_deploy.run_directory import load_run

        model = load_run(model, baselines=False)
    fixed = model.network.batch_size
    if fixed is not None and fixed != batch_size:
        raise RuntimeFailedError(f"the model takes batches of {fixed} alone; open it for that size")
    try:
        return TorchCudaSession(model, chosen, place, batch_size)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the network does not fit the memory of '{place}' with batches of {batch_size}; give "
            "a smaller batch size"
        ) from error
    except RuntimeError as error:
        raise RuntimeFailedError(f"{TITLE}: {first_line(error)}") from error
