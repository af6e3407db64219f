"""From a captured PyTorch graph to an ONNX graph, by torch's own exporter.

The quantization operators of `obc_deploy.quantized_network` are translated to QuantizeLinear and
DequantizeLinear as they stand, so the codes in the file are the solver's codes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from obc_deploy.errors import ExportError
from obc_deploy.quantized_network import (
    DEQUANTIZE,
    DEQUANTIZE_BLOCKS,
    QUANTIZE_DEQUANTIZE,
    QUANTIZE_DEQUANTIZE_FLOAT8,
)

EXPORT_OPSET = 18
"""What torch's exporter writes without converting, and every runtime here reads."""


def _translations() -> dict[Any, Any]:
    from onnxscript import opset18, opset21

    op: Any = opset18
    newer: Any = opset21

    def dequantize(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis)

    def quantize_dequantize(
        values: Any, scale: Any, zero_point: Any, code_min: int, code_max: int
    ) -> Any:
        codes = op.QuantizeLinear(values, scale, zero_point)
        # uint8 saturates by itself; fewer bits need the clip spelt out.
        if code_min not in (0, -128) or code_max not in (255, 127):
            low = op.CastLike(op.Constant(value_int=code_min), zero_point)
            high = op.CastLike(op.Constant(value_int=code_max), zero_point)
            codes = op.Min(op.Max(codes, low), high)
        return op.DequantizeLinear(codes, scale, zero_point)

    def dequantize_blocks(codes: Any, scale: Any) -> Any:
        block = int(codes.shape[1]) // int(scale.shape[1])
        return newer.DequantizeLinear(codes, scale, axis=1, block_size=block)

    def quantize_dequantize_float8(values: Any, scale: Any, zero_point: Any) -> Any:
        codes = newer.QuantizeLinear(values, scale, zero_point)
        return newer.DequantizeLinear(codes, scale, zero_point)

    return {
        DEQUANTIZE: dequantize,
        QUANTIZE_DEQUANTIZE_FLOAT8: quantize_dequantize_float8,
        QUANTIZE_DEQUANTIZE: quantize_dequantize,
        DEQUANTIZE_BLOCKS: dequantize_blocks,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporter from printing and warning about its own internals."""
    root = logging.getLogger("torch.onnx")
    script = logging.getLogger("onnxscript")
    levels = root.level, script.level
    root.setLevel(logging.ERROR)
    script.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(levels[0])
        script.setLevel(levels[1])


def onnx_graph(
    module: fx.GraphModule, example: tuple[Tensor, ...], *, dynamic_batch: bool
) -> tuple[ir.Model, fx.GraphModule]:
    """Translate a captured graph to ONNX; returns it with the PyTorch graph whose names it shares.

    Args:
        module: the graph, with or without quantizers.
        example: one batch of inputs, of the batch size that a static file is to have.
        dynamic_batch: leave the first dimension of every input open.

    Raises:
        ExportError: an operator has no ONNX form; the message is torch's own.
    """
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in example) if dynamic_batch else None
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=shapes)
            exported = torch.onnx.export(
                program,
                example,
                dynamo=True,
                opset_version=EXPORT_OPSET,
                custom_translation_table=_translations(),
                verbose=False,
                optimize=True,
            )
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(f"the model has no ONNX form: {reason[:300]}") from error
    if exported is None:
        raise ExportError("torch's ONNX exporter returned nothing")
    model: ir.Model = exported.model
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "obc-deploy"
    return model, program.module(check_guards=False)
