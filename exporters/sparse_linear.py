"""Pass: fully connected layers with blocks of zeros become sparse ones, where that is cheaper.

QGemm(transB) with a quantized output                     SparseLinear
QGemm(transB) with a float output                         SparseLinearDequantize
QLinearMatMul                                             SparseLinear
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from obc_deploy.exporters.blocked_forms import grid_of, sums_fit
from obc_deploy.exporters.edit import add_initializer, constant, integer, replace_node
from obc_deploy.exporters.qoperator import MICROSOFT
from obc_deploy.exporters.sparse_blocks import StoredBlocks, stored_blocks
from obc_deploy.exporters.sparse_cost import Work, nanoseconds
from obc_deploy.runtimes.sparse import DOMAIN, DOMAIN_VERSION

COLD = 1.5
"""How much longer a dense layer takes in a network, whose layers drive its weights out of the
caches, than by itself. Those of VGG-16 took 2.6, 2 and 2 times as long, and sparse 1.5, 1.2 and 1.8
times: this is the mean ratio."""

Array = npt.NDArray[Any]


def _rows(source: ir.Value | None) -> int | None:
    """Rows that the layer computes for one inference; an open size counts as one."""
    if source is None or source.shape is None or len(source.shape) == 0:
        return None
    return math.prod(size if isinstance(size, int) else 1 for size in list(source.shape)[:-1])


def _cheaper(rows: int, codes: Array, stored: StoredBlocks) -> bool:
    work = Work.of_linear(rows, codes.shape[1], codes.shape[0], len(stored.values))
    return nanoseconds("SparseLinearDequantize", work) < COLD * nanoseconds("QGemm", work)


def _layer(node: ir.Node) -> tuple[Array, Array, Array | None, int | None] | None:
    """(codes [O, F], scale, bias codes, place of the output's grid) of a layer, or None."""
    is_gemm = node.op_type == "QGemm" and node.domain == MICROSOFT
    is_product = node.op_type == "QLinearMatMul" and not node.domain
    if not (is_gemm or is_product):
        return None
    codes, scale, zero = (constant(node.inputs[place]) for place in (3, 4, 5))
    if codes is None or scale is None or zero is None or zero.any() or codes.dtype != np.int8:
        return None
    if codes.ndim != 2:
        return None
    if is_product:
        return codes.T, scale, None, 6
    alpha = node.attributes.get("alpha")
    if integer(node, "transA", 0) or not integer(node, "transB", 0):
        return None
    if alpha is not None and alpha.as_float() != 1.0:
        return None
    given = node.inputs[6] if len(node.inputs) > 6 else None
    bias = constant(given)
    if given is not None and (bias is None or bias.dtype != np.int32):
        return None
    if bias is not None and bias.size != codes.shape[0]:
        return None
    quantized = len(node.inputs) > 8 and node.inputs[7] is not None
    return codes, scale, None if bias is None else bias.reshape(-1), 7 if quantized else None


def to_sparse_linears(model: ir.Model) -> list[tuple[str, float]]:
    """Rewrite them; returns each one's output and fraction of blocks that are not stored."""
    made = []
    for node in list(model.graph):
        layer = _layer(node)
        if layer is None or constant(node.inputs[0]) is not None:
            continue
        codes, scale, bias, place = layer
        grid, rows = grid_of(*node.inputs[1:3]), _rows(node.inputs[0])
        output = None if place is None else grid_of(*node.inputs[place : place + 2])
        if grid is None or rows is None or (place is not None and output is None):
            continue
        if scale.size not in (1, codes.shape[0]) or not sums_fit(codes, bias, grid.zero_point):
            continue
        stored = stored_blocks(codes)
        if not stored.zeros or not _cheaper(rows, codes, stored):
            continue
        name = node.inputs[3].name if node.inputs[3] is not None else node.name
        steps = scale.reshape(-1).astype(np.float32)
        parts: list[tuple[str, Array | None]] = [
            ("blocks", stored.values),
            ("mask", stored.mask),
            ("scale", steps),
        ]
        attributes: dict[str, Any] = {
            "features": codes.shape[1],
            "input_scale": grid.scale,
            "input_zero_point": grid.zero_point,
        }
        if output is None:
            if bias is not None:
                bias = bias.astype(np.float32) * (np.float32(grid.scale) * steps)
        else:
            attributes["output_scale"] = output.scale
            attributes["output_zero_point"] = output.zero_point
        parts.append(("bias", bias))
        inputs = [
            None if array is None else add_initializer(model, f"{name}_{part}", array)
            for part, array in parts
        ]
        operator = "SparseLinear" if output is not None else "SparseLinearDequantize"
        sparse_inputs = [node.inputs[0], *(inputs if bias is not None else inputs[:-1])]
        fresh = replace_node(model, node, operator, sparse_inputs, attributes, domain=DOMAIN)
        model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        made.append((fresh.outputs[0].name or "", stored.zeros))
    return made
