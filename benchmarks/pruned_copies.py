"""Copies of an exported integer network whose weights have other patterns of zeros.

Exporting a network takes seconds; setting codes to zero takes none. What a runtime does with a
network depends on where its zeros are and not on the other codes, so such a copy is as good to time
as a network that was compressed to that pattern. The zeros go to the smallest codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from obc_deploy.artifacts import Artifact
from obc_deploy.errors import LatencyError
from obc_deploy.layers import Layer, matrix_to_weight, weight_to_matrix
from obc_deploy.schemes import Scheme
from obc_deploy.solvers import solve


def pruned_copy(
    artifact: Artifact, layers: Sequence[Layer], schemes: Mapping[str, Scheme], path: Path
) -> None:
    """Write a copy of an artifact whose layers have the schemes' patterns of zeros.

    Args:
        artifact: a dense network in integer codes with zero points of 0.
        layers: its layers.
        schemes: layer name to scheme; only patterns count.
        path: the file to write.

    Raises:
        LatencyError: a layer with a pattern has no integer codes in the file.
    """
    model = onnx.load(artifact.path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    codes = {layer.name: layer.codes for layer in artifact.manifest.layers}
    for layer in layers:
        pattern = Scheme(schemes[layer.name].pattern, None)
        if pattern.is_dense:
            continue
        tensor = _codes_of(layer, codes.get(layer.name), stored)
        values = numpy_helper.to_array(tensor)
        pruned = _with_zeros(layer, values, pattern)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(pruned), tensor.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def _codes_of(
    layer: Layer, name: str | None, stored: Mapping[str, onnx.TensorProto]
) -> onnx.TensorProto:
    """The layer's codes as the file has them: rewriting an operator may have reshaped them."""
    found = [
        tensor
        for key, tensor in stored.items()
        if name is not None
        and (key == name or key.startswith(f"{name}_"))
        and int(np.prod(tensor.dims)) == layer.weights
        and tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    ]
    if not found:
        raise LatencyError(f"layer '{layer.name}' has no integer codes in the exported network")
    return found[0]


def _with_zeros(layer: Layer, values: npt.NDArray[Any], pattern: Scheme) -> npt.NDArray[Any]:
    transposed = values.ndim == 2 and values.shape != tuple(layer.weight_shape)
    weight = torch.from_numpy((values.T if transposed else values).astype(np.float32))
    matrix = weight_to_matrix(layer, weight.reshape(layer.weight_shape))
    pruned = solve(
        matrix, None, pattern, method="magnitude", channels=layer.channels, name=layer.name
    )
    kept = matrix_to_weight(layer, pruned.weight).reshape(weight.shape).numpy()
    return (kept.T if transposed else kept).astype(values.dtype)
