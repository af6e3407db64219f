"""Passes: pools over whole images in the form for which a runtime has kernels that work."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from obc_deploy.exporters.edit import (
    add_initializer,
    constant_ints,
    insert_before,
    integer,
    replace_node,
)


def means_to_global_average_pools(model: ir.Model) -> int:
    """Rewrite ReduceMean over axes (2, 3) of 4-d values; returns how many there were."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or node.domain:
            continue
        source = node.inputs[0]
        axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
        if source is None or source.shape is None or len(source.shape) != 4 or axes is None:
            continue
        if sorted(axis % 4 for axis in axes) != [2, 3]:
            continue
        count += 1
        if integer(node, "keepdims", 1):
            replace_node(model, node, "GlobalAveragePool", [source])
            continue
        pooled = insert_before(model, node, "GlobalAveragePool", [source])
        channels = source.shape[1]
        pooled.shape = ir.Shape([source.shape[0], channels, 1, 1])
        pooled.type = source.type
        replace_node(model, node, "Flatten", [pooled], {"axis": 1})
    return count


def keep_max_pools_in_float(model: ir.Model) -> int:
    """Put a maximum with the lowest float after every MaxPool; returns how many there were.

    DeepSparse moves the QuantizeLinear after a MaxPool ahead of it, to pool codes, and then fails
    assertions at load: beside a sparse convolution where the pool has width and step 2, and in
    front of a MatMulInteger whether or not anything is sparse. Past a maximum it moves nothing; the
    pool stays in its engine, in float, with equal outputs and almost as fast. Nothing is done where
    nothing is quantized.
    """
    if not any(node.op_type == "QuantizeLinear" for node in model.graph):
        return 0
    count = 0
    for node in list(model.graph):
        if node.op_type != "MaxPool" or node.domain or len(node.outputs) != 1:
            continue
        pooled = insert_before(model, node, "MaxPool", node.inputs, node.attributes)
        pooled.shape, pooled.type = node.outputs[0].shape, node.outputs[0].type
        lowest = np.array(np.finfo(np.float32).min, dtype=np.float32)
        replace_node(model, node, "Max", [pooled, add_initializer(model, "lowest_float", lowest)])
        count += 1
    return count
