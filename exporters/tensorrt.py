"""An exported graph becomes one that TensorRT 10 and 11 take as a strongly typed network.

    activations    symmetric signed int8, one scale a tensor, QuantizeLinear/DequantizeLinear
    weights        INT8 codes behind DequantizeLinear, one scale an output channel
    4-bit linears  blocks of INT4 behind DequantizeLinear, float activations
    both, --fp8    E4M3 floats in place of INT8
    all else       float16, bfloat16 or float32, as the types of the values say

Zero points are zero throughout, biases float.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from obc_deploy.errors import ExportError
from obc_deploy.exporters.edit import drop_dead
from obc_deploy.exporters.int4_blocks import to_int4_blocks
from obc_deploy.exporters.precision import to_precision
from obc_deploy.exporters.tensorrt_refusals import refusals
from obc_deploy.targets import EightBit, Precision, Target, int4_obstacle, int8_obstacle

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel

BFLOAT16_OPSET = 22
"""The first operator set whose convolutions take bfloat16."""
_CHANGED_SINCE_18 = frozenset({"GroupNormalization", "GridSample", "DFT"})
"""Operators that mean something else in later operator sets."""


def check_bits(model: CompressedModel) -> None:
    """Whether TensorRT has kernels for the activations' bits.

    Raises:
        ExportError: a layer's activations have fewer than eight bits.
    """
    for layer in model.layers:
        form = model.forms.get(layer.name)
        quantization = None if form is None else form.scheme.quantization
        bits = None if quantization is None else quantization.activation_bits
        if bits not in (None, 8):
            raise ExportError(
                f"'{layer.name}' has {bits}-bit activations ('{quantization}'); TensorRT quantizes "
                "activations to 8 bits alone: compress with 'a8'"
            )


def to_tensorrt(graph: ir.Model, model: CompressedModel, target: Target) -> tuple[str, ...]:
    """Rewrite a graph in place; returns what a user should know.

    Args:
        graph: a QDQ or float graph with signed quantizers and float biases.
        model: the network it was made from.
        target: says precision and operator set.

    Raises:
        ExportError: the graph holds what TensorRT would refuse or misread.
    """
    notes = []
    if target.placement.eight_bit is EightBit.FP8:
        notes.append(
            "layers with 8-bit activations multiply E4M3 floats, to which their weights were "
            "rounded from the solver's grid"
        )
    for layer in model.layers:
        form = model.forms.get(layer.name)
        quantization = None if form is None else form.scheme.quantization
        if form is None or quantization is None:
            continue
        reason = int4_obstacle(layer, form.scheme)
        if quantization.activation_bits is not None:
            reason = int8_obstacle(layer, form.scheme)
        if reason is not None:
            notes.append(f"{layer.name}: its weights are stored as floats: {reason}")
    to_int4_blocks(graph)
    drop_dead(graph)
    changed = sorted({n.op_type for n in graph.graph if n.op_type in _CHANGED_SINCE_18})
    if changed:
        written = graph.graph.opset_imports[""]
        raise ExportError(
            f"{changed[0]} changed its meaning between operator sets {written} and {target.opset}; "
            "export for another target"
        )
    graph.graph.opset_imports[""] = target.opset
    if target.precision is Precision.BFLOAT16:
        graph.graph.opset_imports[""] = max(target.opset, BFLOAT16_OPSET)
    clipped = to_precision(graph, target.precision)
    if clipped:
        notes.append(
            f"{clipped} constants were clipped to what {target.precision.value} holds; compare "
            "with --precision bf16"
        )
    found = refusals(ir.to_proto(graph))
    if found:
        raise ExportError(found[0])
    return tuple(notes)
