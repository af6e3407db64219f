"""A quantized network becomes an ONNX model in the form and operator set of a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from torch import Tensor, fx

from obc_deploy.capture import get_tensor, parameter_name
from obc_deploy.exporters.conv_integer import fold_weight_dequantizers, to_conv_integer
from obc_deploy.exporters.edit import (
    add_initializer,
    constant,
    drop_dead,
    insert_before,
    producer,
)
from obc_deploy.exporters.folded_weights import TRANSPOSED, name_folded_weights
from obc_deploy.exporters.graph import onnx_graph
from obc_deploy.exporters.parity import Codes
from obc_deploy.exporters.pooling import keep_max_pools_in_float, means_to_global_average_pools
from obc_deploy.exporters.precision import rounded_scales
from obc_deploy.exporters.qoperator import to_qoperators
from obc_deploy.exporters.sparse_onnxruntime import to_sparse_operators
from obc_deploy.exporters.tensorrt import to_tensorrt
from obc_deploy.quantized_network import (
    DEQUANTIZE,
    QUANTIZE_DEQUANTIZE,
    QUANTIZE_DEQUANTIZE_FLOAT8,
    owner_of_codes,
)
from obc_deploy.runtimes.regions import joined
from obc_deploy.targets import Format, Target

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel
    from obc_deploy.quantized_network import QuantizedNetwork


@dataclass(frozen=True)
class BuiltOnnx:
    """An ONNX model in memory.

    Attributes:
        proto: the model.
        reference: the PyTorch graph it was made from; values that both have share their names.
        codes: where the codes of the reference's quantizers are, by node name.
        outputs: by layer name, the constant that holds its weight and the ONNX value it computes.
        opset: operator set of the default domain.
        ir_version: file version.
        dense_bytes: size of the same network with every weight stored, where the model leaves
            zeros out; None where it does not.
        views: nodes beside the model that compute values of the reference from values of the model,
            for comparisons.
        notes: what a user should know of it.
    """

    proto: Any
    reference: fx.GraphModule
    codes: dict[str, Codes]
    outputs: dict[str, tuple[str, str]]
    opset: int
    ir_version: int
    dense_bytes: int | None = None
    views: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()


def _layer_outputs(model: ir.Model, layers: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Each layer's weight constant, and the output of the operator that reads it."""
    found: dict[str, tuple[str, str]] = {}
    for name, value in model.graph.initializers.items():
        layer = layers.get(name or "")
        if layer is None or name is None:
            continue
        for use in value.uses():
            node = use.node
            while node.op_type in {"DequantizeLinear", "Transpose"} and node.outputs[0].uses():
                node = next(iter(node.outputs[0].uses())).node
            found[layer] = name, node.outputs[0].name or ""
    return found


def _restore_names(model: ir.Model, reference: fx.GraphModule) -> None:
    """Give every layer constants of its own again, under its own names.

    The exporter keeps one of several equal constants, and one of several equal DequantizeLinear, so
    equal layers would lose theirs.
    """
    makers = {node.outputs[0].name: node for node in model.graph}
    for node in reference.graph.nodes:
        maker = makers.get(node.name)
        if maker is None or node.op != "call_function":
            continue
        first = 0 if node.target is DEQUANTIZE else 1
        for index in range(first, min(first + 2, len(node.args), len(maker.inputs))):
            argument, value = node.args[index], maker.inputs[index]
            merged = producer(value, "DequantizeLinear")
            if not isinstance(argument, fx.Node) or value is None:
                continue
            if argument.target is DEQUANTIZE and argument.name not in makers and merged is not None:
                own = [
                    _own_constant(model, reference, part, merged.inputs[place])
                    for place, part in enumerate(argument.args[:3])
                ]
                again = insert_before(
                    model, maker, "DequantizeLinear", own, {"axis": argument.args[3]},
                    name=argument.name,
                )  # fmt: skip
                again.shape, again.type = value.shape, value.type
                makers[argument.name] = maker
                maker.replace_input_with(index, again)
            else:
                maker.replace_input_with(index, _own_constant(model, reference, argument, value))


def _own_constant(
    model: ir.Model, reference: fx.GraphModule, argument: object, value: ir.Value | None
) -> ir.Value | None:
    """The constant a reference's node reads, under that node's name; the value where it is none."""
    name, array = parameter_name(argument), constant(value)
    if name is None or value is None or array is None or value.name == name:
        return value
    if array.shape != tuple(get_tensor(reference, name).shape):
        return value
    return add_initializer(model, name, array)


def _codes(model: ir.Model, reference: fx.GraphModule) -> dict[str, Codes]:
    """Where each quantizer's codes are; the passes after this keep the names of codes."""
    targets = {
        n.name: n.target
        for n in reference.graph.nodes
        if n.target in {QUANTIZE_DEQUANTIZE, QUANTIZE_DEQUANTIZE_FLOAT8}
    }
    found: dict[str, Codes] = {}
    for node in model.graph:
        name = node.outputs[0].name
        if node.op_type != "DequantizeLinear" or name is None or name not in targets:
            continue
        if targets[name] is QUANTIZE_DEQUANTIZE_FLOAT8:
            step = constant(node.inputs[1])
            if step is not None:
                found[name] = Codes(name, float(step), 0, float8=True)
            continue
        value, (scale, zero_point) = node.inputs[0], (constant(v) for v in node.inputs[1:3])
        if value is not None and value.name and scale is not None and zero_point is not None:
            found[name] = Codes(value.name, float(scale), int(zero_point))
    return found


def build_onnx(
    model: CompressedModel,
    quantized: QuantizedNetwork,
    target: Target,
    example: tuple[Tensor, ...],
    *,
    dynamic_batch: bool,
) -> BuiltOnnx:
    """Translate, then rewrite for the target.

    Args:
        model: the compressed model.
        quantized: its network with quantizers placed for the target.
        target: the target.
        example: one batch of the file's batch size.
        dynamic_batch: leave the batch size open.

    Raises:
        ExportError: an operator has no form there.
    """
    rounded_scales(quantized.module, target.precision)
    graph, reference = onnx_graph(quantized.module, example, dynamic_batch=dynamic_batch)
    means_to_global_average_pools(graph)
    _restore_names(graph, reference)
    codes = _codes(graph, reference)
    weights = {f"{owner_of_codes(layer)}.weight_codes": layer.name for layer in model.layers}
    weights |= {layer.weight_name: layer.name for layer in model.layers}
    if target.format is Format.QOPERATOR:
        if target.one_weight_step:
            to_conv_integer(graph)
        to_qoperators(
            graph,
            linear_as_convolution=target.linear_as_convolution,
            operators=target.integer_operators,
        )
        if target.one_weight_step:
            fold_weight_dequantizers(graph)
            keep_max_pools_in_float(graph)
        for suffix in ("codes_1x1", "codes_transposed", "codes_blocks", "codes_codes", "values"):
            weights |= {f"{layer.name}.weight_{suffix}": layer.name for layer in model.layers}
    drop_dead(graph)
    if target.runtime == "tensorrt" or target.sparse_operators:
        name_folded_weights(graph, model)
        for suffix in (TRANSPOSED, f"{TRANSPOSED}_values"):
            weights |= {f"{layer.weight_name}_{suffix}": layer.name for layer in model.layers}
    notes: tuple[str, ...] = ()
    if target.runtime == "tensorrt":
        notes = to_tensorrt(graph, model, target)
        for layer in model.layers:
            weights[f"{owner_of_codes(layer)}.weight_codes_int4"] = layer.name
    graph.ir_version = target.ir_version
    dense_bytes: int | None = None
    views: tuple[Any, ...] = ()
    if target.sparse_operators:
        dense_bytes = ir.to_proto(graph).ByteSize()
        sparse = to_sparse_operators(graph, target.processor)
        views = sparse.views
        if not sparse.layers:
            dense_bytes = None
    outputs = _layer_outputs(graph, weights)
    proto = ir.to_proto(graph)
    return BuiltOnnx(
        joined(proto) if target.sparse_operators else proto,
        reference,
        codes,
        outputs,
        int(graph.graph.opset_imports[""]),
        target.ir_version,
        dense_bytes,
        views,
        notes,
    )
