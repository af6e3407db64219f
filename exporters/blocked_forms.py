"""Which operators of an integer graph have a form on blocked tensors, and what that form is.

    QLinearConv                                  SparseConvolution, or DepthwiseConvolution
    QLinearAdd; DQ, DQ -> Add -> [Relu|Clip] -> Q    Add
    QLinearConcat along channels                 Concat
    MaxPool of codes                             MaxPool
    QLinearAveragePool                           AveragePool
    QLinearGlobalAveragePool                     GlobalAveragePool
    Slice every second row and column -> [Pad channels]   a 1x1 SparseConvolution of ones
    QuantizeLinear                               QuantizeToBlocks
    DequantizeLinear                             DequantizeFromBlocks

A Clip of codes behind any of them becomes `lower` and `upper`. What fits none of these, or breaks a
condition of `runtimes/sparse/OPERATORS.md`, keeps its plain form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from obc_deploy.exporters.edit import (
    constant,
    constant_ints,
    integer,
    only_user,
    producer,
)
from obc_deploy.exporters.frames import gains_by_margin
from obc_deploy.exporters.qoperator import MICROSOFT
from obc_deploy.exporters.sparse_blocks import BLOCK, StoredBlocks, stored_blocks
from obc_deploy.exporters.sparse_cost import Work, nanoseconds

MOST_BORDER = 3
MOST_POSITIONS = 8192
"""Kernel height times width that the sparse kernels take."""
_INT32 = 2**31 - 1
_INTERLEAVED_POOLS = frozenset({"MaxPool", "QLinearAveragePool", "QLinearGlobalAveragePool"})

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of uint8 codes."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Plane:
    """Sizes of an image-like value; an open batch counts as one image."""

    images: int
    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.images * self.height * self.width

    def work(self, positions: int = 1) -> Work:
        """Of an operator that goes over it once."""
        return Work.of_plane(self.channels, self.images * self.height, self.width, positions)


@dataclass(frozen=True)
class BlockedForm:
    """What a node, and those that are part of it, are on blocked tensors.

    Attributes:
        node: computes the output.
        covered: the nodes that the form stands for, `node` among them.
        operator: of our domain.
        data: image-like values it reads, blocked unless `operator` is QuantizeToBlocks.
        zero_points: of those.
        plane: of the output, blocked unless `operator` is DequantizeFromBlocks.
        zero_point: of the output.
        attributes: all but borders and margins.
        padding: border that its first input must have.
        constants: constant inputs after the data by name; None for an optional one.
        plain_ns: cost of the plain form.
        blocked_ns: cost of this one.
        stored: blocks of sparse weights.
        plain_after_blocks_ns: how much longer the plain form takes where its input was blocked.
    """

    node: ir.Node
    covered: tuple[ir.Node, ...]
    operator: str
    data: tuple[ir.Value, ...]
    zero_points: tuple[int, ...]
    plane: Plane
    zero_point: int
    attributes: Mapping[str, Any]
    plain_ns: float
    blocked_ns: float
    padding: int = 0
    constants: Mapping[str, Array | None] = field(default_factory=dict)
    stored: StoredBlocks | None = None
    plain_after_blocks_ns: float = 0.0

    @property
    def output(self) -> ir.Value:
        """The value it computes."""
        return self.node.outputs[0]

    @property
    def reads_blocks(self) -> bool:
        """Its data are blocked."""
        return self.operator != "QuantizeToBlocks"

    @property
    def makes_blocks(self) -> bool:
        """Its output is blocked."""
        return self.operator != "DequantizeFromBlocks"

    @property
    def gains_by_margin(self) -> bool:
        """It is faster where its input's planes begin with cache lines."""
        if self.stored is None:
            return False
        what = self.attributes
        return gains_by_margin(
            what["kernel_shape"], what["strides"], len(self.stored.values), what["channels"]
        )


def plane_of(value: ir.Value | None) -> Plane | None:
    """The sizes of a 4-d value, or None where they are not known."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    sizes = list(value.shape)
    if not all(isinstance(size, int) and size > 0 for size in sizes[1:]):
        return None
    images = sizes[0] if isinstance(sizes[0], int) and sizes[0] > 0 else 1
    channels, height, width = (size for size in sizes[1:] if isinstance(size, int))
    return Plane(images, channels, height, width)


def grid_of(scale: ir.Value | None, zero_point: ir.Value | None) -> Grid | None:
    """A grid of uint8 codes from its two constants."""
    step, zero = constant(scale), constant(zero_point)
    if step is None or zero is None or step.size != 1 or zero.size != 1:
        return None
    if zero.dtype != np.uint8 or not np.isfinite(step).all() or float(step.reshape(())) <= 0:
        return None
    return Grid(float(step.reshape(())), int(zero.reshape(())))


def _inputs(grid: Grid) -> dict[str, Any]:
    return {"input_scale": grid.scale, "input_zero_point": grid.zero_point}


def _outputs(grid: Grid, lower: int = 0, upper: int = 255) -> dict[str, Any]:
    limits = {} if (lower, upper) == (0, 255) else {"lower": lower, "upper": upper}
    return {"output_scale": grid.scale, "output_zero_point": grid.zero_point, **limits}


def code_grid(value: ir.Value | None) -> Grid | None:
    """The grid of a value of codes, as the operator that makes it says."""
    for _ in range(32):
        node = None if value is None else value.producer()
        if node is None:
            return None
        place = {
            "QLinearConv": 6, "QuantizeLinear": 1, "QLinearAdd": 6, "QLinearConcat": 0,
            "QLinearAveragePool": 3, "QLinearGlobalAveragePool": 3,
        }.get(node.op_type)  # fmt: skip
        if place is not None:
            more = len(node.inputs) > place + 1
            return grid_of(node.inputs[place], node.inputs[place + 1]) if more else None
        if node.op_type not in {"MaxPool", "Slice", "Pad", "Clip", "Identity"}:
            return None
        value = node.inputs[0]
    return None


def _windows(node: ir.Node, plane: Plane, kernel: tuple[int, int]) -> dict[str, list[int]] | None:
    """Kernel, strides and pads, a ceil_mode in the pads; None where they have no blocked form."""

    def ints(name: str, default: list[int]) -> list[int]:
        attribute = node.attributes.get(name)
        return default if attribute is None else [int(item) for item in attribute.as_ints()]

    automatic = node.attributes.get("auto_pad")
    automatic_name = "NOTSET" if automatic is None else automatic.as_string()
    dilations = ints("dilations", [1, 1])
    if any(d != 1 and k != 1 for d, k in zip(dilations, kernel, strict=False)):
        return None
    strides, pads = ints("strides", [1, 1]), ints("pads", [0, 0, 0, 0])
    if automatic_name == "VALID":
        pads = [0, 0, 0, 0]
    elif automatic_name != "NOTSET":
        pads = _same_pads(plane, kernel, strides, lower=automatic_name == "SAME_LOWER")
    if integer(node, "ceil_mode", 0):
        sizes = (plane.height, plane.width)
        for axis in (0, 1):
            before, after = pads[axis], pads[axis + 2]
            steps = ceil((sizes[axis] + before + after - kernel[axis]) / strides[axis])
            # The last window begins inside the image or the padding before it.
            if steps * strides[axis] >= sizes[axis] + before:
                steps -= 1
            needed = steps * strides[axis] + kernel[axis] - sizes[axis] - before
            pads[axis + 2] = max(after, needed)
    return {"kernel_shape": list(kernel), "strides": strides, "pads": pads}


def _same_pads(
    plane: Plane, kernel: tuple[int, int], strides: list[int], *, lower: bool
) -> list[int]:
    first, second = [], []
    for size, width, stride in zip((plane.height, plane.width), kernel, strides, strict=True):
        total = max((ceil(size / stride) - 1) * stride + width - size, 0)
        small, large = total // 2, total - total // 2
        first.append(large if lower else small)
        second.append(small if lower else large)
    return [*first, *second]


def _kernel_shape(node: ir.Node) -> tuple[int, int] | None:
    attribute = node.attributes.get("kernel_shape")
    sizes = [] if attribute is None else [int(item) for item in attribute.as_ints()]
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def _weights(node: ir.Node) -> tuple[Array, Array, Array | None] | None:
    """(codes, scale [O] or [1], bias) of a QLinearConv with symmetric int8 weights."""
    codes, scale, zero = (constant(node.inputs[place]) for place in (3, 4, 5))
    if codes is None or scale is None or zero is None or codes.dtype != np.int8 or zero.any():
        return None
    if scale.size not in (1, codes.shape[0]) or not (np.isfinite(scale) & (scale > 0)).all():
        return None
    given = node.inputs[8] if len(node.inputs) > 8 else None
    bias = constant(given)
    if given is not None and (bias is None or bias.dtype != np.int32):
        return None
    return codes, scale.reshape(-1).astype(np.float32), bias


def sums_fit(codes: Array, bias: Array | None, zero_point: int) -> bool:
    """Whether no sum of any input can leave an int32."""
    rows = codes.reshape(codes.shape[0], -1).astype(np.int64)
    offset = np.zeros(len(rows), np.int64) if bias is None else bias.astype(np.int64)
    most = 255 * np.abs(rows).sum(1) + np.abs(offset - zero_point * rows.sum(1))
    return bool((most <= _INT32).all())


def _convolution(node: ir.Node) -> BlockedForm | None:
    source, plane, result = node.inputs[0], plane_of(node.inputs[0]), plane_of(node.outputs[0])
    grid, output = grid_of(*node.inputs[1:3]), grid_of(*node.inputs[6:8])
    weights = _weights(node)
    if source is None or plane is None or result is None or grid is None or output is None:
        return None
    if weights is None or weights[0].ndim != 4 or constant(source) is not None:
        return None
    codes, scale, bias = weights
    height, width = codes.shape[2:]
    windows = _windows(node, plane, (height, width))
    if windows is None or not sums_fit(codes, bias, grid.zero_point):
        return None
    pads, strides, positions = windows["pads"], windows["strides"], height * width
    made = code_grid(source)
    if max(pads) > MOST_BORDER or positions > MOST_POSITIONS or max(height, width) > 1024:
        return None
    if max(pads) and made is not None and made.zero_point != grid.zero_point:
        return None  # the border holds what made the codes
    groups = integer(node, "group", 1)
    shared = {"channels": plane.channels, **_inputs(grid), **_outputs(output)}
    if groups == 1 and strides[0] == strides[1] and strides[0] in (1, 2):
        stored = stored_blocks(codes)
        work = Work.of_convolution(
            pixels=result.pixels, in_pixels=plane.pixels, channels=plane.channels,
            outputs=result.channels, positions=positions, blocks=len(stored.values),
        )  # fmt: skip
        return BlockedForm(
            node, (node,), "SparseConvolution", (source,), (grid.zero_point,), result,
            output.zero_point, {**shared, **windows}, nanoseconds("QLinearConv", work),
            nanoseconds("SparseConvolution", work), max(pads),
            {
                "blocks": stored.values, "mask": stored.mask, "scale": scale, "bias": bias,
            },
            stored,
        )  # fmt: skip
    if groups == plane.channels == codes.shape[0] and max(strides) <= 2:
        del windows["kernel_shape"]
        work = result.work(positions)
        return BlockedForm(
            node, (node,), "DepthwiseConvolution", (source,), (grid.zero_point,), result,
            output.zero_point, {**shared, **windows}, nanoseconds("QLinearConv depthwise", work),
            nanoseconds("DepthwiseConvolution", work), max(pads),
            {"codes": codes, "scale": scale, "bias": bias},
        )  # fmt: skip
    return None


def _sum(
    node: ir.Node, covered: tuple[ir.Node, ...], operands: list[tuple[ir.Value, Grid]],
    output: Grid, limits: tuple[int, int], plain_ns: float,
) -> BlockedForm | None:  # fmt: skip
    result = plane_of(node.outputs[0])
    planes = [plane_of(value) for value, _ in operands]
    if result is None or planes != [result, result]:
        return None
    if any(constant(value) is not None for value, _ in operands):
        return None
    grids = [grid for _, grid in operands]
    return BlockedForm(
        node, covered, "Add", tuple(value for value, _ in operands),
        tuple(grid.zero_point for grid in grids), result, output.zero_point,
        {
            "channels": result.channels, "input_scales": [grid.scale for grid in grids],
            "input_zero_points": [grid.zero_point for grid in grids], **_outputs(output, *limits),
        },
        plain_ns, nanoseconds("Add", result.work()),
    )  # fmt: skip


def _integer_sum(node: ir.Node) -> BlockedForm | None:
    inputs = node.inputs
    if len(inputs) < 8 or inputs[0] is None or inputs[3] is None:
        return None
    left, right = grid_of(*inputs[1:3]), grid_of(*inputs[4:6])
    output, result = grid_of(*inputs[6:8]), plane_of(node.outputs[0])
    if left is None or right is None or output is None or result is None:
        return None
    cost = nanoseconds("QLinearAdd", result.work())
    pair = [(inputs[0], left), (inputs[3], right)]
    return _sum(node, (node,), pair, output, (0, 255), cost)


def _limits(node: ir.Node, output: Grid) -> tuple[int, int] | None:
    """The codes that a rectifier's bounds quantize to: rounding keeps order, so these bound all."""
    if node.op_type == "Relu":
        return output.zero_point, 255
    codes = [0, 255]
    for place in (1, 2):
        given = node.inputs[place] if len(node.inputs) > place else None
        if given is None:
            continue
        bound = constant(given)
        if bound is None:
            return None
        code = np.rint(np.float32(bound.reshape(())) / np.float32(output.scale))
        codes[place - 1] = int(np.clip(code + output.zero_point, 0, 255))
    return (codes[0], codes[1]) if codes[0] <= codes[1] else None


def _float_sum(quantize: ir.Node, output: Grid) -> BlockedForm | None:
    """DQ, DQ -> Add -> [Relu | Clip] -> Q, which rounds as our Add does."""
    source = quantize.inputs[0]
    node = None if source is None else source.producer()
    covered: tuple[ir.Node, ...] = (quantize,)
    limits: tuple[int, int] | None = (0, 255)
    if node is not None and node.op_type in {"Relu", "Clip"} and not node.domain:
        if only_user(node.outputs[0]) is not quantize:
            return None
        covered, limits = (node, *covered), _limits(node, output)
        source = node.inputs[0]
        node = None if source is None else source.producer()
    if node is None or node.op_type != "Add" or node.domain or limits is None:
        return None
    if only_user(node.outputs[0]) is not covered[0]:
        return None
    covered = (node, *covered)
    operands = []
    for value in node.inputs:
        dequantize = producer(value, "DequantizeLinear")
        if value is None or dequantize is None or len(dequantize.inputs) < 3:
            return None
        codes, grid = dequantize.inputs[0], grid_of(*dequantize.inputs[1:3])
        if codes is None or grid is None:
            return None
        operands.append((codes, grid))
        if only_user(value) is node:
            covered = (dequantize, *covered)
    result = plane_of(quantize.outputs[0])
    if result is None:
        return None
    cost = len(covered) * nanoseconds("DequantizeLinear", result.work())
    return _sum(quantize, covered, operands, output, limits, cost)


def _concatenation(node: ir.Node) -> BlockedForm | None:
    result, output = plane_of(node.outputs[0]), grid_of(*node.inputs[:2])
    axis = integer(node, "axis", 1)
    if result is None or output is None or axis not in (1, -3):
        return None
    values, grids, planes = [], [], []
    for place in range(2, len(node.inputs), 3):
        value, plane = node.inputs[place], plane_of(node.inputs[place])
        grid = grid_of(*node.inputs[place + 1 : place + 3])
        if value is None or plane is None or grid is None or constant(value) is not None:
            return None
        values.append(value)
        grids.append(grid)
        planes.append(plane)
    return BlockedForm(
        node, (node,), "Concat", tuple(values), tuple(grid.zero_point for grid in grids), result,
        output.zero_point,
        {
            "channels": [plane.channels for plane in planes],
            "input_scales": [grid.scale for grid in grids],
            "input_zero_points": [grid.zero_point for grid in grids], **_outputs(output),
        },
        nanoseconds("QLinearConcat", result.work()), nanoseconds("Concat", result.work()),
    )  # fmt: skip


def _is_channels_last(value: ir.Value | None, depth: int = 4) -> bool:
    """Whether ONNX Runtime, in plain form, has the value channels last: behind convolutions."""
    node = None if value is None else value.producer()
    if node is None or depth == 0:
        return False
    if node.op_type == "QLinearConcat":
        sources = [node.inputs[place] for place in range(2, len(node.inputs), 3)]
        return all(_is_channels_last(each, depth - 1) for each in sources)
    if node.op_type == "QLinearAdd":
        return all(_is_channels_last(node.inputs[place], depth - 1) for place in (0, 3))
    if node.op_type == "MaxPool":
        return _is_channels_last(node.inputs[0], depth - 1)
    return node.op_type == "QLinearConv"


def _pool(node: ir.Node) -> BlockedForm | None:
    source, plane, result = node.inputs[0], plane_of(node.inputs[0]), plane_of(node.outputs[0])
    if source is None or plane is None or result is None or len(node.outputs) != 1:
        return None
    if node.op_type == "MaxPool":
        grid = output = code_grid(source)
    else:
        grid, output = grid_of(*node.inputs[1:3]), grid_of(*node.inputs[3:5])
        if integer(node, "channels_last", 0) or integer(node, "ceil_mode", 0):
            return None
    if grid is None or output is None or source.dtype != ir.DataType.UINT8:
        return None
    shared: dict[str, Any] = {"channels": plane.channels}
    if node.op_type == "QLinearGlobalAveragePool":
        work = plane.work()
        return BlockedForm(
            node, (node,), "GlobalAveragePool", (source,), (grid.zero_point,), result,
            output.zero_point, {**shared, **_inputs(grid), **_outputs(output)},
            nanoseconds("QLinearGlobalAveragePool", work), nanoseconds("GlobalAveragePool", work),
        )  # fmt: skip
    kernel = _kernel_shape(node)
    windows = None if kernel is None else _windows(node, plane, kernel)
    if kernel is None or windows is None or max(kernel) > 1024:
        return None
    if any(pad >= size for pad, size in zip(windows["pads"], (*kernel, *kernel), strict=True)):
        return None
    work = result.work(prod(kernel))
    if node.op_type == "MaxPool":
        if integer(node, "storage_order", 0):
            return None
        fast, slow = nanoseconds("NhwcMaxPool", work), nanoseconds("NchwMaxPool", work)
        behind_convolution = _is_channels_last(source)
        return BlockedForm(
            node, (node,), "MaxPool", (source,), (grid.zero_point,), result, grid.zero_point,
            {**shared, **windows, "zero_point": grid.zero_point},
            fast if behind_convolution else slow, nanoseconds("MaxPool", work),
            plain_after_blocks_ns=slow - fast if behind_convolution else 0.0,
        )  # fmt: skip
    counted = integer(node, "count_include_pad", 0)
    return BlockedForm(
        node, (node,), "AveragePool", (source,), (grid.zero_point,), result, output.zero_point,
        {
            **shared, **windows, "count_include_pad": counted, **_inputs(grid), **_outputs(output),
        },
        nanoseconds("QLinearAveragePool", work), nanoseconds("AveragePool", work),
    )  # fmt: skip


def _slices(node: ir.Node) -> tuple[ir.Value, list[ir.Node], list[int]] | None:
    """The value behind Slices that each keep every n-th from the first on, and n by axis."""
    steps = [1, 1, 1, 1]
    found: list[ir.Node] = []
    current: ir.Node | None = node
    while current is not None and current.op_type == "Slice" and not current.domain:
        source = current.inputs[0]
        plane = None if source is None else source.shape
        starts, ends = (constant_ints(value) for value in current.inputs[1:3])
        axes = constant_ints(current.inputs[3]) if len(current.inputs) > 3 else None
        taken = constant_ints(current.inputs[4]) if len(current.inputs) > 4 else None
        if source is None or plane is None or starts is None or ends is None:
            return None
        axes = list(range(len(starts))) if axes is None else axes
        for place, axis in enumerate(axes):
            size, axis = plane[axis], axis % len(plane)
            step = 1 if taken is None else taken[place]
            whole = starts[place] == 0 and (
                ends[place] >= 2**31 - 1 or (isinstance(size, int) and ends[place] >= size)
            )
            if not whole or step < 1:
                return None
            steps[axis] *= step
        found.append(current)
        before = source.producer()
        if before is None or before.op_type != "Slice" or only_user(source) is not current:
            return source, found, steps
        current = before
    return None


def _shortcut(node: ir.Node) -> BlockedForm | None:
    """Every second pixel, with channels of zeros before and behind: a convolution of ones."""
    covered, before, behind, last = [node], 0, 0, node
    if node.op_type == "Pad":
        pads = constant_ints(node.inputs[1])
        fill = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        axes = constant_ints(node.inputs[3]) if len(node.inputs) > 3 else None
        inner = producer(node.inputs[0], "Slice")
        if pads is None or len(pads) != 8 or fill is None or axes not in (None, [0, 1, 2, 3]):
            return None
        if inner is None or only_user(inner.outputs[0]) is not node:
            return None
        before, behind = pads[1], pads[5]
        if min(pads) < 0 or sum(pads) != before + behind:
            return None
        last = inner
    sliced = _slices(last)
    result = plane_of(node.outputs[0])
    if sliced is None or result is None:
        return None
    source, slices, steps = sliced
    plane, grid = plane_of(source), code_grid(source)
    if plane is None or grid is None or steps[:2] != [1, 1] or steps[2:] not in ([1, 1], [2, 2]):
        return None
    if node.op_type == "Pad" and int(np.asarray(fill).reshape(())) != grid.zero_point:
        return None
    codes = np.zeros((result.channels, plane.channels, 1, 1), np.int8)
    codes[before : before + plane.channels, :, 0, 0] = np.eye(plane.channels, dtype=np.int8)
    stored = stored_blocks(codes)
    work = Work.of_convolution(
        pixels=result.pixels, in_pixels=plane.pixels, channels=plane.channels,
        outputs=result.channels, positions=1, blocks=len(stored.values),
    )  # fmt: skip
    covered += [each for each in slices if each is not node]
    return BlockedForm(
        node, tuple(covered), "SparseConvolution", (source,), (grid.zero_point,), result,
        grid.zero_point,
        {
            "channels": plane.channels, "kernel_shape": [1, 1], "strides": steps[2:],
            "pads": [0, 0, 0, 0], **_inputs(grid), **_outputs(grid),
        },
        len(covered) * nanoseconds("Transpose", result.work()),
        nanoseconds("SparseConvolution", work), 0,
        {
            "blocks": stored.values, "mask": stored.mask, "scale": np.ones(1, np.float32),
            "bias": None,
        },
    )  # fmt: skip


def _edge(node: ir.Node) -> BlockedForm | None:
    """A QuantizeLinear or DequantizeLinear of an image."""
    source, result = node.inputs[0], plane_of(node.outputs[0])
    if source is None or result is None or len(node.inputs) < 3 or constant(source) is not None:
        return None
    grid = grid_of(*node.inputs[1:3])
    if grid is None or (source.dtype or ir.DataType.FLOAT) not in (
        ir.DataType.FLOAT,
        ir.DataType.UINT8,
    ):
        return None
    work = result.work()
    if node.op_type == "QuantizeLinear":
        return BlockedForm(
            node, (node,), "QuantizeToBlocks", (source,), (0,), result, grid.zero_point,
            _outputs(grid), nanoseconds("QuantizeLinear", work),
            nanoseconds("QuantizeToBlocks", work),
        )  # fmt: skip
    return BlockedForm(
        node, (node,), "DequantizeFromBlocks", (source,), (grid.zero_point,), result, 0,
        {"channels": result.channels, **_inputs(grid)}, nanoseconds("DequantizeLinear", work),
        nanoseconds("DequantizeFromBlocks", work),
    )  # fmt: skip


def _clamped(node: ir.Node) -> BlockedForm | None:
    """A Clip of codes, with the operator before it."""
    source = node.inputs[0]
    inner = None if source is None else source.producer()
    if inner is None or source is None or only_user(source) is not node:
        return None
    form = blocked_form(inner)
    bounds = [constant(value) for value in node.inputs[1:3]]
    if form is None or source.dtype != ir.DataType.UINT8 or len(bounds) != 2:
        return None
    if any(bound is None for bound in bounds) or "output_scale" not in form.attributes:
        return None
    least, most = (int(np.asarray(bound).reshape(())) for bound in bounds)
    lower = max(form.attributes.get("lower", 0), least)
    upper = min(form.attributes.get("upper", 255), most)
    if lower > upper:
        return None
    attributes = {**form.attributes, "lower": lower, "upper": upper}
    return replace(form, node=node, covered=(*form.covered, node), attributes=attributes)


def blocked_form(node: ir.Node) -> BlockedForm | None:
    """What the node is on blocked tensors, or None where it has no such form."""
    if node.domain == MICROSOFT:
        if node.op_type == "QLinearAdd":
            return _integer_sum(node)
        if node.op_type == "QLinearConcat":
            return _concatenation(node)
        return _pool(node) if node.op_type in _INTERLEAVED_POOLS else None
    if node.domain:
        return None
    if node.op_type == "QLinearConv":
        return _convolution(node)
    if node.op_type == "MaxPool":
        return _pool(node)
    if node.op_type in {"Pad", "Slice"}:
        return _shortcut(node)
    if node.op_type == "Clip":
        return _clamped(node)
    if node.op_type == "QuantizeLinear":
        grid = grid_of(*node.inputs[1:3]) if len(node.inputs) > 2 else None
        return None if grid is None else _float_sum(node, grid) or _edge(node)
    return _edge(node) if node.op_type == "DequantizeLinear" else None


def blocked_forms(model: ir.Model) -> list[BlockedForm]:
    """The forms of all nodes that have one, in the graph's order; no node is in two."""
    taken: set[int] = set()
    found = []
    for node in reversed(list(model.graph)):
        if id(node) in taken:
            continue
        form = blocked_form(node)
        if form is None or any(id(part) in taken for part in form.covered):
            continue
        taken.update(id(part) for part in form.covered)
        found.append(form)
    return found[::-1]


__all__ = ["BLOCK", "BlockedForm", "Grid", "Plane", "blocked_form", "blocked_forms", "plane_of"]
