"""Parity: an artifact's outputs against the PyTorch model's, and the first layer that differs.

Compared on calibration samples, by the relative error ‖y - ŷ‖ / ‖ŷ‖ of all outputs together:

    float files        at most 1e-3: the same operations in another order
    quantized files    at most 5e-2: a sum that falls on a rounding boundary may land one step
                       apart, and a step apart in an early layer moves later ones
    16-bit files       the latter; float ones what `ROUNDING` says of their eight or eleven bits

How far one such step grows depends on the network alone; in a deep one with untrained weights it
reaches the size of the quantization error itself. So a quantized file that exceeds the tolerance is
compared once more, layer by layer, each computing on what the file's own layers before it gave:
there codes may differ by one step, in few places, and by no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, fx

from obc_deploy.capture import parameter_name
from obc_deploy.errors import ExportError
from obc_deploy.quantized_network import DEQUANTIZE, OWNER_SUFFIX
from obc_deploy.runtimes.onnxruntime_cpu import libraries
from obc_deploy.runtimes.regions import separated
from obc_deploy.targets import Precision

FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 5e-2
TIES = 0.01
"""Share of a layer's codes that may be one step apart for falling on a rounding boundary."""
FEWEST_TIES = 2
"""So many may be in any layer, however small."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rounding:
    """How far a file's arithmetic may take it from PyTorch's float32.

    Attributes:
        floats: largest relative error of float values.
        ties: share of a layer's codes that may be apart.
        steps: how many steps those may be apart; less than.
    """

    floats: float = FLOAT_TOLERANCE
    ties: float = TIES
    steps: float = 1.5


ROUNDING: Mapping[Precision, Rounding] = {
    Precision.FLOAT32: Rounding(),
    # A value near the end of a grid is off by up to 128 / 2^11 steps: one code in sixteen ties.
    Precision.FLOAT16: Rounding(floats=1e-2, ties=0.15),
    # Constants alone are rounded, to eight bits: see `in_float32`.
    Precision.BFLOAT16: Rounding(floats=3e-2, ties=0.5, steps=2.5),
}


@dataclass(frozen=True)
class Parity:
    """How far an artifact is from the PyTorch model.

    Attributes:
        relative_error: ‖artifact - PyTorch‖ / ‖PyTorch‖ over all samples and outputs.
        agreement: share of samples whose largest first output is the same.
        samples: how many were compared.
        tolerance: what was allowed.
        runtime: what ran the artifact.
        layerwise: the error is above the tolerance and only rounding: no layer differs by itself.
    """

    relative_error: float
    agreement: float
    samples: int
    tolerance: float
    runtime: str
    layerwise: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for manifests."""
        return {
            "relative_error": self.relative_error,
            "agreement": self.agreement,
            "samples": self.samples,
            "tolerance": self.tolerance,
            "runtime": self.runtime,
            "layerwise": self.layerwise,
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


@dataclass(frozen=True)
class Codes:
    """The value of an ONNX file that holds a quantizer's codes, and its grid.

    Of a `float8` quantizer it holds the codes times their scale.
    """

    value: str
    scale: float
    zero_point: int
    float8: bool = False

    def values(self, held: Array) -> Array:
        """What the codes stand for."""
        if self.float8:
            return held.astype(np.float32)
        return (held.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)

    def steps(self, values: Array) -> Array:
        """The distance between neighbours of the grid at each value."""
        if not self.float8:
            return np.full(values.shape, self.scale)
        # E4M3: three bits behind the leading one. Sums that cancel leave errors of the size of
        # what was summed, so the ever finer steps below 8 of up to 448 count as those at 8.
        exponents = np.floor(np.log2(np.maximum(np.abs(values) / self.scale, 8.0)))
        steps: Array = self.scale * 2.0 ** (exponents - 3)
        return steps


def check_parity(
    run: Callable[[Sequence[Array]], list[Array]],
    module: fx.GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    tolerance: float,
    runtime: str,
    path: Path,
    codes: Mapping[str, Codes],
    views: Sequence[onnx.NodeProto] = (),
    rounding: Rounding | None = None,
    optimized: bool = True,
) -> Parity:
    """Compare an artifact with the module on batches of inputs.

    Args:
        run: runs the artifact on one batch.
        module: what it must agree with.
        batches: inputs, each of the artifact's batch size.
        tolerance: largest relative error allowed.
        runtime: what `run` uses, for the record.
        path: the artifact's file, for the message.
        codes: where the codes of the module's quantizers are in the file, by node name.
        views: nodes to add to the file's for a look at values that it holds in another form.
        rounding: what the file's arithmetic is allowed layer by layer; float32's where None.
        optimized: ONNX Runtime may rewrite the graph where it is asked for the file's values.

    Raises:
        ExportError: it differs by more; the message names the first layer that does.
    """
    found: list[Array] = []
    wanted: list[Array] = []
    same = count = 0
    for batch in batches:
        outputs = run([tensor.numpy() for tensor in batch])
        references = torch_outputs(module, batch)
        shapes = [array.shape for array in outputs], [array.shape for array in references]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"'{path.name}' run by {runtime} gives outputs of shape {shapes[0]}, the PyTorch "
                f"model {shapes[1]}"
            )
        found += outputs
        wanted += references
        guesses = outputs[0].reshape(outputs[0].shape[0], -1).argmax(1)
        truths = references[0].reshape(references[0].shape[0], -1).argmax(1)
        same += int((guesses == truths).sum())
        count += len(truths)
    error = relative_error(found, wanted)
    agreement = same / max(count, 1)
    if error <= tolerance:
        return Parity(error, agreement, count, tolerance, runtime)
    inside = _OnnxValues(path, views, optimized)
    allowed = rounding or Rounding()
    odd = first_difference(inside, module, batches, codes, allowed)
    if odd is None and codes and _same_outputs(inside, batches, found):
        return Parity(error, agreement, count, tolerance, runtime, layerwise=True)
    raise ExportError(
        f"'{path.name}' run by {runtime} differs from the PyTorch model by {error:.2e} (relative, "
        f"{count} samples; {tolerance:g} is allowed); "
        + (odd or f"ONNX Runtime finds no layer that does: {runtime} computes it wrongly")
    )


class _OnnxValues:
    """An ONNX file run by ONNX Runtime, any of its values shown."""

    def __init__(self, path: Path, views: Sequence[onnx.NodeProto], optimized: bool) -> None:
        self._optimized = optimized
        self.model = separated(onnx.load(path))
        self.model.graph.node.extend(views)
        self._libraries = libraries({node.domain for node in self.model.graph.node})
        self.outputs = [output.name for output in self.model.graph.output]
        self.names = {name for node in self.model.graph.node for name in node.output}

    def run(self, batch: tuple[Tensor, ...], names: Sequence[str]) -> dict[str, Array]:
        """The named values, and the outputs, on one batch."""
        import onnxruntime

        shown = onnx.ModelProto()
        shown.CopyFrom(self.model)
        wanted = list(dict.fromkeys([*self.outputs, *names]))
        for name in wanted[len(self.outputs) :]:
            shown.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if not self._optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for library in self._libraries:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(
            shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), batch, strict=True)}
        return dict(zip(wanted, session.run(wanted, feeds), strict=True))


def _same_outputs(
    inside: _OnnxValues, batches: Sequence[tuple[Tensor, ...]], found: Sequence[Array]
) -> bool:
    """Whether another runtime's outputs are those of ONNX Runtime, whose layers were compared."""
    here: list[Array] = []
    for batch in batches:
        values = inside.run(batch, ())
        here += [values[name] for name in inside.outputs]
    return relative_error(found, here) <= FLOAT_TOLERANCE


class _Forced(fx.Interpreter):
    """Runs a graph whose quantizers give the codes of a file, after a look at how they differ."""

    def __init__(
        self,
        module: fx.GraphModule,
        codes: Mapping[str, Codes],
        values: Mapping[str, Array],
        allowed: Rounding,
    ) -> None:
        super().__init__(module)
        self._allowed = allowed
        self._codes = codes
        self._values = values
        self.difference: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; what the file gives takes the place of its value."""
        value = super().run_node(n)
        known = self._codes.get(n.name)
        if known is None:
            if self.difference is None and n.name in self._values and isinstance(value, Tensor):
                self.difference = _beyond_rounding(
                    n, value.numpy(), self._values[n.name], self._allowed
                )
            return value
        forced = known.values(self._values[known.value])
        if self.difference is None:
            self.difference = _beyond_ties(n, value.numpy(), forced, known, self._allowed)
        return torch.from_numpy(forced).reshape(value.shape)


def _place(node: fx.Node) -> str:
    """The layer that a value comes from, and the value, for a message."""
    source = node
    for _ in range(8):
        if layer := _layer_name(source if source.target is DEQUANTIZE else _weight(source)):
            return f"the first layer that differs is '{layer}' (value '{node.name}')"
        before = source.args[0] if source.args else None
        if not isinstance(before, fx.Node):
            break
        source = before
    return f"the first value that differs is '{node.name}'"


def _layer_name(weight: object) -> str | None:
    if isinstance(weight, fx.Node) and weight.target is DEQUANTIZE:
        weight = weight.args[0]
    name = parameter_name(weight)
    prefix, _, leaf = (name or "").rpartition(".")
    if leaf not in {"weight", "weight_codes", "bias_codes"}:
        return None
    return prefix.removesuffix(OWNER_SUFFIX)


def _weight(node: fx.Node) -> object:
    return node.args[1] if len(node.args) > 1 else None


def _beyond_rounding(node: fx.Node, wanted: Array, found: Array, allowed: Rounding) -> str | None:
    """How float values differ by more than the order of operations, or None."""
    if wanted.shape != found.shape:
        return f"{_place(node)}: shape {found.shape}, not {wanted.shape}"
    if wanted.dtype.kind != "f":
        return None
    error = relative_error([found], [wanted])
    return None if error <= allowed.floats else f"{_place(node)}: {error:.2e}"


def _beyond_ties(
    node: fx.Node, wanted: Array, found: Array, grid: Codes, allowed: Rounding
) -> str | None:
    """How values on a grid differ by more than rounding, or None."""
    if wanted.size != found.size:
        return f"{_place(node)}: shape {found.shape}, not {wanted.shape}"
    ours, theirs = wanted.reshape(-1), found.reshape(-1)
    steps = np.abs(ours - theirs) / grid.steps(np.maximum(np.abs(ours), np.abs(theirs)))
    apart = int((steps > 0.5).sum())
    if not steps.max(initial=0.0) < allowed.steps:
        return f"{_place(node)}: up to {steps.max():.1f} steps apart"
    if apart > max(FEWEST_TIES, allowed.ties * steps.size):
        return f"{_place(node)}: {apart} of {steps.size} codes"
    return None


def first_difference(
    inside: _OnnxValues,
    module: fx.GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    codes: Mapping[str, Codes],
    allowed: Rounding,
) -> str | None:
    """Where an ONNX file and a module part by more than rounding, in words, or None.

    Each part of the module between two quantizers computes on the codes that the file gave.
    """
    shown = {name: known for name, known in codes.items() if known.value in inside.names}
    both = [node.name for node in module.graph.nodes if node.name in inside.names]
    for batch in batches:
        values = inside.run(batch, [*both, *(known.value for known in shown.values())])
        forced = _Forced(module, shown, values, allowed)
        with torch.no_grad():
            output = forced.run(*batch)
        if forced.difference is not None:
            return forced.difference
        outputs = output if isinstance(output, tuple | list) else (output,)
        for name, tensor in zip(inside.outputs, outputs, strict=True):
            error = relative_error([values[name]], [tensor.numpy()])
            if not error <= allowed.floats:
                return f"the first value that differs is the output '{name}' ({error:.2e})"
    return None
