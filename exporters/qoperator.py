"""Pass: QuantizeLinear/DequantizeLinear pairs around float operators become integer operators.

    DQ, DQ, [DQ] -> Conv -> [Relu | Clip] -> Q    QLinearConv
    DQ, DQ, [DQ] -> Gemm -> [Relu | Clip] -> [Q]  QGemm, or a 1x1 QLinearConv
    DQ, DQ -> Add -> [Relu | Clip] -> Q           QLinearAdd
    DQ... -> Concat -> Q                          QLinearConcat
    DQ -> GlobalAveragePool -> Q                  QLinearGlobalAveragePool
    DQ -> AveragePool -> Q                        QLinearAveragePool
    DQ -> MaxPool | Reshape | ... -> Q, same grid the operator itself, on codes

A ReLU needs no operator: with a zero point of 0 the uint8 output saturates at zero by itself. Codes
and scales are taken over as they are, nothing is rounded again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from obc_deploy.exporters.edit import (
    add_initializer,
    constant,
    drop_dead,
    insert_before,
    only_user,
    producer,
    replace_node,
)

MICROSOFT = "com.microsoft"
_SAME_CODES = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity"}
)
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _attributes(node: ir.Node, names: Sequence[str] | None = None) -> dict[str, Any]:
    kept = node.attributes.values() if names is None else (
        node.attributes[name] for name in names if name in node.attributes
    )  # fmt: skip
    return {attribute.name: attribute.value for attribute in kept}


def _operand(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(codes, scale, zero point) behind a dequantized value."""
    node = producer(value, "DequantizeLinear")
    if node is None or any(item is None for item in node.inputs[:3]) or len(node.inputs) < 3:
        return None
    return node.inputs[0], node.inputs[1], node.inputs[2]  # type: ignore[return-value]


def _one_scale(
    model: ir.Model, weight: tuple[ir.Value, ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """A weight's grid as scalars where all output channels share it.

    DeepSparse has integer kernels for scalar weight scales only; others accept both.
    """
    scales, zeros = constant(weight[1]), constant(weight[2])
    if scales is None or zeros is None or scales.ndim == 0:
        return weight
    if (scales != scales[0]).any() or (zeros != zeros[0]).any():
        return weight
    scale = add_initializer(model, f"{weight[1].name}_scalar", scales[0].reshape(()))
    zero = add_initializer(model, f"{weight[2].name}_scalar", zeros[0].reshape(()))
    return weight[0], scale, zero


def _clip_is_saturation(node: ir.Node, scale: float, zero_point: int, code_max: int) -> bool:
    """Whether the output grid cannot hold a value that the rectifier would have changed."""
    if zero_point != 0:
        return False
    if node.op_type == "Relu":
        return True
    low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    high = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if low is None or float(low) != 0.0:
        return False
    return high is None or scale * code_max <= float(high) * (1 + 1e-6)


def _code_max(quantize: ir.Node) -> int:
    """Largest uint8 code that leaves a QuantizeLinear, with the Clip of narrower grids."""
    clip = only_user(quantize.outputs[0])
    if clip is None or clip.op_type != "Clip" or len(clip.inputs) < 3:
        return 255
    top = constant(clip.inputs[2])
    return 255 if top is None else int(top)


def _behind_rectifier(quantize: ir.Node) -> ir.Node | None:
    """What a QuantizeLinear takes the output of, through a rectifier that saturation replaces."""
    source = quantize.inputs[0]
    if source is None:
        return None
    node = source.producer()
    if node is None or node.op_type not in {"Relu", "Clip"}:
        return node if node is not None and only_user(source) is quantize else None
    scale, zero_point = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    if scale is None or zero_point is None or only_user(source) is not quantize:
        return None
    if zero_point.dtype != np.uint8:
        return None
    if not _clip_is_saturation(node, float(scale), int(zero_point), _code_max(quantize)):
        return None
    inner = node.inputs[0]
    if inner is None or only_user(inner) is not node:
        return None
    return inner.producer()


def _bias_codes(value: ir.Value | None) -> tuple[bool, ir.Value | None]:
    """(usable, codes) of a bias operand; no bias is usable."""
    if value is None:
        return True, None
    operand = _operand(value)
    return (True, operand[0]) if operand is not None else (False, None)


def _fuse_convolution(model: ir.Model, quantize: ir.Node, node: ir.Node) -> bool:
    data, weight = _operand(node.inputs[0]), _operand(node.inputs[1])
    usable, bias = _bias_codes(node.inputs[2] if len(node.inputs) > 2 else None)
    if data is None or weight is None or not usable:
        return False
    inputs = [*data, *_one_scale(model, weight), quantize.inputs[1], quantize.inputs[2]]
    if bias is not None:
        inputs.append(bias)
    fused = replace_node(
        model, quantize, "QLinearConv", inputs, _attributes(node, _CONV_ATTRIBUTES)
    )
    fused.name = node.name
    return True


def _fuse_gemm(
    model: ir.Model, node: ir.Node, quantize: ir.Node | None, *, as_convolution: bool
) -> bool:
    data, weight = _operand(node.inputs[0]), _operand(node.inputs[1])
    usable, bias = _bias_codes(node.inputs[2] if len(node.inputs) > 2 else None)
    transposed = node.attributes.get("transB")
    if (
        data is None
        or weight is None
        or not usable
        or transposed is None
        or not transposed.as_int()
    ):
        return False
    for name in ("alpha", "beta"):
        if name in node.attributes and node.attributes[name].as_float() != 1.0:
            return False
    if as_convolution:
        return quantize is not None and _gemm_as_convolution(
            model, node, quantize, data, weight, bias
        )
    inputs: list[ir.Value | None] = [*data, *weight, bias]
    if quantize is not None:
        inputs += [quantize.inputs[1], quantize.inputs[2]]
    elif bias is None:
        inputs.pop()
    fused = replace_node(model, quantize or node, "QGemm", inputs, {"transB": 1}, domain=MICROSOFT)
    fused.name = node.name
    return True


def _gemm_as_convolution(
    model: ir.Model,
    node: ir.Node,
    quantize: ir.Node,
    data: tuple[ir.Value, ir.Value, ir.Value],
    weight: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value | None,
) -> bool:
    codes = constant(weight[0])
    if codes is None:
        return False
    rows, cols = codes.shape
    planes = add_initializer(model, f"{weight[0].name}_1x1", codes.reshape(rows, cols, 1, 1))
    to_planes = add_initializer(
        model, f"to_planes_{cols}", np.array([-1, cols, 1, 1], dtype=np.int64)
    )
    to_rows = add_initializer(model, f"to_rows_{rows}", np.array([-1, rows], dtype=np.int64))
    name = quantize.outputs[0].name
    image = insert_before(model, quantize, "Reshape", [data[0], to_planes], name=f"{name}_planes")
    grid = _one_scale(model, weight)[1:]
    inputs = [image, data[1], data[2], planes, *grid, quantize.inputs[1], quantize.inputs[2]]
    if bias is not None:
        inputs.append(bias)
    product = insert_before(
        model, quantize, "QLinearConv", inputs, {"kernel_shape": [1, 1]}, name=f"{name}_1x1"
    )
    producer_node = product.producer()
    assert producer_node is not None
    producer_node.name = node.name
    replace_node(model, quantize, "Reshape", [product, to_rows])
    return True


def _fuse_add(model: ir.Model, quantize: ir.Node, node: ir.Node) -> bool:
    left, right = _operand(node.inputs[0]), _operand(node.inputs[1])
    if (
        left is None
        or right is None
        or constant(left[0]) is not None
        or constant(right[0]) is not None
    ):
        return False
    replace_node(
        model, quantize, "QLinearAdd",
        [*left, *right, quantize.inputs[1], quantize.inputs[2]], domain=MICROSOFT,
    ).name = node.name  # fmt: skip
    return True


def _fuse_concat(model: ir.Model, quantize: ir.Node, node: ir.Node) -> bool:
    operands = [_operand(value) for value in node.inputs]
    if any(operand is None for operand in operands):
        return False
    flat = [item for operand in operands if operand is not None for item in operand]
    replace_node(
        model, quantize, "QLinearConcat", [quantize.inputs[1], quantize.inputs[2], *flat],
        _attributes(node, ("axis",)), domain=MICROSOFT,
    ).name = node.name  # fmt: skip
    return True


def _fuse_pool(model: ir.Model, quantize: ir.Node, node: ir.Node) -> bool:
    data = _operand(node.inputs[0])
    if data is None:
        return False
    inputs = [*data, quantize.inputs[1], quantize.inputs[2]]
    if node.op_type == "GlobalAveragePool":
        fused = replace_node(
            model,
            quantize,
            "QLinearGlobalAveragePool",
            inputs,
            {"channels_last": 0},
            domain=MICROSOFT,
        )
    else:
        names = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
        fused = replace_node(
            model,
            quantize,
            "QLinearAveragePool",
            inputs,
            _attributes(node, names),
            domain=MICROSOFT,
        )
    fused.name = node.name
    return True


def _same_constant(left: ir.Value | None, right: ir.Value | None) -> bool:
    if left is right:
        return True
    first, second = constant(left), constant(right)
    return first is not None and second is not None and np.array_equal(first, second)


def _move_onto_codes(model: ir.Model, quantize: ir.Node, node: ir.Node) -> bool:
    data = _operand(node.inputs[0])
    if data is None:
        return False
    if not (
        _same_constant(data[1], quantize.inputs[1]) and _same_constant(data[2], quantize.inputs[2])
    ):
        return False
    fused = replace_node(
        model, quantize, node.op_type, [data[0], *node.inputs[1:]], _attributes(node)
    )
    fused.name = node.name
    return True


def to_qoperators(
    model: ir.Model,
    *,
    linear_as_convolution: bool,
    operators: Collection[str],
) -> int:
    """Fuse every pattern above; returns the number of integer operators made.

    Args:
        model: changed in place.
        operators: float operators to give an integer form; others stay between DQ and Q.
        linear_as_convolution: write Gemm as a 1x1 QLinearConv on (n, cols, 1, 1) instead of QGemm.
    """
    made = 0
    for quantize in list(model.graph):
        if quantize.op_type != "QuantizeLinear":
            continue
        node = _behind_rectifier(quantize)
        if node is None or node.op_type not in operators:
            continue
        plain = quantize.inputs[0] is node.outputs[0]
        fused = False
        if node.op_type == "Conv":
            fused = _fuse_convolution(model, quantize, node)
        elif node.op_type == "Gemm":
            fused = _fuse_gemm(model, node, quantize, as_convolution=linear_as_convolution)
        elif node.op_type == "Add":
            fused = _fuse_add(model, quantize, node)
        elif plain and node.op_type == "Concat":
            fused = _fuse_concat(model, quantize, node)
        elif plain and node.op_type in {"GlobalAveragePool", "AveragePool"}:
            fused = _fuse_pool(model, quantize, node)
        elif plain and node.op_type in _SAME_CODES:
            fused = _move_onto_codes(model, quantize, node)
        made += int(fused)
        if fused:
            drop_dead(model)
    if not linear_as_convolution:
        for node in list(model.graph):
            if node.op_type == "Gemm" and not node.domain and _fuse_gemm(
                model, node, None, as_convolution=False
            ):  # fmt: skip
                made += 1
    drop_dead(model)
    return made
