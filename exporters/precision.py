"""Pass: float32 graphs become float16 or bfloat16 ones, inputs and outputs staying float32.

The runtimes that want it are strongly typed: what a value's type is, is what it is computed in.
Scales have the type of what they scale, so they are rounded too; `rounded_scales` gives the PyTorch
network the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch import fx

from obc_deploy.capture import get_tensor, parameter_name, set_tensor
from obc_deploy.errors import ExportError
from obc_deploy.exporters.edit import insert_before
from obc_deploy.quantized_network import (
    DEQUANTIZE,
    DEQUANTIZE_BLOCKS,
    QUANTIZE_DEQUANTIZE,
    QUANTIZE_DEQUANTIZE_FLOAT8,
)
from obc_deploy.targets import Precision

ARRAY_TYPES: dict[Precision, npt.DTypeLike] = {
    Precision.FLOAT32: np.float32,
    Precision.FLOAT16: np.float16,
    Precision.BFLOAT16: ml_dtypes.bfloat16,
}
_ONNX_TYPES = {
    Precision.FLOAT32: ir.DataType.FLOAT,
    Precision.FLOAT16: ir.DataType.FLOAT16,
    Precision.BFLOAT16: ir.DataType.BFLOAT16,
}
_TORCH_TYPES = {
    Precision.FLOAT32: torch.float32,
    Precision.FLOAT16: torch.float16,
    Precision.BFLOAT16: torch.bfloat16,
}
_SCALED = frozenset(
    {DEQUANTIZE, DEQUANTIZE_BLOCKS, QUANTIZE_DEQUANTIZE, QUANTIZE_DEQUANTIZE_FLOAT8}
)
SCALE_ERROR = 2.0**-8
"""Most that a scale may change by, relative to itself; bfloat16 has eight bits."""
_FLOAT32_INPUTS = {"Resize": (1, 2)}
"""Places of inputs that an operator takes in float32 alone."""


def rounded_scales(module: fx.GraphModule, precision: Precision) -> None:
    """Round the scales of a graph's quantizers to what the file will hold, in place.

    Args:
        module: a quantized network.
        precision: of the file.

    Raises:
        ExportError: a scale is too small or too large for the precision.
    """
    if precision is Precision.FLOAT32:
        return
    done = set()
    for node in module.graph.nodes:
        if node.target not in _SCALED:
            continue
        name = parameter_name(node.args[1])
        if name is None or name in done:
            continue
        done.add(name)
        scale = get_tensor(module, name)
        if node.target is DEQUANTIZE:
            scale = _used_scales(module, node, scale)
        rounded = scale.to(_TORCH_TYPES[precision]).to(torch.float32)
        error = (rounded - scale).abs() / scale
        worst = int(error.argmax())
        if not float(error.reshape(-1)[worst]) <= SCALE_ERROR:
            raise ExportError(
                f"the scale {float(scale.reshape(-1)[worst]):.3g} ('{name}') does not fit "
                f"{precision.value}; export with --precision bf16 or fp32"
            )
        set_tensor(module, name, rounded)


def _used_scales(module: fx.GraphModule, node: fx.Node, scale: torch.Tensor) -> torch.Tensor:
    """The scales of a weight; those of channels that are zero throughout may be anything."""
    name = parameter_name(node.args[0])
    axis = node.args[3]
    if name is None or not isinstance(axis, int):
        return scale
    codes = get_tensor(module, name).movedim(axis, 0).flatten(1)
    return torch.where((codes.float() == 0).all(1), torch.ones_like(scale), scale)


def to_precision(model: ir.Model, precision: Precision) -> int:
    """Cast a float32 graph; returns how many constants were clipped to what the type holds.

    Args:
        model: without nested graphs; changed in place.
        precision: what to compute in.

    Raises:
        ExportError: the graph has branches or loops.
    """
    if precision is Precision.FLOAT32:
        return 0
    kind = _ONNX_TYPES[precision]
    clipped = 0
    fixed = _kept_float32(model)
    for node in model.graph:
        if any(a.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
               for a in node.attributes.values()):  # fmt: skip
            raise ExportError(
                f"'{node.name}' ({node.op_type}) holds a graph of its own, which cannot be cast to "
                f"{precision.value}; export with --precision fp32"
            )
    for value in model.graph.initializers.values():
        if value.dtype is ir.DataType.FLOAT and value not in fixed:
            clipped += _cast_constant(value, precision)
    for node in model.graph:
        clipped += _cast_attributes(node, precision, fixed)
        for output in node.outputs:
            if output.dtype is ir.DataType.FLOAT and output not in fixed:
                output.type = ir.TensorType(kind)
    _cast_ends(model, kind)
    return clipped


def _kept_float32(model: ir.Model) -> set[ir.Value]:
    kept = set()
    for node in model.graph:
        for place in _FLOAT32_INPUTS.get(node.op_type, ()):
            value = node.inputs[place] if place < len(node.inputs) else None
            if value is not None:
                kept.add(value)
    return kept


def _narrowed(array: npt.NDArray[np.float32], precision: Precision) -> tuple[ir.Tensor[Any], bool]:
    dtype = ARRAY_TYPES[precision]
    most = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    clipped = np.where(np.isfinite(array), np.clip(array, -most, most), array)
    return ir.Tensor(np.asarray(clipped.astype(dtype), order="C")), bool((clipped != array).any())


def _cast_constant(value: ir.Value, precision: Precision) -> bool:
    assert value.const_value is not None
    array = np.asarray(value.const_value.numpy(), np.float32)
    tensor, clipped = _narrowed(array, precision)
    tensor.name = value.name
    value.const_value = tensor
    value.type = ir.TensorType(_ONNX_TYPES[precision])
    return clipped


def _cast_attributes(node: ir.Node, precision: Precision, fixed: set[ir.Value]) -> int:
    """Constants and target types that a node carries itself."""
    kind = _ONNX_TYPES[precision]
    if node.op_type == "Cast" and node.outputs[0] not in fixed:
        if node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(kind))
        return 0
    value = node.attributes.get("value")
    if node.op_type not in {"Constant", "ConstantOfShape"} or node.outputs[0] in fixed:
        return 0
    for name in ("value_float", "value_floats"):
        if name in node.attributes:
            array = np.asarray(node.attributes[name].value, np.float32)
            tensor, clipped = _narrowed(array, precision)
            del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor("value", tensor)
            return int(clipped)
    if value is not None and value.as_tensor().dtype is ir.DataType.FLOAT:
        tensor, clipped = _narrowed(np.asarray(value.as_tensor().numpy(), np.float32), precision)
        node.attributes["value"] = ir.AttrTensor("value", tensor)
        return int(clipped)
    return 0


def _cast_ends(model: ir.Model, kind: ir.DataType) -> None:
    """Casts behind float32 inputs and before float32 outputs, whose names stay."""
    first = next(iter(model.graph))
    for value in model.graph.inputs:
        if value.dtype is not ir.DataType.FLOAT:
            continue
        uses = list(value.uses())
        cast = insert_before(model, first, "Cast", [value], {"to": int(kind)},
                             name=f"{value.name}_{kind.name.lower()}")  # fmt: skip
        cast.shape, cast.type = value.shape, ir.TensorType(kind)
        for use in uses:
            use.node.replace_input_with(use.idx, cast)
    for place, value in enumerate(model.graph.outputs):
        if value.dtype is not kind:
            continue
        name, node = value.name, ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        value.name = f"{name}_{kind.name.lower()}"
        node.name = name
        output = node.outputs[0]
        output.name, output.shape = name, value.shape
        output.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(node)
        model.graph.outputs[place] = output


def in_float32(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A bfloat16 graph computed in float32, on the same constants, as rounded as they are.

    ONNX Runtime's CPU kernels take no bfloat16; this is what they can compare.
    """
    model = ir.from_proto(proto)
    for value in model.graph.initializers.values():
        if value.dtype is ir.DataType.BFLOAT16 and value.const_value is not None:
            wide = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.const_value, value.type = wide, ir.TensorType(ir.DataType.FLOAT)
    for value in _computed(model):
        if value.dtype is ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        held = node.attributes.get("value")
        if held is not None and held.type is ir.AttributeType.TENSOR:
            tensor = held.as_tensor()
            if tensor.dtype is ir.DataType.BFLOAT16:
                wide = ir.Tensor(tensor.numpy().astype(np.float32))
                node.attributes["value"] = ir.AttrTensor("value", wide)
    return ir.to_proto(model)


def _computed(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph:
        yield from node.outputs
