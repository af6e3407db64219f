"""Layers as matrix problems: Linear and convolutions (1d, 2d, transposed, grouped, dilated).

A layer's weight becomes a matrix (rows, cols), its inputs become vectors of `cols` entries:

    row r  = one output channel
    cols   = (kernel position, input channel within the group), input channels running fastest

so that `m` consecutive columns are `m` consecutive input channels at one kernel position: the unit
of block4 and N:M patterns.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, fx
from torch.nn import functional

from obc_deploy.capture import Network, Watcher, get_tensor, parameter_name
from obc_deploy.errors import LayerError

aten = torch.ops.aten

UNFOLD_BYTES = 64 * 2**20
"""Most memory that the unfolded inputs of a layer take at a time."""


class LayerKind(Enum):
    """What a layer computes."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV_TRANSPOSE2D = "conv_transpose2d"


_OPERATORS: dict[object, LayerKind] = {
    aten.linear.default: LayerKind.LINEAR,
    aten.conv1d.default: LayerKind.CONV1D,
    aten.conv1d.padding: LayerKind.CONV1D,
    aten.conv2d.default: LayerKind.CONV2D,
    aten.conv2d.padding: LayerKind.CONV2D,
    aten.conv_transpose2d.input: LayerKind.CONV_TRANSPOSE2D,
}

_ELEMENTWISE = frozenset(
    {
        aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.expand.default,
        aten.cat.default, aten.slice.Tensor,
    }
)  # fmt: skip
"""Operators that take a parameter as a value of its own (a position embedding, a mask)."""


@dataclass(frozen=True)
class Layer:
    """One compressible layer of a captured network.

    Attributes:
        name: dotted name of the module, or of the parameter where there is no module.
        weight_name: dotted name of the weight parameter.
        bias_name: dotted name of the bias, or None.
        kind: what it computes.
        call_sites: names of the graph nodes that use the weight (more than one where it is shared).
        weight_shape: the parameter's own shape.
        rows: output channels.
        cols: inputs of one output value.
        channels: input channels that share a kernel position (within a group).
        groups: convolution groups; rows are split evenly and in order among them.
        macs: multiply-accumulates for one sample, all call sites together.
    """

    name: str
    weight_name: str
    bias_name: str | None
    kind: LayerKind
    call_sites: tuple[str, ...]
    weight_shape: tuple[int, ...]
    rows: int
    cols: int
    channels: int
    groups: int
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    macs: int = 0

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.cols


@dataclass(frozen=True)
class UnsupportedLayer:
    """A node with weights that nothing is done to, and why."""

    name: str
    operator: str
    reason: str


def _pair(value: object, dims: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, Sequence) else (int(value),)  # type: ignore[call-overload]
    return values * dims if len(values) == 1 else values


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _padding(
    value: object, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        return tuple((0, 0) for _ in kernel)
    if value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _pair(value, len(kernel)))


def _module_name(weight_name: str) -> str:
    prefix, _, leaf = weight_name.rpartition(".")
    return prefix if prefix and leaf == "weight" else weight_name


def _read_layer(node: fx.Node, kind: LayerKind, weight: Tensor, weight_name: str) -> Layer:
    bias_name = parameter_name(_argument(node, 2, "bias", None))
    shape = tuple(weight.shape)
    name = _module_name(weight_name)
    if kind is LayerKind.LINEAR:
        rows, cols = shape
        return Layer(
            name, weight_name, bias_name, kind, (node.name,), shape, rows, cols, cols, groups=1
        )
    dims = 1 if kind is LayerKind.CONV1D else 2
    kernel = shape[2:]
    area = math.prod(kernel)
    stride = _pair(_argument(node, 3, "stride", 1), dims)
    if kind is LayerKind.CONV_TRANSPOSE2D:
        groups = int(_argument(node, 6, "groups", 1))  # type: ignore[call-overload]
        dilation = _pair(_argument(node, 7, "dilation", 1), dims)
        channels = shape[0] // groups
        return Layer(
            name, weight_name, bias_name, kind, (node.name,), shape,
            rows=shape[1] * groups, cols=area * channels, channels=channels, groups=groups,
            stride=stride, padding=_padding(_argument(node, 4, "padding", 0), kernel, dilation),
            dilation=dilation, output_padding=_pair(_argument(node, 5, "output_padding", 0), dims),
        )  # fmt: skip
    dilation = _pair(_argument(node, 5, "dilation", 1), dims)
    groups = int(_argument(node, 6, "groups", 1))  # type: ignore[call-overload]
    return Layer(
        name, weight_name, bias_name, kind, (node.name,), shape,
        rows=shape[0], cols=area * shape[1], channels=shape[1], groups=groups,
        stride=stride, padding=_padding(_argument(node, 4, "padding", 0), kernel, dilation),
        dilation=dilation,
    )  # fmt: skip


def find_layers(network: Network) -> tuple[list[Layer], list[UnsupportedLayer]]:
    """The compressible layers in execution order, and every other operator that holds weights.

    A weight that a layer shares with another kind of operator is among the latter: it stays dense.
    MACs are those of one sample, from the shapes seen on the network's example.
    """
    module = network.module
    layers: dict[str, Layer] = {}
    unsupported: dict[str, UnsupportedLayer] = {}
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        weight_name = parameter_name(node.args[1]) if len(node.args) > 1 else None
        kind = _OPERATORS.get(node.target)
        if kind is not None and weight_name is not None:
            layer = _read_layer(node, kind, get_tensor(module, weight_name), weight_name)
            known = layers.get(layer.name)
            if known is not None:
                same = replace(layer, call_sites=known.call_sites, bias_name=known.bias_name)
                if same != known:
                    unsupported[layer.name] = UnsupportedLayer(
                        layer.name,
                        str(node.target),
                        "its weight is used with several strides, pads or dilations: left dense",
                    )
                layer = replace(known, call_sites=(*known.call_sites, node.name))
            layers[layer.name] = layer
            continue
        for argument in node.all_input_nodes:
            name = parameter_name(argument)
            if name is None or name not in dict(module.named_parameters()):
                continue
            tensor = get_tensor(module, name)
            wide = sum(size > 1 for size in tensor.shape) > 1
            if wide and node.target not in _ELEMENTWISE:
                owner = _module_name(name)
                operator_name = str(node.target)
                unsupported[owner] = UnsupportedLayer(
                    owner, operator_name, f"{operator_name} is no Linear or convolution: left dense"
                )
    found = [layer for name, layer in layers.items() if name not in unsupported]
    return _with_macs(network, found), list(unsupported.values())


def _with_macs(network: Network, layers: list[Layer]) -> list[Layer]:
    sites = {site: layer for layer in layers for site in layer.call_sites}
    macs = dict.fromkeys((layer.name for layer in layers), 0)
    batch = int(network.example[0].shape[0])

    def count(node: fx.Node, value: object) -> None:
        layer = sites.get(node.name)
        if layer is None:
            return
        if layer.kind is LayerKind.CONV_TRANSPOSE2D:
            # Every input value meets every weight of its input channel once.
            source = node.args[0]
            assert isinstance(source, fx.Node)
            numel = inputs[source.name].numel() * math.prod(layer.weight_shape[1:])
        else:
            numel = value.numel() * layer.cols  # type: ignore[attr-defined]
        macs[layer.name] += numel // batch

    inputs: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: object) -> None:
        count(node, value)
        if isinstance(value, Tensor):
            inputs[node.name] = value

    for node, tensor in zip(
        (n for n in network.module.graph.nodes if n.op == "placeholder"),
        network.example,
        strict=True,
    ):
        inputs[node.name] = tensor
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    with torch.no_grad():
        Watcher(network.module, watch).run(*(tensor.to(device) for tensor in network.example))
    return [replace(layer, macs=macs[layer.name]) for layer in layers]


def select_layers(layers: Sequence[Layer], pattern: str) -> list[Layer]:
    """The layers whose name equals `pattern` or matches it as a shell pattern (`layer1.*`).

    Raises:
        LayerError: nothing matches.
    """
    found = [
        layer
        for layer in layers
        if layer.name == pattern or fnmatch.fnmatchcase(layer.name, pattern)
    ]
    if not found:
        names = ", ".join(layer.name for layer in layers[:8])
        more = (
            f", ... ({len(layers)} in all; 'obc-deploy inspect' lists them)"
            if len(layers) > 8
            else ""
        )
        raise LayerError(f"no layer matches '{pattern}'; the layers are {names}{more}")
    return found


def weight_to_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """The weight parameter as its matrix: (rows, cols), input channels running fastest."""
    if layer.kind is LayerKind.LINEAR:
        return weight.contiguous()
    if layer.kind is LayerKind.CONV_TRANSPOSE2D:
        inputs, outputs, *kernel = weight.shape
        grouped = weight.flip(2, 3).reshape(layer.groups, inputs // layer.groups, outputs, *kernel)
        return grouped.permute(0, 2, 3, 4, 1).reshape(layer.rows, layer.cols).contiguous()
    return weight.movedim(1, -1).reshape(layer.rows, layer.cols).contiguous()


def matrix_to_weight(layer: Layer, matrix: Tensor) -> Tensor:
    """The inverse of `weight_to_matrix`, for any dtype (weights, masks, codes)."""
    if layer.kind is LayerKind.LINEAR:
        return matrix.reshape(layer.weight_shape).contiguous()
    kernel = layer.weight_shape[2:]
    if layer.kind is LayerKind.CONV_TRANSPOSE2D:
        outputs = layer.weight_shape[1]
        grouped = matrix.reshape(layer.groups, outputs, *kernel, layer.channels)
        weight = grouped.permute(0, 4, 1, 2, 3).reshape(layer.weight_shape)
        return weight.flip(2, 3).clone(memory_format=torch.contiguous_format)
    # A 1x1 kernel counts as contiguous either way round; only a clone has the strides of a plain
    # weight, without which the convolution's output would be laid out channels last.
    weight = matrix.reshape(layer.rows, *kernel, layer.channels).movedim(-1, 1)
    return weight.clone(memory_format=torch.contiguous_format)


def _dilate(inputs: Tensor, stride: Sequence[int]) -> Tensor:
    """Put `stride - 1` zeros between pixels: what a transposed convolution slides over."""
    batch, channels, height, width = inputs.shape
    spread = inputs.new_zeros(
        batch, channels, (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1
    )
    spread[:, :, :: stride[0], :: stride[1]] = inputs
    return spread


def _as_convolution(
    layer: Layer, inputs: Tensor
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Input planes padded so that a plain strided convolution over them computes the layer.

    Returns (planes (n, channels, height, width), stride, dilation), all two-dimensional.
    """
    if layer.kind is LayerKind.CONV_TRANSPOSE2D:
        planes = _dilate(inputs, layer.stride)
        pads = []
        for axis in (1, 0):
            reach = layer.dilation[axis] * (layer.weight_shape[2 + axis] - 1)
            before = reach - layer.padding[axis][0]
            pads += [before, reach - layer.padding[axis][1] + layer.output_padding[axis]]
        return functional.pad(planes, pads), (1, 1), layer.dilation
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    if layer.kind is LayerKind.CONV1D:
        inputs = inputs.unsqueeze(2)
        stride, padding, dilation = (1, *stride), ((0, 0), *padding), (1, *dilation)
    (top, bottom), (left, right) = padding
    return functional.pad(inputs, (left, right, top, bottom)), stride, dilation


def input_vectors(layer: Layer, inputs: Tensor) -> Iterator[Tensor]:
    """The layer's inputs as columns of the matrix problem, a bounded chunk at a time.

    Args:
        layer: the layer.
        inputs: what the layer was called with, batch first.

    Yields:
        (groups, cols, n) chunks of at most `UNFOLD_BYTES`, each vector contiguous.
    """
    if layer.kind is LayerKind.LINEAR:
        flat = inputs.reshape(-1, layer.cols)
        step = max(1, UNFOLD_BYTES // (4 * layer.cols))
        for start in range(0, flat.shape[0], step):
            yield flat[start : start + step].T.unsqueeze(0)
        return
    if inputs.dim() == len(layer.weight_shape) - 1:
        inputs = inputs.unsqueeze(0)
    planes, stride, dilation = _as_convolution(layer, inputs)
    kernel = layer.weight_shape[2:] if len(layer.weight_shape) == 4 else (1, layer.weight_shape[2])
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(planes.shape[2:], kernel, stride, dilation, strict=True)
    ]
    per_sample = 4 * layer.groups * layer.cols * out[0] * out[1]
    step = max(1, UNFOLD_BYTES // max(1, per_sample))
    # Channels last, as in the matrix: the unfolding then copies whole runs of channels.
    planes = planes.permute(0, 2, 3, 1).contiguous()
    for start in range(0, planes.shape[0], step):
        chunk = planes[start : start + step]
        n, (sample, down, right, _) = chunk.shape[0], chunk.stride()
        windows = chunk.as_strided(
            (n, *out, *kernel, layer.groups, layer.channels),
            (
                sample, down * stride[0], right * stride[1], down * dilation[0],
                right * dilation[1], layer.channels, 1,
            ),
        )  # fmt: skip
        rows = windows.permute(5, 0, 1, 2, 3, 4, 6)
        yield rows.reshape(layer.groups, n * out[0] * out[1], layer.cols).transpose(1, 2)
