"""The quantized network: quantizers placed in a graph, simulated in PyTorch, exported as they are.

Two operators stand for ONNX's QuantizeLinear/DequantizeLinear, with its arithmetic (divide in
float32, round half to even, saturate). The graph that PyTorch runs for accuracy is the very graph
that the exporter writes, so the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from obc_deploy.activations import FLOAT8_MAX, ActivationGrid, ActivationRange, activation_grid
from obc_deploy.capture import Network, get_tensor, parameter_name, set_tensor
from obc_deploy.errors import ExportError
from obc_deploy.layers import Layer, LayerKind, matrix_to_weight
from obc_deploy.schemes import NM
from obc_deploy.solvers.contract import CompressedLayer
from obc_deploy.targets import EightBit, Placement, int4_obstacle, int8_obstacle

aten = torch.ops.aten


@torch.library.custom_op("obc_deploy::quantize_dequantize", mutates_args=())
def quantize_dequantize(
    values: Tensor, scale: Tensor, zero_point: Tensor, code_min: int, code_max: int
) -> Tensor:
    """(clamp(round(x / scale) + zero_point) - zero_point) * scale: a tensor on its grid."""
    zero = zero_point.to(torch.float32)
    codes = torch.clamp(torch.round(values / scale) + zero, code_min, code_max)
    return (codes - zero) * scale


@quantize_dequantize.register_fake
def _(values: Tensor, scale: Tensor, zero_point: Tensor, code_min: int, code_max: int) -> Tensor:
    return torch.empty_like(values)


@torch.library.custom_op("obc_deploy::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """(codes - zero_point) * scale along one axis: a constant weight or bias from its codes."""
    shape = [1] * codes.dim()
    shape[axis] = -1
    centred = codes.to(torch.float32) - zero_point.to(torch.float32).reshape(shape)
    return centred * scale.reshape(shape)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


@torch.library.custom_op("obc_deploy::dequantize_blocks", mutates_args=())
def dequantize_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (rows, cols) times scales (rows, blocks), each for as many consecutive columns."""
    block = codes.shape[1] // scale.shape[1]
    return codes.to(torch.float32) * scale.repeat_interleave(block, 1)


@dequantize_blocks.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


@torch.library.custom_op("obc_deploy::quantize_dequantize_float8", mutates_args=())
def quantize_dequantize_float8(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """E4M3(x / scale) * scale, saturated at the largest E4M3 float; `zero_point` is a zero."""
    codes = torch.clamp(values / scale, -FLOAT8_MAX, FLOAT8_MAX).to(zero_point.dtype)
    return codes.to(torch.float32) * scale


@quantize_dequantize_float8.register_fake
def _(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(values)


QUANTIZE_DEQUANTIZE = torch.ops.obc_deploy.quantize_dequantize.default
QUANTIZE_DEQUANTIZE_FLOAT8 = torch.ops.obc_deploy.quantize_dequantize_float8.default
DEQUANTIZE = torch.ops.obc_deploy.dequantize.default
DEQUANTIZE_BLOCKS = torch.ops.obc_deploy.dequantize_blocks.default

OWNER_SUFFIX = "_quantized"
_ADDS = frozenset({aten.add.Tensor})
_CONCATS = frozenset({aten.cat.default})
_AVERAGE_POOLS = frozenset(
    {aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.mean.dim}
)
_RECTIFIERS = frozenset(
    {aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.relu6.default}
)
_SAME_VALUES = frozenset(
    {
        aten.max_pool2d.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.squeeze.default, aten.dropout.default, aten.clone.default,
        aten.slice.Tensor,
    }
)  # fmt: skip
"""Operators whose output holds only values of their input: they stay on its grid."""


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network with its quantizers in place.

    Attributes:
        module: the graph that simulates the runtime's arithmetic.
        int8_layers: layers that run on int8 activations.
        float_layers: quantized or pruned layers that compute in float, with the reason.
        grids: grids of the activations, by the node they follow.
    """

    module: fx.GraphModule
    int8_layers: tuple[str, ...]
    float_layers: Mapping[str, str]
    grids: Mapping[str, ActivationGrid]


@dataclass
class _Plan:
    grids: dict[str, ActivationGrid] = field(default_factory=dict)
    everywhere: set[str] = field(default_factory=set)
    consumers: dict[str, set[str]] = field(default_factory=dict)


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    if node.target in _CONCATS:
        items = node.args[0]
        return (
            [item for item in items if isinstance(item, fx.Node)]
            if isinstance(items, list | tuple)
            else []
        )
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point()


def rectified(node: fx.Node) -> fx.Node:
    """The ReLU or clip that alone follows a node and starts at zero, or the node itself."""
    if len(node.users) != 1:
        return node
    user = next(iter(node.users))
    if user.target not in _RECTIFIERS:
        return node
    if user.target in {aten.hardtanh.default, aten.clamp.default}:
        low = (
            user.args[1]
            if len(user.args) > 1
            else (-1.0 if user.target is aten.hardtanh.default else None)
        )
        if low is None or low != 0:
            return node
    return user


def quantization_points(network: Network, layers: Sequence[Layer]) -> list[str]:
    """Names of all graph values that some target may want on a grid, to collect ranges for."""
    sites = {site for layer in layers for site in layer.call_sites}
    points: dict[str, None] = {}
    for node in network.module.graph.nodes:
        is_operator = node.target in _ADDS | _CONCATS | _AVERAGE_POOLS
        if node.name not in sites and not is_operator:
            continue
        inputs = _tensor_inputs(node)
        for source in inputs[:1] if node.name in sites else inputs:
            if source.op != "get_attr" and _is_float(source):
                points[source.name] = None
        points[node.name] = None
        points[rectified(node).name] = None
    return list(points)


def _ends_in_add(
    network: Network, layers: Sequence[Layer], int8: Mapping[str, int]
) -> dict[str, str]:
    """For each residual add that an int8 convolution ends in, the convolution's node.

    Where both operands are such convolutions the later one computes the add along with itself.
    """
    sites = {s for x in layers if x.kind is not LayerKind.LINEAR and x.name in int8
             for s in x.call_sites}  # fmt: skip
    found: dict[str, str] = {}
    for node in network.module.graph.nodes:
        if node.name not in sites or len(node.users) != 1:
            continue
        add = next(iter(node.users))
        if add.target not in _ADDS or len(add.args) < 2:
            continue
        operands = [argument for argument in add.args[:2] if isinstance(argument, fx.Node)]
        # Texts: sizes of an open batch are symbols, which do not hash.
        shapes = {str(tuple(x.meta["val"].shape)) for x in operands if "val" in x.meta}
        if len(operands) == 2 and len(shapes) == 1 and operands[0] is not operands[1]:
            found[add.name] = node.name
    return found


def _place(
    network: Network,
    layers: Sequence[Layer],
    int8: Mapping[str, int],
    ranges: Mapping[str, ActivationRange],
    placement: Placement,
    sparse: Collection[str],
) -> _Plan:
    """Decide which values are put on a grid, and which nodes read them from there."""
    plan = _Plan()
    sites = {site: layer for layer in layers for site in layer.call_sites}

    def grid_of(node: fx.Node, bits: int) -> ActivationGrid:
        if node.name not in ranges:
            raise ExportError(
                f"no activation range was calibrated for '{node.name}'; calibrate the model anew"
            )
        float8 = placement.eight_bit is EightBit.FP8
        return activation_grid(ranges[node.name], bits=bits, signed=placement.signed, float8=float8)

    def read(source: fx.Node, consumer: fx.Node, bits: int) -> None:
        if source.name not in plan.grids:
            plan.grids[source.name] = grid_of(source, bits)
        plan.consumers.setdefault(source.name, set()).add(consumer.name)

    def _sparse_output(node: fx.Node, name: str) -> bool:
        leaves = any(user.op == "output" for user in rectified(node).users)
        return placement.sparse_linear_output and name in sparse and not leaves

    def write(node: fx.Node, bits: int) -> None:
        out = rectified(node)
        plan.grids[out.name] = grid_of(out, bits)
        plan.everywhere.add(out.name)

    wanted_bits = _wanted_bits(network, {site: sites[site].name for site in sites}, int8)
    fused = _ends_in_add(network, layers, int8) if placement.shortcut else {}
    unwritten = set(fused.values())
    for node in network.module.graph.nodes:
        if node.op != "call_function":
            continue
        layer = sites.get(node.name)
        if layer is not None:
            if layer.name in int8:
                source = node.args[0]
                read(source, node, wanted_bits[source.name])
                linear = layer.kind is LayerKind.LINEAR
                if node.name not in unwritten and (
                    not linear or placement.linear_output or _sparse_output(node, layer.name)
                ):
                    write(node, wanted_bits.get(rectified(node).name, int8[layer.name]))
            continue
        inputs = _tensor_inputs(node)
        if node.name in fused:
            (shortcut,) = (source for source in inputs if source.name != fused[node.name])
            bits = wanted_bits.get(rectified(node).name, 8)
            read(shortcut, node, wanted_bits.get(shortcut.name, bits))
            write(node, bits)
            continue
        if not inputs or any(source.name not in plan.grids for source in inputs):
            continue
        wanted = (
            (node.target in _ADDS and placement.add and len(inputs) == 2 and not placement.shortcut)
            or (node.target in _CONCATS and placement.concat)
            or (node.target in _AVERAGE_POOLS and placement.average_pool and _pools_planes(node))
        )
        if wanted:
            bits = max(plan.grids[source.name].bits for source in inputs)
            for source in inputs:
                read(source, node, bits)
            write(node, wanted_bits.get(rectified(node).name, bits))
        elif node.target in _SAME_VALUES and inputs[0].name in plan.everywhere:
            plan.grids[node.name] = plan.grids[inputs[0].name]
            plan.everywhere.add(node.name)
    return plan


def _wanted_bits(
    network: Network, sites: Mapping[str, str], int8: Mapping[str, int]
) -> dict[str, int]:
    """Bits of each value that int8 layers read, directly or through other operators.

    Where the readers of a value want it in different bits it gets the most of them.
    """
    wanted: dict[str, int] = {}
    passing = _ADDS | _CONCATS | _AVERAGE_POOLS | _SAME_VALUES | _RECTIFIERS
    for node in reversed(network.module.graph.nodes):
        asked = []
        for user in node.users:
            layer = sites.get(user.name)
            if layer is not None and layer in int8 and user.args[0] is node:
                asked.append(int8[layer])
            elif user.target in passing and user.name in wanted:
                asked.append(wanted[user.name])
        if asked:
            wanted[node.name] = max(asked)
    return wanted


def _pools_planes(node: fx.Node) -> bool:
    """Whether a pool or mean reduces exactly the two spatial axes of (n, c, h, w)."""
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1]  # type: ignore[arg-type]
    if node.target is not aten.mean.dim:
        return True
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    axes = node.args[1]
    if not isinstance(value, Tensor) or value.dim() != 4 or not isinstance(axes, list | tuple):
        return False
    return sorted(int(a) % 4 for a in axes) == [2, 3]  # type: ignore[arg-type]


def _quantizers(grid: ActivationGrid) -> tuple[Tensor, Tensor]:
    dtype = torch.int8 if grid.signed else torch.uint8
    if grid.float8:
        dtype = torch.float8_e4m3fn
    return torch.tensor(grid.scale, dtype=torch.float32), torch.tensor(grid.zero_point, dtype=dtype)


def _fitting_biases(
    form: CompressedLayer[Tensor], bias: Tensor, input_scale: float
) -> CompressedLayer[Tensor]:
    """The form, with scales large enough for its biases to fit int32 at input_scale * scale.

    A channel whose weights are all zero may have any scale, and one whose weights are so small that
    the bias would not fit int32 contributes less than a rounding step: both get a scale that fits.
    """
    assert form.scale is not None
    assert form.codes is not None
    assert form.zero_point is not None
    scale = form.scale[:, 0].double()
    least = bias.double().abs() / (input_scale * 2.0**29)
    small = scale < least
    if not bool(small.any()):
        return form
    scale = torch.where(small, torch.clamp(least, min=torch.finfo(torch.float32).tiny), scale)
    codes = torch.where(small[:, None], form.zero_point.expand_as(form.codes), form.codes)
    weight = torch.where(small[:, None], torch.zeros_like(form.weight), form.weight)
    return replace(form, codes=codes, weight=weight, scale=scale.float()[:, None])


def _bias_codes(bias: Tensor, scale: Tensor, input_scale: float) -> tuple[Tensor, Tensor]:
    """int32 codes of a bias and their scale: input_scale * weight scale, as integer kernels do."""
    bias_scale = (scale * torch.tensor(input_scale, dtype=torch.float32)).clamp(min=1e-38)
    return torch.round(bias.double() / bias_scale.double()).to(torch.int32), bias_scale


def _constant(module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    set_tensor(module, name, tensor)
    node = module.graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def quantized_network(
    network: Network,
    layers: Sequence[Layer],
    forms: Mapping[str, CompressedLayer[Tensor]],
    ranges: Mapping[str, ActivationRange],
    placement: Placement,
) -> QuantizedNetwork:
    """Put weights, biases and activations on their grids.

    Args:
        network: the folded float network; left as it is.
        layers: its layers.
        forms: the layers' compressed forms by name, folded; layers without one stay float.
        ranges: activation ranges by graph value.
        placement: which operators run in int8 on the target.

    Raises:
        ExportError: a range is missing.
    """
    copied = network.copy()
    module = copied.module
    int8: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for layer in layers:
        form = forms.get(layer.name)
        if form is None or form.scheme.is_dense:
            continue
        obstacle = int8_obstacle(layer, form.scheme)
        if obstacle is None:
            int8[layer.name] = form.scheme.activation_bits
        else:
            reasons[layer.name] = obstacle
    sparse = {name for name, form in forms.items() if isinstance(form.scheme.pattern, NM)}
    plan = _place(copied, layers, int8, ranges, placement, sparse)
    nodes = {node.name: node for node in module.graph.nodes}
    by_name = {layer.name: layer for layer in layers}
    _insert_weights(module, nodes, by_name, forms, int8, plan, placement)
    _insert_activations(module, nodes, plan)
    module.graph.lint()
    module.recompile()
    return QuantizedNetwork(module, tuple(int8), reasons, dict(plan.grids))


def _insert_weights(
    module: fx.GraphModule,
    nodes: Mapping[str, fx.Node],
    layers: Mapping[str, Layer],
    forms: Mapping[str, CompressedLayer[Tensor]],
    int8: Mapping[str, int],
    plan: _Plan,
    placement: Placement,
) -> None:
    for name, layer in layers.items():
        form = forms.get(name)
        if form is None or form.codes is None or form.scale is None or form.zero_point is None:
            continue
        if placement.int4_blocks and int4_obstacle(layer, form.scheme) is None:
            _insert_blocks(
                module, [nodes[site] for site in layer.call_sites], owner_of_codes(layer), form
            )
            continue
        grouped = layer.kind is LayerKind.CONV_TRANSPOSE2D and layer.groups > 1
        if form.scale.shape[1] > 1 or grouped or not (placement.weight_only or name in int8):
            # Several scales a row, or rows along two axes, have no form in this operator set: the
            # exact float values are written. So are weights that the target wants as floats.
            set_tensor(module, layer.weight_name, matrix_to_weight(layer, form.weight))
            continue
        if name in int8 and placement.eight_bit is EightBit.FP8:
            form = _as_float8(form)
        biases: dict[str, tuple[Tensor, float]] = {}
        for site in layer.call_sites if name in int8 and placement.integer_bias else ():
            source, bias_name = nodes[site].args[0], _bias_name(nodes[site])
            assert isinstance(source, fx.Node)
            if bias_name is not None:
                biases[site] = get_tensor(module, bias_name), plan.grids[source.name].scale
        for bias, input_scale in biases.values():
            form = _fitting_biases(form, bias, input_scale)
        assert form.codes is not None
        assert form.scale is not None
        assert form.zero_point is not None
        scale = form.scale[:, 0].contiguous()
        owner = owner_of_codes(layer)
        with module.graph.inserting_before(nodes[layer.call_sites[0]]):
            weight_node = module.graph.call_function(
                DEQUANTIZE,
                (
                    _constant(module, f"{owner}.weight_codes", matrix_to_weight(layer, form.codes)),
                    _constant(module, f"{owner}.weight_scale", scale),
                    _constant(
                        module, f"{owner}.weight_zero_point", form.zero_point[:, 0].contiguous()
                    ),
                    1 if layer.kind is LayerKind.CONV_TRANSPOSE2D else 0,
                ),
            )
        for index, site in enumerate(layer.call_sites):
            arguments = list(nodes[site].args)
            arguments[1] = weight_node
            if site in biases:
                # Each use of a shared weight has an input scale, so a bias scale, of its own.
                arguments[2] = _insert_bias(
                    module, nodes[site], f"{owner}.bias{index or ''}", *biases[site], scale
                )
            nodes[site].args = tuple(arguments)


def owner_of_codes(layer: Layer) -> str:
    """The name that `weight_codes`, `weight_scale` and the like of a layer stand under.

    A parameter without a module (a stacked attention weight) cannot own tensors itself.
    """
    return f"{layer.name}{OWNER_SUFFIX}" if layer.weight_name == layer.name else layer.name


def _as_float8(form: CompressedLayer[Tensor]) -> CompressedLayer[Tensor]:
    """A layer's weights rounded from the solver's grid to E4M3 floats, a scale a row."""
    most = form.weight.abs().amax(1, keepdim=True)
    scale = torch.where(most > 0, most / FLOAT8_MAX, torch.ones_like(most))
    steps = torch.clamp(form.weight / scale, -FLOAT8_MAX, FLOAT8_MAX)
    codes = steps.to(torch.float8_e4m3fn)
    return replace(form, codes=codes, scale=scale,
                   zero_point=torch.zeros_like(scale).to(codes.dtype))  # fmt: skip


def _insert_blocks(
    module: fx.GraphModule, sites: Sequence[fx.Node], owner: str, form: CompressedLayer[Tensor]
) -> None:
    assert form.codes is not None
    assert form.scale is not None
    # A block of zeros may have any scale; this one fits every float type.
    filled = (form.codes != 0).reshape(*form.scale.shape, -1).any(2)
    scale = torch.where(filled, form.scale, torch.ones_like(form.scale))
    with module.graph.inserting_before(sites[0]):
        weight = module.graph.call_function(
            DEQUANTIZE_BLOCKS,
            (
                _constant(module, f"{owner}.weight_codes", form.codes.contiguous()),
                _constant(module, f"{owner}.weight_scale", scale.contiguous()),
            ),
        )
    for site in sites:
        site.args = (site.args[0], weight, *site.args[2:])


def _bias_name(site: fx.Node) -> str | None:
    return parameter_name(site.args[2]) if len(site.args) > 2 else None


def _insert_bias(
    module: fx.GraphModule,
    site: fx.Node,
    name: str,
    bias: Tensor,
    input_scale: float,
    scale: Tensor,
) -> fx.Node:
    codes, bias_scale = _bias_codes(bias, scale, input_scale)
    with module.graph.inserting_before(site):
        return module.graph.call_function(
            DEQUANTIZE,
            (
                _constant(module, f"{name}_codes", codes),
                _constant(module, f"{name}_scale", bias_scale),
                _constant(module, f"{name}_zero_point", torch.zeros_like(codes)),
                0,
            ),
        )


def _insert_activations(module: fx.GraphModule, nodes: Mapping[str, fx.Node], plan: _Plan) -> None:
    for name, grid in plan.grids.items():
        source = nodes[name]
        readers = plan.consumers.get(name, set())
        users = [u for u in source.users if name in plan.everywhere or u.name in readers]
        # Placeholders come first in a graph: their quantizers go before the first real operator.
        anchor = source.next
        while anchor.op == "placeholder":
            anchor = anchor.next
        with module.graph.inserting_before(anchor):
            scale, zero_point = _quantizers(grid)
            arguments = (
                source,
                _constant(module, f"activations.{name}_scale", scale),
                _constant(module, f"activations.{name}_zero_point", zero_point),
            )
            if grid.float8:
                quantizer = module.graph.call_function(QUANTIZE_DEQUANTIZE_FLOAT8, arguments)
            else:
                quantizer = module.graph.call_function(
                    QUANTIZE_DEQUANTIZE, (*arguments, grid.code_min, grid.code_max)
                )
        for user in users:
            user.replace_input_with(source, quantizer)
