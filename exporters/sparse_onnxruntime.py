"""A graph becomes one with our sparse operators, which ONNX Runtime runs from our library.

Integer layers skip blocks of zeros, float ones zeros anywhere. Measured costs decide for each
operator, so integer layers without zeros move too where that is faster: small ones gain by what one
operator does at once, and by the conversions that their neighbours save.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from obc_deploy.exporters.blocked_layout import to_blocked_layout
from obc_deploy.exporters.edit import constant, drop_dead, integer
from obc_deploy.exporters.integer_shortcuts import drop_requantizations, pads_onto_codes
from obc_deploy.exporters.operator_costs import costs_of
from obc_deploy.exporters.sparse_blocks import stored_blocks
from obc_deploy.exporters.sparse_float import float_zeros, to_sparse_floats
from obc_deploy.exporters.sparse_linear import to_sparse_linears
from obc_deploy.targets import Processor


@dataclass(frozen=True)
class SparseGraph:
    """What became of a graph.

    Attributes:
        layers: those on our operators, integer ones first: the value each computes, and the
            fraction of its blocks (float layers: weights) that are not stored, 0.0 for some.
        conversions: operators that only convert between plain and blocked tensors.
        zeros: the largest fraction of zero blocks (float layers: weights) of a layer of the graph.
        views: nodes beside the graph that give the codes of blocked values, under the names of
            those in the plain graph.
    """

    layers: tuple[tuple[str, float], ...] = ()
    conversions: int = 0
    zeros: float = 0.0
    views: tuple[onnx.NodeProto, ...] = ()


def zero_blocks(model: ir.Model) -> dict[str, float]:
    """The fraction of zero blocks of each integer layer's weights, by the value it computes."""
    found = {}
    for node in model.graph:
        if node.op_type not in {"QLinearConv", "QGemm", "QLinearMatMul"}:
            continue
        codes = constant(node.inputs[3])
        if codes is None or codes.ndim not in (2, 4) or not codes.size:
            continue
        if integer(node, "group", 1) > 1 and codes.shape[1] == 1:
            continue  # depthwise: no block of it holds four weights
        turned = codes.T if node.op_type == "QLinearMatMul" else codes
        found[node.outputs[0].name or ""] = stored_blocks(turned).zeros
    return found


def to_sparse_operators(model: ir.Model, processor: Processor | None = None) -> SparseGraph:
    """Rewrite a graph for the sparse kernels, each layer as far as it gains from them.

    Args:
        model: QLinearConv and its kin, or float layers, with sizes on their values; changed in
            place.
        processor: whose costs decide what a layer gains; None: this machine's kind.
    """
    with costs_of(processor):
        return _to_sparse_operators(model)


def _to_sparse_operators(model: ir.Model) -> SparseGraph:
    most = max((*zero_blocks(model).values(), *float_zeros(model).values()), default=0.0)
    floats = to_sparse_floats(model)
    drop_requantizations(model)
    pads_onto_codes(model)
    layout = to_blocked_layout(model)
    linears = to_sparse_linears(model)
    drop_dead(model)
    return SparseGraph(
        layers=(*layout.convolutions, *linears, *floats),
        conversions=layout.conversions,
        zeros=most,
        views=layout.views,
    )
