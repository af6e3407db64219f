"""Our sparse convolutions beside ONNX Runtime's dense int8, DeepSparse, and the processor's limit.

    python -m obc_deploy.benchmarks.sparse_kernels

All distinct convolutions of ResNet-50 and VGG-16 and MobileNet-v2's 1x1 ones, at 224 pixels, with a
ReLU where the network has one, with 0 to 95 % of their blocks zero at random. For each shape there
are sessions of ONNX Runtime's QLinearConv, on the layout that it chooses itself within a network,
and of our SparseConvolution a sparsity, joined as our exporter joins them; they take turns in one
process (`operator_copies` says how one operator's time is found). Outputs are compared first, bit
for bit. In the same turns a loop of products in registers alone measures the limit:

    share of the limit = non-zero blocks x output pixels / (time x products in registers a second)

Turns of a shape are minutes apart, in several passes over all shapes: on shared cores some seconds,
or whole minutes, are not like the others, and two threads, whose cores may be near or far from each
other, feel it most.

With `--together 4` every four output channels have the same blocks, as a solver might make them;
our kernels then load the pixels once for all four.

DeepSparse runs the same weights in its own process, in turn with ours once all others are done, and
its own profile says how long the convolution took. Ratios are medians over turns. Writes
`results/sparse-kernels` as JSON and Markdown, `-together-4` behind the name.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from obc_deploy.benchmarks.operator_copies import Copies, copies_for
from obc_deploy.benchmarks.record import RESULTS, take_record
from obc_deploy.benchmarks.sparse_layer_costs import (
    GRID,
    MICROSOFT,
    SCALE,
    ZERO,
    Network,
    block_sparse_codes,
)
from obc_deploy.errors import MeasurementError, ObcDeployError
from obc_deploy.exporters.frames import Frame, gains_by_margin
from obc_deploy.exporters.sparse_blocks import stored_blocks
from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.regions import joined

if TYPE_CHECKING:
    from obc_deploy.runtimes.session import Session

ZEROS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CHECKED = 0.8
"""The sparsity of the weights that ONNX Runtime gets too; zeros cost it what others do."""
DEEPSPARSE_ZEROS = (0.7, 0.8, 0.9)
RATE_ROUNDS = 4000
"""Of the loop in registers, at each turn: some hundred microseconds."""
PROFILED = 20
"""Inferences of each of DeepSparse's profiles."""


@dataclass(frozen=True, order=True)
class Shape:
    """A square convolution with padding that keeps the size, but for the stride.

    Attributes:
        network: where it is from.
        channels: of the input.
        size: height and width of the input.
        kernel: height and width of the kernel.
        stride: both ways.
        outputs: channels of the output.
        rectified: a ReLU or ReLU6 follows.
    """

    network: str
    channels: int
    size: int
    kernel: int
    stride: int
    outputs: int
    rectified: bool = False

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        window = f"{self.kernel}x{self.kernel}{stride}"
        after = " ReLU" if self.rectified else ""
        return f"{self.channels}x{self.size}x{self.size} {window} {self.outputs}{after}"

    @property
    def pad(self) -> int:
        """On each side."""
        return self.kernel // 2

    @property
    def pixels(self) -> int:
        """Of the output."""
        return ((self.size + 2 * self.pad - self.kernel) // self.stride + 1) ** 2

    @property
    def work(self) -> int:
        """Multiply-accumulates of one image."""
        return self.pixels * self.kernel**2 * self.channels * self.outputs

    @property
    def zero_point(self) -> int:
        """Of the output: what a ReLU leaves has no negative values."""
        return 0 if self.rectified else ZERO


def shapes_of(network: str, size: int = 224) -> list[Shape]:
    """A torchvision network's distinct convolutions without groups, and not on the image itself.

    Args:
        network: its name; of "mobilenet_v2" only the 1x1 ones.
        size: height and width of the image.
    """
    import torch
    import torchvision
    from torch.fx.passes.shape_prop import ShapeProp

    traced = torch.fx.symbolic_trace(torchvision.models.get_model(network, weights=None).eval())
    with torch.no_grad():
        ShapeProp(traced).propagate(torch.zeros(1, 3, size, size))

    def module_of(node: torch.fx.Node) -> torch.nn.Module | None:
        return traced.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_rectified(node: torch.fx.Node) -> bool:
        after = next(iter(node.users))
        module = module_of(after)
        if isinstance(module, torch.nn.BatchNorm2d):
            return is_rectified(after)
        return isinstance(module, torch.nn.ReLU | torch.nn.ReLU6)

    found: dict[Shape, None] = {}
    for node in traced.graph.nodes:
        module = module_of(node)
        if not isinstance(module, torch.nn.Conv2d):
            continue
        x, kernel, stride = module.in_channels, module.kernel_size[0], int(module.stride[0])
        if module.groups > 1 or x == 3 or (network == "mobilenet_v2" and kernel > 1):
            continue
        height = node.args[0].meta["tensor_meta"].shape[2]
        shape = Shape(network, x, height, kernel, stride, module.out_channels, is_rectified(node))
        found[shape] = None
    return list(found)


@dataclass(frozen=True)
class Layer:
    """A convolution's weights at one sparsity.

    Attributes:
        shape: the convolution.
        codes: (outputs, channels, kernel, kernel) int8.
        bias: (outputs,) int32.
    """

    shape: Shape
    codes: npt.NDArray[Any]
    bias: npt.NDArray[Any]

    @property
    def windows(self) -> dict[str, Any]:
        """Attributes of a convolution node."""
        shape = self.shape
        return {
            "kernel_shape": [shape.kernel] * 2,
            "strides": [shape.stride] * 2,
            "pads": [shape.pad] * 4,
        }

    def frame(self, blocks: int) -> Frame:
        """Of the input, as an exporter would choose it for so many blocks with non-zero weights."""
        shape, windows = self.shape, self.windows
        gains = gains_by_margin(windows["kernel_shape"], windows["strides"], blocks, shape.channels)
        return Frame.around(shape.size, shape.size, border=shape.pad, gains_by_margin=gains)

    @property
    def scale(self) -> float:
        """Of the weights: outputs use most of their range."""
        deviation = float(self.codes.std()) * 60.0 * math.sqrt(self.codes[0].size)
        return 40.0 / max(deviation, 1.0)

    def plain(self, batch: int, copies: int) -> bytes:
        """ONNX Runtime's operator on uint8 codes, channels last, which it turns them to itself."""
        shape, network = self.shape, Network()
        outputs = [
            network.add(
                "QLinearConv", ["x", *self._convolved(network, bias)], MICROSOFT, channels_last=1,
                **self.windows,
            )
            for bias in self._biases(copies)
        ]  # fmt: skip
        return network.model(outputs, (batch, shape.size, shape.size, shape.channels), np.uint8)

    def blocked(self, batch: int, copies: int) -> bytes:
        """Ours, on blocked codes; they are blocked once for all copies, and all are one region."""
        shape, network, stored = self.shape, Network(), stored_blocks(self.codes)
        frame = self.frame(len(stored.values))
        x = network.own("ToBlocks", ["x"], zero_point=ZERO, **frame.attributes())
        outputs = []
        for bias in self._biases(copies):
            parts = [network.constant(stored.values, np.int8)]
            parts.append(network.constant(stored.mask, np.uint8))
            parts.append(network.constant([self.scale], np.float32))
            parts.append(network.constant(bias, np.int32))
            outputs.append(
                network.own(
                    "SparseConvolution", [x, *parts], channels=shape.channels,
                    output_scale=SCALE, output_zero_point=shape.zero_point,
                    **frame.attributes("input_"), **self.windows, **GRID,
                )
            )  # fmt: skip
        return _in_regions(network.model(outputs, self._input(batch), np.uint8))

    def between_floats(self, batch: int) -> bytes:
        """ONNX Runtime's operator between quantizers, as DeepSparse wants it."""
        network = Network()
        grid = network.grid()
        x = network.add("QuantizeLinear", ["x", *grid])
        y = network.add("QLinearConv", [x, *self._convolved(network, self.bias)], **self.windows)
        zero_point = network.constant(self.shape.zero_point, np.uint8)
        out = network.add("DequantizeLinear", [y, grid[0], zero_point])
        return network.model(out, self._input(batch), np.float32)

    def _convolved(self, network: Network, bias: npt.NDArray[Any]) -> list[str]:
        """A QLinearConv's inputs behind the first one."""
        weight = [network.constant(self.codes, np.int8), network.constant(self.scale, np.float32)]
        weight.append(network.constant(0, np.int8))
        output = [network.constant(SCALE, np.float32)]
        output.append(network.constant(self.shape.zero_point, np.uint8))
        return [*network.grid(), *weight, *output, network.constant(bias, np.int32)]

    def _biases(self, copies: int) -> list[npt.NDArray[Any]]:
        """Of each copy; were they alike, ONNX Runtime would merge the copies."""
        return [self.bias + copy for copy in range(copies)]

    @property
    def block_pixels(self) -> float:
        """Non-zero blocks times output pixels of one image."""
        return float(len(stored_blocks(self.codes).values) * self.shape.pixels)

    def _input(self, batch: int) -> tuple[int, ...]:
        return (batch, self.shape.channels, self.shape.size, self.shape.size)


def _in_regions(content: bytes) -> bytes:
    """As our exporter writes a network."""
    import onnx

    whole: bytes = joined(onnx.ModelProto.FromString(content)).SerializeToString()
    return whole


def layer_of(shape: Shape, zeros: float, together: int = 1, seed: int = 0) -> Layer:
    """Random weights, a share of whose blocks is zero: the same for `together` output channels."""
    rng = np.random.default_rng(seed)
    weights = (shape.outputs, shape.channels, shape.kernel, shape.kernel)
    codes = block_sparse_codes(rng, weights, zeros, together)
    return Layer(shape, codes, rng.integers(-99, 99, shape.outputs))


@dataclass(frozen=True)
class Row:
    """One convolution at one sparsity.

    Attributes:
        network: where the shape is from.
        shape: the shape in words.
        batch: images.
        threads: of both runtimes.
        zeros: share of blocks that are zero.
        dense_us: ONNX Runtime's QLinearConv, us.
        sparse_us: our SparseConvolution, us.
        speedup: the former over the latter, median of the turns' ratios.
        share_of_limit: of the products in registers that the processor could do meanwhile; None
            without VNNI.
        deepsparse_us: DeepSparse's convolution of the same weights, us; None where it was not run.
        over_deepsparse: DeepSparse's time over ours, median of the turns' ratios.
        speedups: the turns' ratios that `speedup` is the median of, in order.
    """

    network: str
    shape: str
    batch: int
    threads: int
    zeros: float
    dense_us: float
    sparse_us: float
    speedup: float
    share_of_limit: float | None
    deepsparse_us: float | None = None
    over_deepsparse: float | None = None
    speedups: tuple[float, ...] = ()


def products_a_microsecond() -> float:
    """Pairs of a block and a pixel that one thread multiplies in registers; 0 without VNNI."""
    begin = time.perf_counter()
    products = sparse.products_alone(RATE_ROUNDS)
    return products / (time.perf_counter() - begin) / 1e6


@dataclass(frozen=True)
class Beside:
    """DeepSparse's times of one sparsity, and ours of the same turns, us."""

    deepsparse: list[float]
    ours: list[float]


@dataclass(frozen=True)
class Turns:
    """What one shape's sessions took, turn by turn, us.

    Attributes:
        dense: ONNX Runtime's operator.
        ours: ours, by sparsity.
        rates: products in registers a microsecond, before and after each turn.
        beside: DeepSparse and ours in turns of their own, by sparsity.
        block_pixels: of one image, by sparsity.
    """

    dense: list[float] = field(default_factory=list)
    ours: dict[float, list[float]] = field(default_factory=lambda: {z: [] for z in ZEROS})
    rates: list[float] = field(default_factory=list)
    beside: dict[float, Beside] = field(
        default_factory=lambda: {zeros: Beside([], []) for zeros in DEEPSPARSE_ZEROS}
    )
    block_pixels: dict[float, float] = field(default_factory=dict)

    def rows(self, shape: Shape, batch: int, threads: int) -> list[Row]:
        """A row for each sparsity."""
        return [_row(shape, batch, threads, self, zeros) for zeros in ZEROS]


def take_turns(
    shape: Shape, batch: int, threads: int, taken: Turns, *, turns: int, inferences: int,
    deepsparse: bool, together: int = 1,
) -> None:  # fmt: skip
    """Some more turns of one shape's sessions, added to `taken`.

    Args:
        shape: the convolution.
        batch: images.
        threads: of both runtimes.
        taken: the turns so far.
        turns: in which sessions are run one after the other.
        inferences: of each graph in a turn that count.
        deepsparse: compare with it too.
        together: output channels in a row that have the same blocks.

    Raises:
        MeasurementError: our operator's codes are not ONNX Runtime's.
        RuntimeFailedError: DeepSparse refused a graph.
    """
    layers = {zeros: layer_of(shape, zeros, together) for zeros in ZEROS}
    taken.block_pixels.update({zeros: layer.block_pixels for zeros, layer in layers.items()})
    inputs = (batch, shape.channels, shape.size, shape.size)
    x = np.random.default_rng(1).integers(0, 256, inputs, dtype=np.uint8)
    more = copies_for(shape.work * batch)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    dense = Copies(partial(layers[CHECKED].plain, batch), more, threads, last)
    ours = {
        zeros: Copies(partial(layer.blocked, batch), more, threads, x)
        for zeros, layer in layers.items()
    }
    if not np.array_equal(dense.output, _channels_last(ours[CHECKED].output, shape.outputs)):
        raise MeasurementError(f"{shape}: our codes are not ONNX Runtime's; nothing was timed")
    for _ in range(turns):
        taken.rates.append(products_a_microsecond())
        taken.dense.append(dense.microseconds(inferences))
        for zeros, copies in ours.items():
            taken.ours[zeros].append(copies.microseconds(inferences))
        taken.rates.append(products_a_microsecond())
    if deepsparse:
        floats = (x.astype(np.float32) - ZERO) * np.float32(SCALE)
        _beside_deepsparse(taken, layers, ours, floats, threads, turns, inferences)


def _beside_deepsparse(
    taken: Turns,
    layers: Mapping[float, Layer],
    ours: Mapping[float, Copies],
    floats: npt.NDArray[np.float32],
    threads: int,
    turns: int,
    inferences: int,
) -> None:
    """In turns of their own: a second process takes the caches from whatever runs beside it."""
    with tempfile.TemporaryDirectory(prefix="obc-kernels-") as name, ExitStack() as stack:
        others = _deepsparse_sessions(layers, len(floats), threads, Path(name), stack)
        for _ in range(turns):
            for zeros, other in others.items():
                steps = other.profile({"x": floats}, iterations=PROFILED)
                convolving = [step.ms for step in steps if step.native and _convolves(step.kind)]
                if convolving:
                    taken.beside[zeros].deepsparse.append(1e3 * max(convolving))
                    taken.beside[zeros].ours.append(ours[zeros].microseconds(inferences))


def _channels_last(blocked: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8]:
    """Blocked codes without a border, (images, blocks, height, width, 4), as ONNX Runtime's are."""
    images, _, height, width, _ = blocked.shape
    codes = blocked.transpose(0, 2, 3, 1, 4).reshape(images, height, width, -1)
    return codes[..., :channels]


def _deepsparse_sessions(
    layers: Mapping[float, Layer], batch: int, threads: int, folder: Path, stack: ExitStack
) -> dict[float, Session]:
    from obc_deploy.runtimes.session import open_session

    found = {}
    for zeros in DEEPSPARSE_ZEROS:
        file = folder / f"{zeros}.onnx"
        file.write_bytes(layers[zeros].between_floats(batch))
        found[zeros] = stack.enter_context(
            open_session("deepsparse", file, threads=threads, batch_size=batch)
        )
    return found


def _convolves(kind: str) -> bool:
    """Whether a step of DeepSparse's profile is the convolution and not a change of layout."""
    return "convolution" in kind or "pyramid" in kind or "gemm" in kind


def _row(shape: Shape, batch: int, threads: int, taken: Turns, zeros: float) -> Row:
    dense, ours, rates = taken.dense, taken.ours[zeros], taken.rates
    # A turn's rate is the mean of those before and behind it.
    around = [(rates[2 * turn] + rates[2 * turn + 1]) / 2 for turn in range(len(ours))]
    work = taken.block_pixels[zeros] * batch
    shares = [
        work / us / (rate * threads) for us, rate in zip(ours, around, strict=True) if rate > 0.0
    ]
    beside = taken.beside.get(zeros, Beside([], []))
    over = [d / s for d, s in zip(beside.deepsparse, beside.ours, strict=True)]
    speedups = tuple(round(d / s, 3) for d, s in zip(dense, ours, strict=True))
    return Row(
        network=shape.network, shape=str(shape), batch=batch, threads=threads, zeros=zeros,
        dense_us=median(dense), sparse_us=median(ours),
        speedup=median(speedups),
        share_of_limit=median(shares) if shares else None,
        deepsparse_us=median(beside.deepsparse) if over else None,
        over_deepsparse=median(over) if over else None,
        speedups=speedups,
    )  # fmt: skip


def geometric_mean(values: Iterable[float]) -> float:
    """Exp of the mean logarithm."""
    found = list(values)
    return math.exp(math.fsum(map(math.log, found)) / len(found))


def summary(rows: Sequence[Row]) -> str:
    """Geometric means over shapes, a line for each batch, number of threads and sparsity.

    "by turn" are the lowest and the highest mean that a single turn over all shapes gives.
    """
    lines = [
        "| batch | threads | zero blocks | over ONNX Runtime int8 | by turn | slowest | fastest | "
        "over DeepSparse | share of the VNNI limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row.batch, row.threads, row.zeros) for row in rows):
        mine = [row for row in rows if (row.batch, row.threads, row.zeros) == key]
        speedups = [row.speedup for row in mine]
        shares = [row.share_of_limit for row in mine if row.share_of_limit is not None]
        over = [row.over_deepsparse for row in mine if row.over_deepsparse is not None]
        turns = [geometric_mean(turn) for turn in zip(*(row.speedups for row in mine), strict=True)]
        lines.append(
            f"| {key[0]} | {key[1]} | {100 * key[2]:.0f} % | {geometric_mean(speedups):.2f}x | "
            f"{f'{min(turns):.2f}x to {max(turns):.2f}x' if turns else '-'} | "
            f"{min(speedups):.2f}x | {max(speedups):.2f}x | "
            f"{f'{geometric_mean(over):.2f}x' if over else '-'} | "
            f"{f'{100 * geometric_mean(shares):.0f} %' if shares else '-'} |"
        )
    return "\n".join(lines)


def details(rows: Sequence[Row]) -> str:
    """Each shape's speedups over ONNX Runtime by sparsity, and its shares of the limit."""
    columns = list(dict.fromkeys(row.zeros for row in rows))
    lines = [
        "| network | shape | batch | threads | dense, us | "
        + " | ".join(f"{100 * zeros:.0f} %" for zeros in columns)
        + " | limit at 80 and 90 % |",
        "|---|---|---|---|---|" + "---|" * (len(columns) + 1),
    ]
    for key in dict.fromkeys((row.network, row.shape, row.batch, row.threads) for row in rows):
        mine = [row for row in rows if (row.network, row.shape, row.batch, row.threads) == key]
        shares = [
            f"{100 * row.share_of_limit:.0f} %"
            for row in mine
            if row.zeros in (0.8, 0.9) and row.share_of_limit is not None
        ]
        cells = [*map(str, key), f"{mine[0].dense_us:.0f}"]
        cells += [f"{row.speedup:.2f}x" for row in mine] + [", ".join(shares) or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure all shapes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network", action="append", help="torchvision name; default resnet50, vgg16, mobilenet_v2"
    )
    parser.add_argument("--batch", type=int, action="append", help="default 1 and 8")
    parser.add_argument("--threads", type=int, action="append", help="default 1 and 2")
    parser.add_argument("--passes", type=int, default=3, help="over all shapes")
    parser.add_argument("--turns", type=int, default=2, help="of a shape in each pass")
    parser.add_argument("--inferences", type=int, default=6, help="of each session in a turn")
    parser.add_argument(
        "--deepsparse", action="store_true", help="compare with it, in batches of 1"
    )
    parser.add_argument(
        "--together", type=int, default=1, help="output channels that have the same blocks"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("passes", "turns", "together"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give 1 or more")
    if not sparse.is_available():
        print(f"error: the sparse kernels are missing: {sparse.why_missing()}", file=sys.stderr)
        return 2
    record = take_record("sparse_kernels")
    names = options.network or ["resnet50", "vgg16", "mobilenet_v2"]
    shapes = [shape for name in names for shape in shapes_of(name)]
    cases = [
        (shape, batch, threads)
        for threads in options.threads or (1, 2)
        for batch in options.batch or (1, 8)
        for shape in shapes
    ]
    taken = {case: Turns() for case in cases}
    steps = [case for _ in range(options.passes) for case in cases]
    begin = time.monotonic()
    try:
        for step, (shape, batch, threads) in enumerate(steps, 1):
            take_turns(
                shape, batch, threads, taken[shape, batch, threads], turns=options.turns,
                inferences=options.inferences,
                deepsparse=options.deepsparse and batch == 1 and threads == 1,
                together=options.together,
            )  # fmt: skip
            left = (time.monotonic() - begin) / step * (len(steps) - step)
            print(
                f"{step}/{len(steps)} {shape.network} {shape} batch {batch}, "
                f"{threads} threads; {left / 60:.1f} min left",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    except ObcDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = [row for case, turns in taken.items() for row in turns.rows(*case)]
    alike = ""
    if options.together > 1:
        alike = f"; every {options.together} output channels have the same blocks"
    text = (
        f"# Sparse convolutions\n\n{record.head}, {sparse.instruction_set()}; int8, "
        f"{options.passes * options.turns} turns, in {options.passes} passes over all shapes, of "
        f"{options.inferences} counted inferences of each operator; "
        f"{len(shapes)} shapes at 224 pixels{alike}.\n\nGeometric means over the shapes:\n\n"
        f"{summary(rows)}\n\nEach shape, speedup over ONNX Runtime's dense int8 by share of zero "
        f"blocks:\n\n{details(rows)}\n"
    )
    results = {"instruction_set": sparse.instruction_set(), "rows": [asdict(row) for row in rows]}
    suffix = f"-together-{options.together}" if options.together > 1 else ""
    record.write(options.output, f"sparse-kernels{suffix}", results, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
