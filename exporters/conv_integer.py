"""Pass: a layer with one weight scale a row becomes ConvInteger or MatMulInteger and a product.

    DQ, DQ, DQ -> Conv    Q codes -> ConvInteger   -> Add(bias codes) -> Cast -> Mul(scales)
    DQ, DQ, DQ -> Gemm    Q codes -> MatMulInteger -> Add(bias codes) -> Cast -> Mul(scales)
    depthwise Conv        DQ -> Conv with the dequantized weight and bias, in float

DeepSparse has no QLinearConv kernel for per-channel scales and would hand the graph to its
fallback; these forms stay in its engine, at the price of a multiplication an output value. What
follows (ReLU, QuantizeLinear) stays as it is. Its fallback has no ConvInteger at all: a graph with
a layer that the engine does not take in any form is left alone, or it would not load.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from obc_deploy.exporters.edit import (
    add_initializer,
    constant,
    drop_dead,
    insert_before,
    integer,
    producer,
    replace_node,
)

_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def to_conv_integer(model: ir.Model) -> int:
    """Rewrite every Conv and Gemm whose weight scales differ; returns how many there were.

    Nothing is done where some convolution is one that the engine has no kernel for: not
    two-dimensional, or in groups of several channels.
    """
    if not all(_in_engine(node) for node in model.graph):
        return 0
    made = 0
    for node in list(model.graph):
        if node.domain or node.op_type not in {"Conv", "Gemm"}:
            continue
        operands = [producer(value, "DequantizeLinear") for value in node.inputs]
        if len(operands) < 2 or any(operand is None for operand in operands):
            continue
        data, weight, *bias = (operand for operand in operands if operand is not None)
        scales, zero = constant(weight.inputs[1]), constant(weight.inputs[2])
        if scales is None or scales.ndim == 0 or (scales == scales[0]).all():
            continue
        if zero is None or zero.any() or constant(data.inputs[1]) is None:
            continue
        if node.op_type == "Gemm":
            made += int(_matrix_product(model, node, data, weight, bias, scales))
        elif integer(node, "group", 1) > 1:
            made += int(_float_convolution(model, node, [weight, *bias]))
        else:
            made += int(_convolution(model, node, data, weight, bias, scales))
    drop_dead(model)
    return made


def fold_weight_dequantizers(model: ir.Model) -> int:
    """Replace dequantized constants by their float values; returns how many there were.

    DeepSparse has no DequantizeLinear for weights and would hand the graph to its fallback.
    """
    made = 0
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.domain:
            continue
        codes, scales, zeros = (constant(value) for value in node.inputs)
        if codes is None or scales is None or zeros is None:
            continue
        value = add_initializer(
            model, _values_name(node), _dequantized(codes, scales, zeros, integer(node, "axis", 1))
        )
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        made += 1
    drop_dead(model)
    return made


def _dequantized(
    codes: npt.NDArray[Any], scales: npt.NDArray[Any], zeros: npt.NDArray[Any], axis: int
) -> npt.NDArray[Any]:
    shape = [1] * codes.ndim
    if scales.ndim:
        shape[axis] = -1
    centred = codes.astype(np.float32) - zeros.astype(np.float32).reshape(shape)
    return centred * scales.astype(np.float32).reshape(shape)


def _values_name(node: ir.Node) -> str:
    return f"{_name(node.inputs[0]).removesuffix('_codes')}_values"


def _in_engine(node: ir.Node) -> bool:
    if node.op_type != "Conv":
        return True
    dequantize = producer(node.inputs[1], "DequantizeLinear")
    weight = constant(node.inputs[1] if dequantize is None else dequantize.inputs[0])
    if weight is None or weight.ndim != 4:
        return False
    return integer(node, "group", 1) == 1 or weight.shape[1] == 1


def _float_convolution(model: ir.Model, node: ir.Node, operands: list[ir.Node]) -> bool:
    for index, operand in enumerate(operands, start=1):
        codes, scales, zeros = (constant(value) for value in operand.inputs)
        if codes is None or scales is None or zeros is None:
            return False
        values = add_initializer(
            model, _values_name(operand), _dequantized(codes, scales, zeros, 0)
        )
        node.replace_input_with(index, values)
    return True


def _convolution(
    model: ir.Model,
    node: ir.Node,
    data: ir.Node,
    weight: ir.Node,
    bias: list[ir.Node],
    scales: npt.NDArray[Any],
) -> bool:
    codes = constant(weight.inputs[0])
    if codes is None:
        return False
    attributes = {k: node.attributes[k].value for k in _ATTRIBUTES if k in node.attributes}
    value = insert_before(
        model, node, "ConvInteger",
        [data.inputs[0], weight.inputs[0], data.inputs[2], _weight_zero(model)],
        attributes, name=f"{node.outputs[0].name}_integer",
    )  # fmt: skip
    _scaled(model, node, value, data, bias, scales, (1, -1, *([1] * (codes.ndim - 2))))
    return True


def _matrix_product(
    model: ir.Model,
    node: ir.Node,
    data: ir.Node,
    weight: ir.Node,
    bias: list[ir.Node],
    scales: npt.NDArray[Any],
) -> bool:
    codes = constant(weight.inputs[0])
    plain = all(
        node.attributes[name].as_float() == 1.0
        for name in ("alpha", "beta")
        if name in node.attributes
    )
    if codes is None or not plain or not integer(node, "transB", 0) or integer(node, "transA", 0):
        return False
    transposed = add_initializer(
        model, f"{_name(weight.inputs[0])}_transposed", np.ascontiguousarray(codes.T)
    )
    value = insert_before(
        model, node, "MatMulInteger",
        [data.inputs[0], transposed, data.inputs[2], _weight_zero(model)],
        name=f"{node.outputs[0].name}_integer",
    )  # fmt: skip
    _scaled(model, node, value, data, bias, scales, (1, -1))
    return True


def _scaled(
    model: ir.Model,
    node: ir.Node,
    value: ir.Value,
    data: ir.Node,
    bias: list[ir.Node],
    scales: npt.NDArray[Any],
    shape: tuple[int, ...],
) -> None:
    """What turns an int32 sum into the layer's float output, in the layer's place."""
    name = node.outputs[0].name
    for operand in bias:
        codes = constant(operand.inputs[0])
        assert codes is not None
        planes = add_initializer(model, f"{_name(operand.inputs[0])}_planes", codes.reshape(shape))
        value = insert_before(model, node, "Add", [value, planes], name=f"{name}_biased")
    value = insert_before(
        model, node, "Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}_float"
    )
    data_scale = constant(data.inputs[1])
    assert data_scale is not None
    steps = (scales.astype(np.float32) * np.float32(data_scale)).reshape(shape)
    step = add_initializer(model, f"{name}_steps", steps)
    replace_node(model, node, "Mul", [value, step])


def _weight_zero(model: ir.Model) -> ir.Value:
    # Without this input DeepSparse's engine asserts.
    return add_initializer(model, "weight_zero_point", np.array(0, np.int8))


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
