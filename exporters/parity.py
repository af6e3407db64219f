"""Parity: an artifact's outputs against the PyTorch model's, and the first layer that differs.

Compared on calibration samples, by the relative error ‖y - ŷ‖ / ‖ŷ‖ of all outputs together:

    float files        at most 1e-3: the same operations in another order
    quantized files    at most 5e-2: a sum that falls on a rounding boundary may land one step apart,
                       and a step apart in an early layer moves later ones
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, fx

from obc_deploy.capture import Watcher
from obc_deploy.errors import ExportError

FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 5e-2

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """How far an artifact is from the PyTorch model.

    Attributes:
        relative_error: ‖artifact - PyTorch‖ / ‖PyTorch‖ over all samples and outputs.
        agreement: share of samples whose largest first output is the same.
        samples: how many were compared.
        tolerance: what was allowed.
        runtime: what ran the artifact.
    """

    relative_error: float
    agreement: float
    samples: int
    tolerance: float
    runtime: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for manifests."""
        return {
            "relative_error": self.relative_error,
            "agreement": self.agreement,
            "samples": self.samples,
            "tolerance": self.tolerance,
            "runtime": self.runtime,
        }


def relative_error(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    """‖found - wanted‖ / ‖wanted‖, all arrays together, in float64."""
    difference = sum(
        float(np.sum((f.astype(np.float64) - w.astype(np.float64)) ** 2))
        for f, w in zip(found, wanted, strict=True)
    )
    norm = sum(float(np.sum(w.astype(np.float64) ** 2)) for w in wanted)
    return float(np.sqrt(difference / max(norm, 1e-60)))


def torch_outputs(module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Array]:
    """The module's outputs as arrays."""
    with torch.no_grad():
        output = module(*inputs)
    outputs = output if isinstance(output, tuple | list) else (output,)
    return [tensor.detach().numpy() for tensor in outputs]


def check_parity(
    run: Callable[[Sequence[Array]], list[Array]],
    module: fx.GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    tolerance: float,
    runtime: str,
    path: Path,
) -> Parity:
    """Compare an artifact with the module on batches of inputs.

    Args:
        run: runs the artifact on one batch.
        module: what it must agree with.
        batches: inputs, each of the artifact's batch size.
        tolerance: largest relative error allowed.
        runtime: what `run` uses, for the record.
        path: the artifact's file, for the message.

    Raises:
        ExportError: it differs by more; the message names the first layer that does.
    """
    found: list[Array] = []
    wanted: list[Array] = []
    same = count = 0
    for batch in batches:
        outputs = run([tensor.numpy() for tensor in batch])
        references = torch_outputs(module, batch)
        found += outputs
        wanted += references
        guesses = outputs[0].reshape(outputs[0].shape[0], -1).argmax(1)
        truths = references[0].reshape(references[0].shape[0], -1).argmax(1)
        same += int((guesses == truths).sum())
        count += len(truths)
    error = relative_error(found, wanted)
    parity = Parity(error, same / max(count, 1), count, tolerance, runtime)
    if not error <= tolerance:
        first = first_difference(path, module, batches[0], tolerance)
        raise ExportError(
            f"'{path.name}' run by {runtime} differs from the PyTorch model by {error:.2e} "
            f"(relative, {count} samples; {tolerance:g} is allowed); {first}"
        )
    return parity


def first_difference(
    path: Path, module: fx.GraphModule, batch: tuple[Tensor, ...], tolerance: float
) -> str:
    """Where an ONNX file and a module part, read off the values that both name alike.

    Both are run with every intermediate value kept; exporter and graph share the names of values.
    """
    import onnxruntime

    values: dict[str, Array] = {}

    def keep(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            values[node.name] = value.detach().numpy()

    with torch.no_grad():
        Watcher(module, keep).run(*batch)
    model = onnx.load(path)
    outputs = {output.name for output in model.graph.output}
    order = [name for node in model.graph.node for name in node.output if name in values]
    for name in order:
        if name not in outputs:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), batch, strict=True)}
    for name, array in zip(order, session.run(order, feeds), strict=True) if order else ():
        if array.shape != values[name].shape:
            return f"the first value that differs is '{name}': shape {array.shape}, not {values[name].shape}"
        error = relative_error([array], [values[name]])
        if not error <= tolerance:
            return f"the first value that differs is '{name}' ({error:.2e})"
    return "no single layer differs by more than that: small differences add up"
