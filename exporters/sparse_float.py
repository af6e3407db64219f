"""Pass: float layers with many zeros, anywhere, become sparse ones, where that is cheaper.

    Conv [-> Add(other)] [-> Relu or Clip]      SparseConvolutionFloat
    Gemm(transB), MatMul [-> Relu or Clip]      SparseLinearFloat

For networks, or layers, that may not be quantized. Only non-zero weights are stored, each with its
place; what follows the layer is computed before its results leave the registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from obc_deploy.exporters.edit import (
    add_initializer,
    constant,
    integer,
    only_user,
    replace_node,
)
from obc_deploy.exporters.sparse_cost import FEW_ROWS, Work, nanoseconds
from obc_deploy.runtimes.sparse import DOMAIN, DOMAIN_VERSION

LEAST_ZEROS = 0.25
"""Fraction of zero weights from which a layer counts as sparse: dense ones have a few by chance."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StoredEntries:
    """The non-zero weights of one layer.

    Attributes:
        values: (entries,) float32.
        mask: (outputs, ceil(places of one / 8)) uint8: which places are stored, in order; place
            kernel position · channels + input channel is bit place % 8, from the lowest on, of byte
            place / 8.
        places: weights that there would be without zeros.
    """

    values: Array
    mask: Array
    places: int

    @property
    def zeros(self) -> float:
        """Fraction of weights that need not be stored."""
        return 1.0 - len(self.values) / max(self.places, 1)


def stored_entries(weight: Array) -> StoredEntries:
    """The non-zeros of float weights (outputs, channels, height, width) or (outputs, features)."""
    rows = weight.reshape(len(weight), -1)
    if weight.ndim == 4:
        rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    kept = rows != 0
    return StoredEntries(
        values=np.ascontiguousarray(rows[kept], dtype=np.float32),
        mask=np.packbits(kept, axis=1, bitorder="little"),
        places=kept.size,
    )


@dataclass(frozen=True)
class _Ending:
    """What follows a layer and becomes part of it.

    Attributes:
        nodes: the layer's followers, the last of which computes what the sparse layer will.
        residual: what is added before clipping.
        lower: of the clipped result; None without a bound.
        upper: of the clipped result; None without a bound.
    """

    nodes: tuple[ir.Node, ...] = ()
    residual: ir.Value | None = None
    lower: float | None = None
    upper: float | None = None


def float_zeros(model: ir.Model) -> dict[str, float]:
    """The fraction of zeros of each float layer's constant weights, by the value it computes."""
    found: dict[str, float] = {}
    for node in model.graph:
        weight = _weight(node)
        if weight is not None:
            found[node.outputs[0].name or ""] = _zeros(weight)
    return found


def _zeros(weight: Array) -> float:
    return 1.0 - np.count_nonzero(weight) / max(weight.size, 1)


def to_sparse_floats(model: ir.Model) -> list[tuple[str, float]]:
    """Rewrite them in place; returns each one's output and fraction of weights not stored.

    Args:
        model: with sizes on its values.
    """
    made = []
    for node in list(model.graph):
        weight = _weight(node)
        if weight is None or _zeros(weight) < LEAST_ZEROS:
            continue
        given = node.inputs[2] if len(node.inputs) > 2 else None
        bias = constant(given)
        if given is not None and (bias is None or bias.size != len(weight)):
            continue
        stored = stored_entries(weight)
        attributes = _convolution(node, weight, stored)
        operator = "SparseConvolutionFloat"
        if node.op_type != "Conv":
            attributes = _linear(node, weight, stored)
            operator = "SparseLinearFloat"
        if attributes is None:
            continue
        ending = _ending(node)
        attributes |= {
            name: value
            for name, value in (("lower", ending.lower), ("upper", ending.upper))
            if value is not None
        }
        held = node.inputs[1]
        name = held.name if held is not None and held.name else node.name
        parts = [
            add_initializer(model, f"{name}_values", stored.values),
            add_initializer(model, f"{name}_mask", stored.mask),
        ]
        more: list[ir.Value | None] = []
        if bias is not None:
            more.append(add_initializer(model, f"{name}_bias", bias.reshape(-1)))
        if ending.residual is not None:
            more = [*(more or [None]), ending.residual]
        last = ending.nodes[-1] if ending.nodes else node
        fresh = replace_node(
            model, last, operator, [node.inputs[0], *parts, *more], attributes, domain=DOMAIN
        )
        for follower in reversed((node, *ending.nodes[:-1]) if ending.nodes else ()):
            model.graph.remove(follower, safe=True)
        model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        made.append((fresh.outputs[0].name or "", stored.zeros))
    return made


def _weight(node: ir.Node) -> Array | None:
    """A float layer's weights as (outputs, ...), or None where the node is no such layer."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in {"Conv", "Gemm", "MatMul"}:
        return None
    weight = constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or constant(node.inputs[0]) is not None:
        return None
    if node.op_type == "Conv":
        return weight if weight.ndim == 4 and integer(node, "group", 1) == 1 else None
    if weight.ndim != 2:
        return None
    if node.op_type == "MatMul":
        return weight.T
    scales = [node.attributes.get(name) for name in ("alpha", "beta")]
    if integer(node, "transA", 0) or any(one is not None and one.as_float() != 1 for one in scales):
        return None
    return weight if integer(node, "transB", 0) else weight.T


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return default if attribute is None else [int(item) for item in attribute.as_ints()]


def _sizes(value: ir.Value | None, rank: int) -> list[int] | None:
    """A value's sizes; an open first one, the batch's, counts as one."""
    if value is None or value.shape is None or len(value.shape) != rank:
        return None
    sizes = list(value.shape)
    if not all(isinstance(size, int) for size in sizes[1:]):
        return None
    return [size if isinstance(size, int) else 1 for size in sizes]


def _convolution(node: ir.Node, weight: Array, stored: StoredEntries) -> dict[str, Any] | None:
    """The attributes of the sparse convolution, or None where there is none or it gains nothing."""
    if node.op_type != "Conv":
        return None
    kernel = list(weight.shape[2:])
    strides = _ints(node, "strides", [1, 1])
    pads = _ints(node, "pads", [0, 0, 0, 0])
    automatic = node.attributes.get("auto_pad")
    if automatic is not None and automatic.as_string() not in ("", "NOTSET"):
        return None
    if strides not in ([1, 1], [2, 2]) or _ints(node, "dilations", [1, 1]) != [1, 1]:
        return None
    if any(pad >= size for pad, size in zip(pads, kernel * 2, strict=True)):
        return None
    given, result = _sizes(node.inputs[0], 4), _sizes(node.outputs[0], 4)
    if given is None or result is None:
        return None
    work = Work.of_float_convolution(
        images=result[0], in_size=(given[2], given[3]), out_size=(result[2], result[3]),
        channels=given[1], outputs=result[1], positions=math.prod(kernel),
        entries=len(stored.values),
    )  # fmt: skip
    if nanoseconds("SparseConvolutionFloat", work) >= nanoseconds("Conv", work):
        return None
    return {"channels": given[1], "kernel_shape": kernel, "strides": strides, "pads": pads}


def _linear(node: ir.Node, weight: Array, stored: StoredEntries) -> dict[str, Any] | None:
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) == 0:
        return None
    if node.op_type == "Gemm" and len(source.shape) != 2:
        return None
    sizes = [size if isinstance(size, int) else 1 for size in list(source.shape)[:-1]]
    rows = math.prod(sizes)
    work = Work.of_linear(rows, weight.shape[1], weight.shape[0], len(stored.values))
    kind = "rows" if rows >= FEW_ROWS else "row"
    if nanoseconds(f"SparseLinearFloat {kind}", work) >= nanoseconds(f"Gemm {kind}", work):
        return None
    return {"features": weight.shape[1]}


def _clip(node: ir.Node) -> tuple[float | None, float | None] | None:
    """The bounds of a Relu or Clip; None of anything else."""
    if node.op_type == "Relu":
        return 0.0, None
    if node.op_type != "Clip":
        return None
    bounds: list[float | None] = [None, None]
    for place in (1, 2):
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is None:
            continue
        array = constant(value)
        if array is None or array.size != 1:
            return None
        bounds[place - 1] = float(array.reshape(()))
    return bounds[0], bounds[1]


def _ending(node: ir.Node) -> _Ending:
    """What the sparse layer can compute beside the layer itself."""
    ending = _Ending()
    follower = only_user(node.outputs[0])
    if node.op_type == "Conv" and follower is not None and follower.op_type == "Add":
        other = next((v for v in follower.inputs if v is not node.outputs[0]), None)
        same = (
            other is not None and other.const_value is None
            and other.shape is not None and other.shape == node.outputs[0].shape
        )  # fmt: skip
        if same:
            ending = _Ending((follower,), other)
            follower = only_user(follower.outputs[0])
    bounds = None if follower is None else _clip(follower)
    if (
        follower is not None
        and bounds is not None
        and follower.inputs[0] is (ending.nodes[-1] if ending.nodes else node).outputs[0]
    ):
        ending = _Ending((*ending.nodes, follower), ending.residual, *bounds)
    return ending
