"""Targets: what a runtime really accelerates, the file format it wants, and what to expect of it.

A target names a runtime and the form of graph that the runtime is fast on. `preflight` says before
any work what will not speed up there, and why.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from obc_deploy.errors import TargetError
from obc_deploy.schemes import (
    BLOCK_SIZE,
    NM,
    Block4,
    Pattern,
    Scheme,
    Unstructured,
    changes_between,
)

if TYPE_CHECKING:
    from obc_deploy.layers import Layer


class Format(Enum):
    """Forms of an ONNX graph."""

    FLOAT = "float"
    """Float weights, zeros and all."""
    QDQ = "qdq"
    """Float operators between QuantizeLinear/DequantizeLinear pairs."""
    QOPERATOR = "qoperator"
    """Integer operators: QLinearConv and its kin."""


class Precision(Enum):
    """What computes where nothing is quantized; baked into the file."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class EightBit(Enum):
    """What layers with 8-bit activations multiply."""

    INT8 = "int8"
    FP8 = "fp8"
    """E4M3 floats: weights are rounded to them from the solver's grid."""


class Processor(StrEnum):
    """Processors on which operators' costs were measured."""

    CASCADE_LAKE = "cascade-lake"
    """Intel Xeon, AVX-512 VNNI; the nearest to other Intel processors too."""
    ZEN_4 = "zen-4"
    """AMD EPYC and Ryzen, AVX-512 VNNI; the nearest to other AMD processors too."""


@dataclass(frozen=True)
class Placement:
    """Which operators besides convolutions and linears run on int8 activations.

    Attributes:
        add: element-wise adds (residuals) of int8 operands.
        concat: concatenations of int8 operands.
        average_pool: average pools of int8 inputs.
        linear_output: whether a linear layer's own output is quantized even where nobody wants it.
        signed: symmetric int8 activations instead of unsigned ones with a zero point.
        shortcut: a convolution that ends in a residual add stays unquantized until after it, so
            that the runtime can compute both at once; only the add's other operand, the shortcut,
            is put on a grid right before the add.
        sparse_linear_output: whether a linear layer with an N:M pattern has its output quantized,
            where that is no output of the network.
        integer_bias: biases of int8 layers are int32 codes; else they stay float.
        weight_only: weights of layers with float activations are codes too; else their exact values
            are written as floats.
        int4_blocks: linears with 4-bit weights in groups of columns keep them as such blocks.
        eight_bit: what layers with 8-bit activations multiply.
    """

    add: bool = True
    concat: bool = True
    average_pool: bool = True
    linear_output: bool = False
    signed: bool = False
    shortcut: bool = False
    sparse_linear_output: bool = False
    integer_bias: bool = True
    weight_only: bool = True
    int4_blocks: bool = False
    eight_bit: EightBit = EightBit.INT8


@dataclass(frozen=True)
class Target:
    """One place to deploy to.

    Attributes:
        name: what a user types.
        runtime: the runtime that measures it ("onnxruntime", "deepsparse").
        format: the graph form of quantized networks; float networks are always `Format.FLOAT`.
        opset: newest ONNX operator set that the runtime takes.
        ir_version: newest ONNX file version that the runtime takes.
        placement: what runs in int8 there.
        integer_operators: float operators that have a fast integer form there (QOperator only).
        one_weight_step: the runtime's fastest kernels want one weight scale a layer.
        linear_as_convolution: write int8 linears as 1x1 convolutions, for which kernels exist.
        sparse_from: smallest sparsity that was measured to beat the dense kernel, by pattern; a
            pattern that is not in it gains nothing.
        summary: one line for help texts.
        sparse_operators: layers with zeros become operators of our own library
            (`obc_deploy.runtimes.sparse`), which the runtime loads beside the file.
        fuses_alike: neighbouring layers run as one where all or none of them skip zeros.
        skips_from: share of a layer's weights that must be zero for the runtime to skip any; with
            fewer it was measured to run the layer as a dense one, or slower.
        precision: what computes where nothing is quantized.
        measured: there are sessions and measurements of it here; else its files are only written
            and checked.
        processor: whose costs decide between dense and sparse operators; None: the one that this
            machine's is most like.
    """

    name: str
    runtime: str
    format: Format
    opset: int
    ir_version: int
    placement: Placement
    integer_operators: frozenset[str]
    one_weight_step: bool
    linear_as_convolution: bool
    sparse_from: Mapping[type, float]
    summary: str
    sparse_operators: bool = False
    fuses_alike: bool = False
    skips_from: float = 0.0
    precision: Precision = Precision.FLOAT32
    measured: bool = True
    processor: Processor | None = None


_ALL_INTEGER = frozenset(
    {
        "Conv", "Gemm", "Add", "Concat", "GlobalAveragePool", "AveragePool", "MaxPool", "Reshape",
        "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity",
    }
)  # fmt: skip

ONNXRUNTIME = Target(
    name="onnxruntime",
    runtime="onnxruntime",
    format=Format.QDQ,
    opset=18,
    ir_version=9,
    placement=Placement(),
    integer_operators=_ALL_INTEGER,
    one_weight_step=False,
    linear_as_convolution=False,
    sparse_from={},
    summary="ONNX Runtime on the CPU, QDQ graph; int8 is fast, zeros are ignored",
)

ONNXRUNTIME_QOPERATOR = Target(
    name="onnxruntime-qoperator",
    runtime="onnxruntime",
    format=Format.QOPERATOR,
    opset=18,
    ir_version=9,
    placement=Placement(),
    integer_operators=_ALL_INTEGER,
    one_weight_step=False,
    linear_as_convolution=False,
    sparse_from={},
    summary="ONNX Runtime on the CPU, integer operators (QLinearConv)",
)

DEEPSPARSE = Target(
    name="deepsparse",
    runtime="deepsparse",
    format=Format.QOPERATOR,
    opset=18,
    ir_version=9,
    placement=Placement(concat=False, average_pool=False, linear_output=True),
    # Integer max and average pools make it hand the whole graph to its fallback.
    integer_operators=frozenset({"Conv", "Gemm", "Add", "Reshape", "Flatten"}),
    one_weight_step=True,
    linear_as_convolution=True,
    sparse_from={Block4: 0.8, Unstructured: 0.85},
    summary="DeepSparse on the CPU, integer operators; zeros are skipped (needs 80 % or more)",
    fuses_alike=True,
    skips_from=0.62,
)

INTEGER_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})
"""CPU features that multiply and add four 8-bit values at once."""
SHARED_BLOCKS = "avx512_vnni"
"""The CPU feature whose kernels load once what two output channels share."""
_UNAVOIDABLE_CHANGES = 3
"""Changes between dense and sparse layers that are not worth a word: the first and the last layer
keep their weights as a rule, and one layer in between may."""
FLOAT_SPARSE_FROM = 0.85
"""Zeros from which our float kernels are faster than ONNX Runtime's dense ones, at usual shapes."""

ORT_SPARSE = Target(
    name="ort-sparse",
    runtime="onnxruntime",
    format=Format.QOPERATOR,
    opset=18,
    ir_version=9,
    placement=Placement(),
    integer_operators=_ALL_INTEGER,
    one_weight_step=False,
    linear_as_convolution=False,
    sparse_from={Block4: 0.5},
    summary="ONNX Runtime on the CPU with our sparse kernels; zeros are skipped (int8: from 50 %, "
    "float: from 85 %)",
    sparse_operators=True,
)

TENSORRT = Target(
    name="tensorrt",
    runtime="tensorrt",
    format=Format.QDQ,
    opset=21,
    ir_version=10,
    placement=Placement(
        signed=True,
        shortcut=True,
        sparse_linear_output=True,
        integer_bias=False,
        weight_only=False,
        int4_blocks=True,
    ),
    integer_operators=frozenset(),
    one_weight_step=False,
    linear_as_convolution=False,
    sparse_from={NM: 0.5},
    summary="TensorRT 10 or 11 on NVIDIA GPUs, strongly typed QDQ graph; 2:4 is what sparse tensor "
    "cores read",
    precision=Precision.FLOAT16,
    measured=False,
)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (ONNXRUNTIME, ONNXRUNTIME_QOPERATOR, ORT_SPARSE, DEEPSPARSE, TENSORRT)
}


def as_target(target: Target | str) -> Target:
    """A target from itself or from its name.

    Raises:
        TargetError: there is no target of that name.
    """
    if isinstance(target, Target):
        return target
    found = TARGETS.get(target)
    if found is None:
        raise TargetError(f"no target '{target}'; the targets are {', '.join(TARGETS)}")
    return found


def int8_obstacle(layer: Layer, scheme: Scheme) -> str | None:
    """Why a layer cannot run on int8 activations under its scheme, or None where it can."""
    quantization = scheme.quantization
    if quantization is None or quantization.activation_bits is None:
        return "its activations stay float"
    if layer.kind.value == "conv_transpose2d":
        return "no runtime here has an integer transposed convolution"
    if quantization.group is not None:
        return (
            "integer kernels need one scale an output channel, not one a "
            f"{quantization.group} columns"
        )
    if quantization.asymmetric:
        return "integer kernels need symmetric weight grids (drop '-asym')"
    return None


def int4_obstacle(layer: Layer, scheme: Scheme) -> str | None:
    """Why a layer cannot have its weights in blocks of INT4, or None where it can."""
    quantization = scheme.quantization
    if quantization is None or quantization.group is None or quantization.weight_bits > 4:
        return "INT4 blocks are made of 'w4g128' or 'w4g32'"
    if quantization.activation_bits is not None:
        return "INT4 weights go with float activations (drop 'a8')"
    if layer.kind.value != "linear":
        return "INT4 blocks are for linear layers: convolutions have none"
    if quantization.asymmetric:
        return "INT4 blocks have no zero points (drop '-asym')"
    if quantization.group % 16:
        return f"INT4 blocks are of 16, 32, 64 or 128 columns, not of {quantization.group}"
    return None


def _pattern_obstacle(target: Target, scheme: Scheme) -> str | None:
    pattern = scheme.pattern
    if pattern is None:
        return None
    if not target.sparse_from:
        return (
            f"{target.runtime} has no sparse kernels: the zeros of {pattern} cost as much as other "
            "weights"
        )
    if target.sparse_operators:
        return _sparse_operators_obstacle(target, scheme)
    if NM in target.sparse_from:
        return _tensor_core_obstacle(target, pattern)
    if isinstance(pattern, NM):
        return f"{target.runtime} has no {pattern} kernels: it runs the zeros as unstructured ones"
    least = target.sparse_from.get(type(pattern))
    if least is not None and pattern.sparsity < least:
        return (
            f"{target.runtime} is slower than dense below {least:.0%} zeros of this pattern, "
            f"'{pattern}' has {pattern.sparsity:.0%}"
        )
    if scheme.quantization is None and least is not None and pattern.sparsity < 0.9:
        return f"{target.runtime} gains little on float weights below 90 % zeros: add '+w8a8'"
    return None


def _tensor_core_obstacle(target: Target, pattern: Pattern) -> str | None:
    """Why sparse tensor cores, which read 2:4, gain nothing."""
    if pattern == NM(2, 4):
        return None
    return (
        f"{target.name} skips zeros of 2:4 only: those of {pattern} cost as much as other weights"
    )


def _sparse_operators_obstacle(target: Target, scheme: Scheme) -> str | None:
    """Why our own kernels gain nothing: they skip blocks of four zeros in int8, any in float."""
    pattern = scheme.pattern
    assert pattern is not None
    quantization = scheme.quantization
    if quantization is None:
        if pattern.sparsity >= FLOAT_SPARSE_FROM:
            return None
        return (
            f"{target.name} gains nothing on float layers below {FLOAT_SPARSE_FROM:.0%} zeros, "
            f"'{pattern}' has {pattern.sparsity:.0%}: use block4 and add '+w8a8'"
        )
    if quantization.activation_bits is None:
        return f"{target.name} skips no zeros of weights that are stored as codes: add 'a8'"
    if isinstance(pattern, NM):
        return f"{target.name} skips blocks of four zeros, and {pattern} has none: use block4@0.5"
    least = target.sparse_from[Block4]
    if isinstance(pattern, Block4) and pattern.sparsity < least:
        return (
            f"{target.name} gains nothing below {least:.0%} zeros in blocks, '{pattern}' has "
            f"{pattern.sparsity:.0%}"
        )
    # Zeros that lie anywhere: four of them meet in a block with this probability.
    whole = pattern.sparsity**BLOCK_SIZE
    if isinstance(pattern, Unstructured) and whole < least:
        return (
            f"{target.name} skips blocks of four zeros, and '{pattern}' leaves about {whole:.0%} "
            f"of them: use block4@{pattern.sparsity:g}"
        )
    return None


def _shared_blocks_obstacle(
    target: Target, scheme: Scheme, cpu_features: Collection[str] | None
) -> str | None:
    """Why blocks that two output channels share gain nothing over free ones."""
    pattern = scheme.pattern
    if not isinstance(pattern, Block4) or pattern.together == 1:
        return None
    if Block4 not in target.sparse_from:
        return None
    instead = f"use '{Block4(pattern.sparsity)}', which loses less"
    if not target.sparse_operators:
        return f"{target.name} has no kernels for blocks that output channels share: {instead}"
    if cpu_features is None or SHARED_BLOCKS in cpu_features:
        return None
    return (
        "this CPU has no AVX-512 VNNI, and only its kernels load a block once for both channels of "
        f"{pattern.kind}: {instead}"
    )


def preflight(
    target: Target,
    layers: Sequence[Layer],
    schemes: Mapping[str, Scheme],
    *,
    cpu_features: Collection[str] | None = None,
) -> list[str]:
    """What will not speed up on a target, one line a reason, with the layers it holds for.

    Args:
        target: where the network is to run.
        layers: the network's layers.
        schemes: the layers' schemes by name.
        cpu_features: the CPU's, of `obc_deploy.runtimes.fingerprint.CPU_FEATURES`; None where
            unknown.
    """
    reasons: dict[str, list[str]] = {}
    quantized = False
    for layer in layers:
        scheme = schemes.get(layer.name, Scheme())
        if scheme.is_dense:
            continue
        obstacles = [
            _pattern_obstacle(target, scheme),
            _shared_blocks_obstacle(target, scheme, cpu_features),
        ]
        if scheme.quantization is not None:
            obstacle = int8_obstacle(layer, scheme)
            quantized = quantized or obstacle is None
            if target.placement.int4_blocks and int4_obstacle(layer, scheme) is None:
                pass
            elif obstacle is not None:
                obstacles.append(f"weights are stored small but computed in float: {obstacle}")
            elif max(scheme.weight_bits, scheme.activation_bits) < 8 or scheme.weight_bits < 8:
                obstacles.append(
                    f"{target.runtime} computes {scheme.quantization} with 8-bit kernels: no "
                    "faster than w8a8"
                )
        for obstacle in obstacles:
            if obstacle is not None:
                reasons.setdefault(obstacle, []).append(layer.name)
    lines = []
    for reason, names in reasons.items():
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"{reason} ({few})")
    changes = 0
    if target.fuses_alike:
        own = (schemes.get(layer.name, Scheme()) for layer in layers)
        changes = changes_between(
            one if type(one.pattern) in target.sparse_from else Scheme() for one in own
        )
    if changes > _UNAVOIDABLE_CHANGES:
        lines.append(
            f"dense and sparse layers take turns ({changes} changes in network order): "
            f"{target.runtime} fuses neighbours that are alike, and a change took it 10 to 40 us "
            "on a CIFAR-10 ResNet-20; prune neighbours alike, or ask for a latency budget, which "
            "counts changes"
        )
    slow = cpu_features is not None and INTEGER_PRODUCTS.isdisjoint(cpu_features)
    if quantized and slow and target.measured:
        lines.append(
            "this CPU has no 8-bit dot products (VNNI): int8 may be no faster than float here"
        )
    return lines
