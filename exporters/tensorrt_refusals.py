"""What a graph for TensorRT must not hold, in any file, ours or not.

TensorRT takes some of it without a word and computes something else. Nothing here needs torch.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

INTEGER_OPERATORS = frozenset(
    {
        "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger",
        "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearAdd", "QLinearAveragePool",
        "QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool", "QLinearMatMul",
    }
)  # fmt: skip
"""Operators on integers that TensorRT has not: it wants floats between quantizers."""
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def refusals(model: onnx.ModelProto) -> tuple[str, ...]:
    """What TensorRT refuses in a graph, or would misread, each with its node and the fix.

    Args:
        model: any ONNX model.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    makers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        name = node.name or node.output[0]
        if node.op_type in INTEGER_OPERATORS:
            found.append(
                f"'{name}' ({node.op_type}) computes on integers, which TensorRT has no operator "
                "for; export with QuantizeLinear and DequantizeLinear (--target tensorrt)"
            )
        if node.op_type in _QUANTIZERS:
            found += _quantizer_refusals(node, name, constants, makers)
    return tuple(found)


def _quantizer_refusals(
    node: onnx.NodeProto,
    name: str,
    constants: dict[str, TensorProto],
    makers: dict[str, onnx.NodeProto],
) -> list[str]:
    fix = "export with symmetric signed grids (--target tensorrt)"
    place = f"'{name}' ({node.op_type})"
    found = []
    zero = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    types = {attribute.name: attribute.i for attribute in node.attribute}
    kind = zero.data_type if zero is not None else types.get("output_dtype", 0)
    source = constants.get(node.input[0])
    if node.op_type == "DequantizeLinear" and source is not None:
        kind = source.data_type
    if node.op_type == "QuantizeLinear" and not kind:
        kind = TensorProto.UINT8
    if kind in (TensorProto.UINT8, TensorProto.UINT4, TensorProto.UINT16):
        word = TensorProto.DataType.Name(kind).lower()
        found.append(f"{place} has {word} codes, which TensorRT reads as signed ones; {fix}")
    elif kind == TensorProto.INT32:
        found.append(f"{place} has int32 codes; TensorRT wants biases in float: {fix}")
    if zero is not None and numpy_helper.to_array(zero).astype(np.float32).any():
        found.append(f"{place} has a zero point that is not zero; {fix}")
    scale = constants.get(node.input[1])
    if scale is None:
        found.append(f"{place} has a scale that is computed; TensorRT wants constants")
    elif not _usable(numpy_helper.to_array(scale)):
        found.append(f"{place} has a scale that is zero, negative or not finite; calibrate again")
    return found


def _usable(scale: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bool:
    wide = scale.astype(np.float32)
    return bool(np.isfinite(wide).all() and (wide > 0).all())
