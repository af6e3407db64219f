"""What layers cost in ONNX Runtime's operators and in ours: the measurements behind the cost model.

    python -m obc_deploy.benchmarks.sparse_layer_costs [--only integer|float]

For every shape there are two sessions, one of ONNX Runtime's operators and one of ours, on blocked
tensors where they are integer ones. They run in turn in one process, on one thread, and ONNX
Runtime's trace says how long each operator took. Per operator, times are fitted as non-negative
sums of counts (products, blocks times pixels, ...), by least squares of relative errors. What is
printed goes into `obc_deploy.exporters.operator_costs`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from obc_deploy.exporters.sparse_cost import COUNTS, FEW_ROWS, Work
from obc_deploy.runtimes import sparse

MICROSOFT = "com.microsoft"
ROUNDS = 40
WARMUP = 8
SCALE, ZERO = 0.05, 10
GRID = {"input_scale": SCALE, "input_zero_point": ZERO}
OUTPUT = {"output_scale": SCALE, "output_zero_point": ZERO}

CONVOLUTIONS = (
    # channels, size, kernel, stride, outputs
    (3, 32, 3, 1, 16),
    (3, 32, 3, 1, 64),
    (3, 224, 7, 2, 64),
    (16, 32, 3, 1, 16),
    (16, 32, 3, 2, 32),
    (32, 16, 3, 1, 32),
    (32, 16, 1, 2, 64),
    (64, 8, 3, 1, 64),
    (64, 32, 3, 1, 64),
    (128, 16, 3, 1, 128),
    (256, 8, 3, 1, 256),
    (512, 4, 3, 1, 512),
    (512, 2, 3, 1, 512),
    (256, 4, 3, 1, 256),
    (64, 56, 1, 1, 256),
    (64, 56, 3, 1, 64),
    (256, 56, 1, 2, 128),
    (128, 28, 3, 1, 128),
    (256, 14, 3, 1, 256),
    (1024, 14, 1, 1, 256),
    (512, 7, 3, 1, 512),
    (2048, 7, 1, 1, 512),
    (24, 56, 1, 1, 144),
    (320, 7, 1, 1, 1280),
)
DEPTHWISE = (
    (32, 112, 1),
    (96, 112, 2),
    (144, 56, 1),
    (144, 56, 2),
    (32, 32, 1),
    (192, 28, 1),
    (384, 14, 1),
    (576, 14, 2),
    (64, 8, 1),
    (960, 7, 1),
)
PLANES = (
    (16, 32),
    (32, 16),
    (64, 8),
    (64, 56),
    (256, 56),
    (256, 14),
    (512, 7),
    (64, 112),
    (3, 224),
)
LINEARS = ((64, 10), (512, 10), (512, 512), (2048, 1000), (4096, 4096))


@dataclass
class Network:
    """A graph with one input, node by node."""

    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def constant(self, value: Any, dtype: Any) -> str:
        """A constant; returns its name."""
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, kind: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        """A node; returns its output."""
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes)
        )
        return name

    def own(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """A node of our domain."""
        return self.add(kind, inputs, sparse.DOMAIN, **attributes)

    def grid(self) -> list[str]:
        """Scale and zero point that all activations here share."""
        return [self.constant(SCALE, np.float32), self.constant(ZERO, np.uint8)]

    def model(
        self, outputs: str | list[str], shape: tuple[int, ...], dtype: Any = np.float32
    ) -> bytes:
        """The file's content; input and outputs have the same type."""
        from onnx import helper

        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        names = [outputs] if isinstance(outputs, str) else outputs
        graph = helper.make_graph(
            self.nodes,
            "cost",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(output, kind, None) for output in names],
            self.constants,
        )
        opsets = [("", 17), (MICROSOFT, 1), (sparse.DOMAIN, sparse.DOMAIN_VERSION)]
        ids = [helper.make_opsetid(*entry) for entry in opsets]
        content: bytes = helper.make_model(
            graph, opset_imports=ids, ir_version=8
        ).SerializeToString()
        return content


@dataclass
class Case:
    """One shape, in both forms, and the counts that each operator's time is explained by."""

    shape: tuple[int, ...]
    plain: bytes
    blocked: bytes
    work: dict[str, Work]


def block_sparse_codes(
    rng: np.random.Generator, shape: tuple[int, ...], zeros: float, together: int = 1
) -> npt.NDArray[Any]:
    """int8 weights whose blocks of four input channels are zero with a probability.

    Args:
        rng: random numbers.
        shape: (outputs, channels, kernel height, kernel width).
        zeros: the probability.
        together: so many output channels in a row have the same blocks.
    """
    outputs, channels = shape[:2]
    codes = rng.integers(1, 40, shape) * rng.choice([-1, 1], shape)
    keep = rng.random((-(-outputs // together), -(-channels // 4), *shape[2:])) >= zeros
    keep = np.repeat(keep, together, axis=0)[:outputs]
    mask = np.repeat(keep, 4, axis=1)[:, :channels]
    masked: npt.NDArray[Any] = (codes * mask).astype(np.int8)
    return masked


def convolution(
    rng: np.random.Generator,
    layer: tuple[int, int, int, int, int],
    zeros: float,
    *,
    residual: bool = False,
) -> Case:
    """A convolution with block-sparse weights; of ours, with a residual or without."""
    from obc_deploy.exporters.sparse_blocks import stored_blocks

    channels, size, kernel, stride, outputs = layer
    pad = kernel // 2
    codes = block_sparse_codes(rng, (outputs, channels, kernel, kernel), zeros)
    bias, scale = rng.integers(-99, 99, outputs), np.full(outputs, 0.01)
    windows: dict[str, Any] = {
        "kernel_shape": [kernel] * 2,
        "strides": [stride] * 2,
        "pads": [pad] * 4,
    }
    shape = (1, channels, size, size)
    plain = Network()
    grid = plain.grid()
    x = plain.add("QuantizeLinear", ["x", *grid])
    weight = [plain.constant(codes, np.int8), plain.constant(scale, np.float32)]
    weight.append(plain.constant(np.zeros(outputs), np.int8))
    y = plain.add(
        "QLinearConv", [x, *grid, *weight, *grid, plain.constant(bias, np.int32)], **windows
    )
    out = plain.add("DequantizeLinear", [y, *grid])
    ours = Network()
    stored = stored_blocks(codes)
    x = ours.own("QuantizeToBlocks", ["x"], border=pad, **OUTPUT)
    parts = [ours.constant(stored.values, np.int8), ours.constant(stored.mask, np.uint8)]
    parts += [ours.constant(scale, np.float32), ours.constant(bias, np.int32)]
    side = (size + 2 * pad - kernel) // stride + 1
    more: dict[str, Any] = {}
    if residual:
        codes = rng.integers(0, 255, (1, -(-outputs // 4), side, side, 4))
        parts.append(ours.constant(codes, np.uint8))
        for name in ("residual", "convolution"):
            more |= {f"{name}_scale": 0.04, f"{name}_zero_point": 20}
    y = ours.own(
        "SparseConvolution", [x, *parts], channels=channels, input_border=pad, **windows, **GRID,
        **OUTPUT, **more,
    )  # fmt: skip
    ours_out = ours.own("DequantizeFromBlocks", [y], channels=outputs, **GRID)
    work = Work.of_convolution(
        pixels=side * side, in_pixels=size * size, channels=channels, outputs=outputs,
        positions=kernel * kernel, blocks=len(stored.values), residual=residual,
    )  # fmt: skip
    inputs, results = Work.of_plane(channels, size, size), Work.of_plane(outputs, side, side)
    return Case(
        shape,
        plain.model(out, shape),
        ours.model(ours_out, shape),
        {
            "QLinearConv": work, "SparseConvolution": work, "QuantizeLinear": inputs,
            "QuantizeToBlocks": inputs, "DequantizeLinear": results,
            "DequantizeFromBlocks": results,
        },
    )  # fmt: skip


def depthwise(rng: np.random.Generator, channels: int, size: int, stride: int) -> Case:
    """A 3x3 depthwise convolution."""
    codes = rng.integers(-40, 40, (channels, 1, 3, 3))
    scale = np.full(channels, 0.01)
    windows: dict[str, Any] = {"strides": [stride] * 2, "pads": [1] * 4}
    shape = (1, channels, size, size)
    plain = Network()
    grid = plain.grid()
    x = plain.add("QuantizeLinear", ["x", *grid])
    weight = [plain.constant(codes, np.int8), plain.constant(scale, np.float32)]
    weight.append(plain.constant(np.zeros(channels), np.int8))
    y = plain.add(
        "QLinearConv", [x, *grid, *weight, *grid], kernel_shape=[3, 3], group=channels, **windows
    )
    out = plain.add("DequantizeLinear", [y, *grid])
    ours = Network()
    x = ours.own("QuantizeToBlocks", ["x"], border=1, **OUTPUT)
    parts = [ours.constant(codes, np.int8), ours.constant(scale, np.float32)]
    y = ours.own(
        "DepthwiseConvolution", [x, *parts], channels=channels, input_border=1, **windows, **GRID,
        **OUTPUT,
    )  # fmt: skip
    ours_out = ours.own("DequantizeFromBlocks", [y], channels=channels, **GRID)
    side = (size - 1) // stride + 1
    work = Work.of_plane(channels, side, side, 9)
    return Case(
        shape,
        plain.model(out, shape),
        ours.model(ours_out, shape),
        {"QLinearConv": work.named("QLinearConv depthwise"), "DepthwiseConvolution": work},
    )


def plane(channels: int, size: int) -> Case:
    """Adds, concatenations, pools and conversions of one shape."""
    pixels = size * size
    shape = (1, channels, size, size)
    whole = Work.of_plane(channels, size, size)
    pooled = Work.of_plane(channels, size // 2, size // 2, 4)
    windows: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0] * 4}
    plain = Network()
    grid = plain.grid()
    x = plain.add("QuantizeLinear", ["x", *grid])
    flat = plain.constant([channels, pixels], np.int64)
    back = plain.constant([1, channels, size, size], np.int64)
    rows = plain.add("Reshape", [x, flat])
    turned = plain.add("Transpose", [rows], perm=[1, 0])
    again = plain.add("Reshape", [turned, back])
    both = plain.add("QLinearAdd", [x, *grid, again, *grid, *grid], MICROSOFT)
    joined = plain.add("QLinearConcat", [*grid, both, *grid, x, *grid], MICROSOFT, axis=1)
    slow_peaks = plain.add("MaxPool", [x], **windows)
    # Behind a convolution, as in networks: ONNX Runtime then pools channels last.
    weight = [plain.constant(np.ones((channels, channels, 1, 1)), np.int8)]
    weight += [plain.constant(0.01, np.float32), plain.constant(0, np.int8)]
    both = plain.add("QLinearConv", [both, *grid, *weight, *grid], kernel_shape=[1, 1])
    peaks = plain.add("MaxPool", [both], **windows)
    means = plain.add("QLinearAveragePool", [both, *grid, *grid], MICROSOFT, **windows)
    whole_mean = plain.add(
        "QLinearGlobalAveragePool", [both, *grid, *grid], MICROSOFT, channels_last=0
    )
    found = [plain.add("DequantizeLinear", [v, *grid]) for v in (joined, peaks, means, whole_mean)]
    found.append(plain.add("DequantizeLinear", [slow_peaks, *grid]))
    sums = [plain.add("ReduceMax", [v], keepdims=0) for v in found]
    out = plain.add("Sum", sums)
    ours = Network()
    zeros = {"zero_point": ZERO}
    x = ours.own("QuantizeToBlocks", ["x"], border=0, **OUTPUT)
    codes = ours.own("FromBlocks", [x], channels=channels)
    y = ours.own("ToBlocks", [codes], **zeros)
    pair: dict[str, Any] = {"input_scales": [SCALE] * 2, "input_zero_points": [ZERO] * 2}
    both = ours.own("Add", [x, y], channels=channels, **pair, **OUTPUT)
    joined = ours.own("Concat", [both, x], channels=[channels] * 2, **pair, **OUTPUT)
    peaks = ours.own("MaxPool", [both], channels=channels, **windows, **zeros)
    means = ours.own("AveragePool", [both], channels=channels, **windows, **GRID, **OUTPUT)
    whole_mean = ours.own("GlobalAveragePool", [both], channels=channels, **GRID, **OUTPUT)
    counts = ((joined, 2 * channels), (peaks, channels), (means, channels), (whole_mean, channels))
    found = [ours.own("DequantizeFromBlocks", [v], channels=n, **GRID) for v, n in counts]
    ours_out = ours.add("Sum", [ours.add("ReduceMax", [v], keepdims=0) for v in found])
    twice = Work.of_plane(2 * channels, size, size)
    return Case(
        shape,
        plain.model(out, shape),
        ours.model(ours_out, shape),
        {
            "Transpose": whole, "QLinearAdd": whole, "Add": whole, "QLinearConcat": twice,
            "Concat": twice, "NhwcMaxPool": pooled, "NchwMaxPool": pooled, "MaxPool": pooled,
            "QLinearAveragePool": pooled,
            "AveragePool": pooled, "QLinearGlobalAveragePool": whole, "GlobalAveragePool": whole,
            "FromBlocks": whole, "ToBlocks": whole,
        },
    )  # fmt: skip


def linear(rng: np.random.Generator, features: int, outputs: int, zeros: float) -> Case:
    """A fully connected layer with block-sparse weights."""
    from obc_deploy.exporters.sparse_blocks import stored_blocks

    codes = block_sparse_codes(rng, (outputs, features), zeros)
    scale = np.full(outputs, 0.01)
    shape = (1, features)
    plain = Network()
    grid = plain.grid()
    x = plain.add("QuantizeLinear", ["x", *grid])
    weight = [plain.constant(codes, np.int8), plain.constant(scale, np.float32)]
    weight.append(plain.constant(np.zeros(outputs), np.int8))
    out = plain.add("QGemm", [x, *grid, *weight], MICROSOFT, transB=1)
    ours = Network()
    stored = stored_blocks(codes)
    grid = ours.grid()
    x = ours.add("QuantizeLinear", ["x", *grid])
    parts = [ours.constant(stored.values, np.int8), ours.constant(stored.mask, np.uint8)]
    parts.append(ours.constant(scale, np.float32))
    ours_out = ours.own("SparseLinearDequantize", [x, *parts], features=features, **GRID)
    work = Work.of_linear(1, features, outputs, len(stored.values))
    return Case(
        shape,
        plain.model(out, shape),
        ours.model(ours_out, shape),
        {"QGemm": work, "SparseLinearDequantize": work},
    )


def sparse_floats(
    rng: np.random.Generator, shape: tuple[int, ...], zeros: float
) -> npt.NDArray[np.float32]:
    """Weights of which each is zero with a probability."""
    weight = rng.standard_normal(shape) * (rng.random(shape) >= zeros)
    return weight.astype(np.float32)


def float_convolution(
    rng: np.random.Generator, layer: tuple[int, int, int, int, int], zeros: float
) -> Case:
    """A convolution with unstructured sparse float weights, and a ReLU."""
    from obc_deploy.exporters.sparse_float import stored_entries

    channels, size, kernel, stride, outputs = layer
    pad = kernel // 2
    weight = sparse_floats(rng, (outputs, channels, kernel, kernel), zeros)
    windows: dict[str, Any] = {
        "kernel_shape": [kernel] * 2,
        "strides": [stride] * 2,
        "pads": [pad] * 4,
    }
    shape = (1, channels, size, size)
    bias = rng.standard_normal(outputs)
    plain, ours = Network(), Network()
    y = plain.add(
        "Conv",
        ["x", plain.constant(weight, np.float32), plain.constant(bias, np.float32)],
        **windows,
    )
    stored = stored_entries(weight)
    parts = [ours.constant(stored.values, np.float32), ours.constant(stored.mask, np.uint8)]
    parts.append(ours.constant(bias, np.float32))
    out = ours.own("SparseConvolutionFloat", ["x", *parts], channels=channels, lower=0.0, **windows)
    side = (size + 2 * pad - kernel) // stride + 1
    work = Work.of_float_convolution(
        images=1, in_size=(size, size), out_size=(side, side), channels=channels, outputs=outputs,
        positions=kernel * kernel, entries=len(stored.values),
    )  # fmt: skip
    return Case(
        shape, plain.model(plain.add("Relu", [y]), shape), ours.model(out, shape),
        {"Conv": work, "SparseConvolutionFloat": work},
    )  # fmt: skip


def float_linear(
    rng: np.random.Generator, rows: int, features: int, outputs: int, zeros: float
) -> Case:
    """A fully connected layer with unstructured sparse float weights."""
    from obc_deploy.exporters.sparse_float import stored_entries

    weight = sparse_floats(rng, (outputs, features), zeros)
    shape = (rows, features)
    plain, ours = Network(), Network()
    y = plain.add("Gemm", ["x", plain.constant(weight, np.float32)], transB=1)
    stored = stored_entries(weight)
    parts = [ours.constant(stored.values, np.float32), ours.constant(stored.mask, np.uint8)]
    out = ours.own("SparseLinearFloat", ["x", *parts], features=features)
    work = Work.of_linear(rows, features, outputs, len(stored.values))
    kind = "rows" if rows >= FEW_ROWS else "row"
    return Case(
        shape, plain.model(y, shape), ours.model(out, shape),
        {"Gemm": work.named(f"Gemm {kind}"), "SparseLinearFloat": work.named(
            f"SparseLinearFloat {kind}")},
    )  # fmt: skip


def float_cases(rng: np.random.Generator) -> Iterator[Case]:
    """The float operators."""
    for layer in CONVOLUTIONS:
        for zeros in (0.5, 0.7, 0.8, 0.9, 0.95):
            yield float_convolution(rng, layer, zeros)
    for rows in (1, 16, 128):
        for features, outputs in LINEARS:
            for zeros in (0.5, 0.8, 0.9, 0.95):
                yield float_linear(rng, rows, features, outputs, zeros)


def integer_cases(rng: np.random.Generator) -> Iterator[Case]:
    """The integer operators."""
    for layer in CONVOLUTIONS:
        for zeros in (0.0, 0.5, 0.7, 0.8, 0.9):
            yield convolution(rng, layer, zeros)
        yield convolution(rng, layer, 0.8, residual=True)
    for channels, size, stride in DEPTHWISE:
        yield depthwise(rng, channels, size, stride)
    for channels, size in PLANES:
        yield plane(channels, size)
    for features, outputs in LINEARS:
        for zeros in (0.0, 0.5, 0.9):
            yield linear(rng, features, outputs, zeros)


def _times(trace: Path) -> dict[str, list[float]]:
    """Nanoseconds of each operator's runs, by its type; one node of each type."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(trace.read_text(encoding="utf-8")):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            taken[event["args"]["op_name"], name].append(event["dur"] * 1e3)
    found: dict[str, list[float]] = {}
    for (kind, _), durations in taken.items():
        kept = sorted(durations[WARMUP:])
        found.setdefault(kind, []).append(float(np.mean(kept[: max(1, len(kept) // 2)])))
    return found


def measure(case: Case, folder: Path) -> dict[str, float]:
    """Nanoseconds of each operator of a case, both sessions in turn."""
    import onnxruntime

    sessions = []
    for name, content in (("plain", case.plain), ("blocked", case.blocked)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / name)
        options.register_custom_ops_library(str(sparse.library_path()))
        sessions.append(
            onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        )
    x = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32)
    for _ in range(ROUNDS + WARMUP):
        for session in sessions:
            session.run(None, {"x": x})
    found: dict[str, float] = {}
    for session, is_plain in zip(sessions, (True, False), strict=True):
        trace = Path(session.end_profiling())
        for kind, times in _times(trace).items():
            name = "NchwMaxPool" if is_plain and kind == "MaxPool" else kind
            found[name] = float(np.mean(times))
        trace.unlink()
    return found


def fit(rows: list[tuple[Work, float]], names: tuple[str, ...]) -> tuple[dict[str, float], float]:
    """Nanoseconds a count, and the geometric mean of the factor by which the fit is off."""
    from scipy.optimize import nnls

    counts = np.array([[work.counts[name] for name in names] for work, _ in rows])
    times = np.array([time for _, time in rows])
    solved, _ = nnls(counts / times[:, None], np.ones(len(times)))
    predicted = np.maximum(counts @ solved, 1.0)
    error = float(np.exp(np.mean(np.abs(np.log(predicted / times)))))
    return dict(zip(names, (float(value) for value in solved), strict=True)), error


def main() -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["integer", "float"], help="both where it is left out")
    only = parser.parse_args().only
    rng = np.random.default_rng(0)
    parts = {"integer": integer_cases, "float": float_cases}
    cases = chain.from_iterable(make(rng) for part, make in parts.items() if only in (None, part))
    rows: dict[str, list[tuple[Work, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="obc-costs-") as folder:
        for case in cases:
            times = measure(case, Path(folder))
            for kind, work in case.work.items():
                if kind in times:
                    rows[work.name or kind].append((work, times[kind]))
    fitted: Mapping[str, dict[str, float]] = {}
    for kind, found in rows.items():
        constants, error = fit(found, COUNTS[kind])
        print(f'    "{kind}": {constants},  # {len(found)} shapes, off by {error:.2f}x')
        fitted = {**fitted, kind: constants}


if __name__ == "__main__":
    main()
