"""Pass: write a graph for an older operator set, for the operators whose form changed.

onnx's own converter has no way down for most of these; a runtime that only knows the older set falls
back or refuses. Anything with no older form here is named in the error.
"""

from __future__ import annotations

import onnx_ir as ir

from obc_deploy.errors import ExportError
from obc_deploy.exporters.edit import constant_ints

_AXES_BECAME_INPUT = frozenset(
    {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare",
     "ReduceLogSum", "ReduceLogSumExp"}
)  # fmt: skip
_NEW_IN_18 = frozenset({"BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "Mish", "Col2Im", "CenterCropPad"})


def lower_opset(model: ir.Model, opset: int) -> None:
    """Rewrite an opset-18 graph for `opset` (17 or 18), in place.

    Raises:
        ExportError: an operator of the graph has no form in the older set.
    """
    if opset >= 18:
        return
    if opset != 17:
        raise ExportError(f"cannot write operator set {opset}; 17 and 18 work")
    for node in model.graph:
        if node.domain:
            continue
        if node.op_type in _NEW_IN_18:
            raise ExportError(f"'{node.op_type}' ('{node.name}') does not exist in operator set 17")
        if node.op_type in _AXES_BECAME_INPUT:
            axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
            if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
                raise ExportError(f"'{node.name}' reduces over computed axes, which needs operator set 18")
            node.attributes.pop("noop_with_empty_axes", None)
            if axes is not None:
                node.attributes["axes"] = ir.AttrInt64s("axes", axes)
                node.resize_inputs(1)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
        elif node.op_type == "Pad" and len(node.inputs) > 3 and node.inputs[3] is not None:
            raise ExportError(f"'{node.name}' pads chosen axes, which needs operator set 18")
    model.graph.opset_imports[""] = 17
