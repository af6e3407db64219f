"""Pass: a mean over both spatial axes becomes GlobalAveragePool, for which kernels exist."""

from __future__ import annotations

import onnx_ir as ir

from obc_deploy.exporters.edit import constant_ints, insert_before, integer, replace_node


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
