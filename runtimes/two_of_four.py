"""Which layers of an ONNX file a sparse tensor core can read: 2:4, checked as TensorRT does.

    Conv            along input channels, at each output channel and kernel position on its own
    Gemm, MatMul    along the dimension that is summed over

At most two of each four consecutive weights there may be non-zero, and their number must divide by
four. A pattern along flattened channels and kernel positions is another one: TensorRT finds no 2:4
in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from obc_deploy.errors import ArtifactError
from obc_deploy.runtimes.stored_weights import Array, StoredWeight, stored_weights

KEPT = 2
GROUP = 4
WORTHWHILE = 256
"""Channels in and out from which sparse kernels gain; narrower layers are as fast dense."""
LEAST_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with sparse tensor cores."""
_ALIGNMENT = {1: 32, 2: 16}
"""Inputs that a sparse kernel takes at a time, by bytes of a weight."""
_KERNELS = {"int8": 1, "float8e4m3fn": 1, "float16": 2, "bfloat16": 2}
"""Weight types with sparse kernels, and their bytes."""


@dataclass(frozen=True)
class TwoOfFourLayer:
    """One layer's weight against the 2:4 rule.

    Attributes:
        name: of the ONNX node, of its first output where it has none.
        output: the value that the node computes.
        operator: Conv, ConvTranspose, Gemm or MatMul.
        weight: the stored constant.
        storage: its element type.
        outputs: output channels.
        inputs: input channels of a group of a convolution, or summed-over dimension.
        groups: whole groups of four consecutive weights.
        valid_groups: those with at most two non-zeros.
        valid: the layer is 2:4 throughout.
        obstacles: why no sparse kernel will run it, or why none will pay, in words.
    """

    name: str
    output: str
    operator: str
    weight: str
    storage: str
    outputs: int
    inputs: int
    groups: int
    valid_groups: int
    valid: bool
    obstacles: tuple[str, ...]

    @property
    def share(self) -> float:
        """Fraction of the groups that are 2:4; 0 where there is none."""
        return self.valid_groups / self.groups if self.groups else 0.0

    @property
    def eligible(self) -> bool:
        """Nothing speaks against a sparse kernel but, perhaps, the pattern."""
        return not self.obstacles

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            **asdict(self),
            "obstacles": list(self.obstacles),
            "share": self.share,
            "eligible": self.eligible,
        }


def count_groups(values: Array) -> tuple[int, int]:
    """Whole groups of four along the last axis, and how many of them hold at most two non-zeros.

    Args:
        values: (..., inputs); what is left after the last whole group is not counted.
    """
    whole = values.shape[-1] // GROUP * GROUP
    filled = (values[..., :whole] != 0).reshape(*values.shape[:-1], -1, GROUP).sum(-1)
    return int(filled.size), int((filled <= KEPT).sum())


def _obstacles(
    weight: StoredWeight, values: Array, capability: tuple[int, int] | None
) -> list[str]:
    outputs, groups, _, inputs = values.shape
    outputs *= groups
    found = []
    if capability is not None and capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        found.append(
            f"this GPU (compute capability {capability[0]}.{capability[1]}) has no sparse tensor "
            f"cores: they come with {least}"
        )
    if weight.operator == "ConvTranspose":
        found.append("a transposed convolution has none")
    if groups > 1:
        kind = "depthwise" if inputs == 1 else "grouped"
        found.append(f"a {kind} convolution ({groups} groups) has none")
    size = _KERNELS.get(weight.storage)
    if size is None:
        fix = "export with --precision fp16 or bf16"
        if "int4" in weight.storage:
            fix = "use w8a8, or 16-bit weights"
        found.append(f"{weight.storage} weights have none: {fix}")
    elif inputs % _ALIGNMENT[size]:
        found.append(
            f"{inputs} inputs are no multiple of {_ALIGNMENT[size]} ({weight.storage} kernels)"
        )
    if weight.storage == "int8":
        if not weight.quantized_input:
            found.append("its input is float: no QuantizeLinear before it")
        elif not weight.quantized_output:
            found.append("its output stays float: no QuantizeLinear follows")
    if min(outputs, inputs) < WORTHWHILE:
        found.append(
            f"{inputs} inputs, {outputs} outputs: too small to gain (about {WORTHWHILE} of both)"
        )
    return found


def check_layer(
    weight: StoredWeight, *, capability: tuple[int, int] | None = None
) -> TwoOfFourLayer:
    """One layer against the rule.

    Args:
        weight: what the file stores for it.
        capability: compute capability of the GPU it is to run on; None where unknown.
    """
    if weight.values is None:
        return TwoOfFourLayer(
            weight.layer, weight.output, weight.operator, weight.initializer, weight.storage,
            0, 0, 0, 0, False, (weight.obstacle or "its weight is not known",),
        )  # fmt: skip
    outputs, parts, _, inputs = weight.values.shape
    groups, valid = count_groups(weight.values)
    obstacles = _obstacles(weight, weight.values, capability)
    divides = inputs % GROUP == 0
    if not divides:
        obstacles.insert(0, f"{inputs} inputs do not divide into groups of {GROUP}")
    return TwoOfFourLayer(
        name=weight.layer,
        output=weight.output,
        operator=weight.operator,
        weight=weight.initializer,
        storage=weight.storage,
        outputs=outputs * parts,
        inputs=inputs,
        groups=groups,
        valid_groups=valid,
        valid=divides and groups > 0 and valid == groups,
        obstacles=tuple(obstacles),
    )


def check_two_of_four(
    path: Path | str, *, capability: tuple[int, int] | None = None
) -> tuple[TwoOfFourLayer, ...]:
    """Every layer of an ONNX file with a constant weight against the 2:4 rule.

    Weights are float, integers behind DequantizeLinear (INT4 in blocks too), or float behind a
    QuantizeLinear/DequantizeLinear pair.

    Args:
        path: the file.
        capability: compute capability of the GPU it is to run on; None where unknown.

    Raises:
        ArtifactError: there is no such file, it is damaged, or no layer has a constant weight.
    """
    stored = stored_weights(Path(path))
    if not stored:
        raise ArtifactError(
            f"'{path}' has no Conv, Gemm or MatMul with a constant weight; export the network with "
            "its weights, in float or with QuantizeLinear and DequantizeLinear"
        )
    return tuple(check_layer(weight, capability=capability) for weight in stored)


def summary(layers: Sequence[TwoOfFourLayer]) -> str:
    """What the layers come to, in one line."""
    valid = [layer for layer in layers if layer.valid]
    ready = [layer for layer in valid if layer.eligible]
    groups = sum(layer.groups for layer in layers)
    share = float(np.sum([layer.valid_groups for layer in layers])) / max(groups, 1)
    return (
        f"{len(valid)} of {len(layers)} layers are 2:4 along their inputs ({share:.1%} of all "
        f"groups of four), {len(ready)} of these can have a sparse kernel that pays"
    )
