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


def whole_max_pools_to_reduce_max(model: ir.Model) -> int:
    """Rewrite MaxPool over all of both spatial axes as ReduceMax; returns how many there were.

    DeepSparse's pooling kernel fails an assertion where a sparse network pools 2x2 to 1x1. It has
    no kernel for ReduceMax and runs such a network by its fallback, which the audit reports: slow,
    but an answer.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "MaxPool" or node.domain or len(node.outputs) != 1:
            continue
        source, kernel = node.inputs[0], node.attributes.get("kernel_shape")
        if source is None or source.shape is None or len(source.shape) != 4 or kernel is None:
            continue
        pads = node.attributes.get("pads")
        if list(source.shape)[2:] != list(kernel.as_ints()) or (pads and any(pads.as_ints())):
            continue
        axes = add_initializer(model, "spatial_axes", np.array([2, 3], dtype=np.int64))
        replace_node(model, node, "ReduceMax", [source, axes], {"keepdims": 1})
        count += 1
    return count
