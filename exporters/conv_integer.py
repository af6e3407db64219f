"""Pass: a convolution with one weight scale a channel becomes ConvInteger and a multiplication.

    DQ, DQ, DQ -> Conv        Q codes -> ConvInteger -> Add(bias codes) -> Cast -> Mul(scales)

DeepSparse has no QLinearConv kernel for per-channel scales and would hand the graph to its fallback;
this form stays in its engine, at the price of a multiplication an output value. What follows (ReLU,
QuantizeLinear) stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from obc_deploy.exporters.edit import (
    add_initializer,
    constant,
    drop_dead,
    insert_before,
    producer,
    replace_node,
)

_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def to_conv_integer(model: ir.Model) -> int:
    """Rewrite every Conv whose weight scales differ; returns how many there were."""
    made = 0
    for node in list(model.graph):
        if node.op_type != "Conv" or node.domain:
            continue
        operands = [producer(value, "DequantizeLinear") for value in node.inputs]
        if len(operands) < 2 or any(operand is None for operand in operands):
            continue
        data, weight = operands[0], operands[1]
        assert data is not None
        assert weight is not None
        scales, data_scale = constant(weight.inputs[1]), constant(data.inputs[1])
        if scales is None or data_scale is None or scales.ndim == 0 or (scales == scales[0]).all():
            continue
        zero = constant(weight.inputs[2])
        if zero is None or zero.any():
            continue
        name = node.outputs[0].name
        rank = len(constant(weight.inputs[0]).shape)  # type: ignore[union-attr]
        shape = (1, -1, *([1] * (rank - 2)))
        weight_zero = add_initializer(model, "weight_zero_point", np.array(0, np.int8))
        attributes = {k: node.attributes[k].value for k in _ATTRIBUTES if k in node.attributes}
        value = insert_before(
            model, node, "ConvInteger",
            [data.inputs[0], weight.inputs[0], data.inputs[2], weight_zero],
            attributes, name=f"{name}_integer",
        )  # fmt: skip
        if len(operands) > 2 and operands[2] is not None:
            bias = constant(operands[2].inputs[0])
            assert bias is not None
            codes = add_initializer(model, f"{operands[2].inputs[0].name}_planes", bias.reshape(shape))  # type: ignore[union-attr]
            value = insert_before(model, node, "Add", [value, codes], name=f"{name}_biased")
        value = insert_before(
            model, node, "Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}_float"
        )
        steps = (scales.astype(np.float32) * np.float32(data_scale)).reshape(shape)
        step = add_initializer(model, f"{weight.inputs[1].name}_output", steps)  # type: ignore[union-attr]
        replace_node(model, node, "Mul", [value, step])
        made += 1
    drop_dead(model)
    return made
