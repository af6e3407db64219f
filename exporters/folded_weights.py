"""Weights that the exporter turned around get names by which their layers are found again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from obc_deploy.capture import get_tensor
from obc_deploy.exporters.edit import constant

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel

TRANSPOSED = "transposed"


def name_folded_weights(graph: ir.Model, model: CompressedModel) -> None:
    """Name float weights of linear layers `<weight>_transposed` that are stored that way.

    Args:
        graph: changed in place.
        model: the network it was made from.
    """
    for layer in model.layers:
        if layer.weight_name in graph.graph.initializers or len(layer.weight_shape) != 2:
            continue
        turned = get_tensor(model.network.module, layer.weight_name).numpy().T
        form = model.forms.get(layer.name)
        if form is not None:
            turned = form.weight.cpu().numpy().T
        for value in list(graph.graph.initializers.values()):
            array = constant(value)
            if array is None or array.dtype != turned.dtype or array.shape != turned.shape:
                continue
            if np.array_equal(array, turned):
                value.name = f"{layer.weight_name}_{TRANSPOSED}"
                break
