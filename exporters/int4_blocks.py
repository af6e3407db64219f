"""Pass: weights of linear layers in blocks of columns become INT4, and lie as products read them.

    MatMul(x, Transpose(DequantizeLinear(codes, scale, axis=1)))
        MatMul(x, DequantizeLinear(codes, scale, axis=0))
    Gemm(x, DequantizeLinear(codes, scale, axis=1), b, transB=1)
        Add(MatMul(x, DequantizeLinear(codes, scale, axis=0)), b)

Codes were (outputs, inputs) of int8 and are (inputs, outputs) of INT4; scales turn along.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from obc_deploy.errors import ExportError
from obc_deploy.exporters.edit import (
    add_initializer,
    constant,
    insert_before,
    integer,
    only_user,
    replace_node,
)


def to_int4_blocks(model: ir.Model) -> int:
    """Rewrite them in place; returns how many there are.

    Raises:
        ExportError: something but a product reads such a weight.
    """
    made = 0
    for node in list(model.graph):
        block = integer(node, "block_size", 0)
        codes, scale = (constant(value) for value in (*node.inputs[:2], None, None)[:2])
        if node.op_type != "DequantizeLinear" or not block or codes is None or scale is None:
            continue
        name = node.inputs[0].name if node.inputs[0] is not None else node.name
        turned = node.outputs[0]
        reader = only_user(turned)
        if reader is not None and reader.op_type == "Transpose":
            turned = reader.outputs[0]
            products = [use.node for use in turned.uses()]
            fits = all(product.op_type == "MatMul" for product in products)
        else:
            products = [use.node for use in turned.uses()]
            fits = all(_turns_weight(product) for product in products)
        if not fits:
            raise ExportError(
                f"'{name}' has its weights in blocks of INT4, and is no plain product; compress "
                "that layer as 'w8a8' or leave it dense"
            )
        parts = [
            add_initializer(
                model, f"{name}_int4", np.ascontiguousarray(codes.T).astype(ml_dtypes.int4)
            ),
            add_initializer(model, f"{name}_scale", np.ascontiguousarray(scale.T)),
        ]
        for product in products:
            _rewrite(model, product, parts, block)
        made += 1
    return made


def _turns_weight(node: ir.Node) -> bool:
    scales = [node.attributes.get(name) for name in ("alpha", "beta")]
    return (
        node.op_type == "Gemm"
        and not integer(node, "transA", 0)
        and bool(integer(node, "transB", 0))
        and all(item is None or item.as_float() == 1.0 for item in scales)
    )


def _rewrite(model: ir.Model, product: ir.Node, parts: Sequence[ir.Value], block: int) -> None:
    weight = insert_before(
        model, product, "DequantizeLinear", parts, {"axis": 0, "block_size": block}
    )
    weight.shape, weight.type = parts[0].shape, ir.TensorType(ir.DataType.FLOAT)
    if product.op_type == "MatMul":
        product.replace_input_with(1, weight)
        return
    bias = product.inputs[2] if len(product.inputs) > 2 else None
    if bias is None:
        replace_node(model, product, "MatMul", [product.inputs[0], weight])
        return
    sums = insert_before(model, product, "MatMul", [product.inputs[0], weight])
    sums.shape, sums.type = product.outputs[0].shape, product.outputs[0].type
    replace_node(model, product, "Add", [sums, bias])
