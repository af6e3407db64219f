"""Passes on codes that leave fewer float operators between integer ones.

DQ -> Q, same grid          nothing at all
DQ -> Pad with zeros        Pad of the codes with their zero point -> DQ
"""

from __future__ import annotations

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


def _equal(left: ir.Value | None, right: ir.Value | None) -> bool:
    first, second = constant(left), constant(right)
    return first is not None and second is not None and np.array_equal(first, second)


def drop_requantizations(model: ir.Model) -> int:
    """Let readers of a value that was dequantized and quantized on one grid read the codes."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or node.domain or len(node.inputs) < 3:
            continue
        source = producer(node.inputs[0], "DequantizeLinear")
        if source is None or len(source.inputs) < 3 or node.outputs[0].is_graph_output():
            continue
        codes = source.inputs[0]
        if codes is None or not all(
            _equal(source.inputs[i], node.inputs[i]) for i in (1, 2)
        ):  # fmt: skip
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], codes)
        count += 1
    drop_dead(model)
    return count


def pads_onto_codes(model: ir.Model) -> int:
    """Pad codes with their zero point instead of floats with zeros; returns how many there were."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Pad" or node.domain or node.inputs[0] is None:
            continue
        mode = node.attributes.get("mode")
        if mode is not None and mode.as_string() != "constant":
            continue
        fill = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
        if (len(node.inputs) > 2 and node.inputs[2] is not None and fill is None) or (
            fill is not None and float(fill) != 0.0
        ):
            continue
        source = producer(node.inputs[0], "DequantizeLinear")
        if source is None or len(source.inputs) < 3 or only_user(node.inputs[0]) is not node:
            continue
        zero = constant(source.inputs[2])
        if zero is None or zero.size != 1:
            continue
        name = node.outputs[0].name or node.name
        again = add_initializer(model, f"{name}_zero_point", zero.reshape(()))
        rest = list(node.inputs[3:])
        padded = insert_before(
            model, node, "Pad", [source.inputs[0], node.inputs[1], again, *rest],
            {"mode": "constant"}, name=f"{name}_codes",
        )  # fmt: skip
        codes = source.inputs[0]
        padded.shape = node.outputs[0].shape
        padded.type = None if codes is None else codes.type
        replace_node(
            model, node, "DequantizeLinear", [padded, *source.inputs[1:]],
            {k: v.value for k, v in source.attributes.items()},
        )  # fmt: skip
        count += 1
    drop_dead(model)
    return count
