"""Which kernel a layer gets on an NVIDIA GPU without TensorRT, and why not a faster one.

A 2:4 weight, or 8-bit or 4-bit codes, are worth something where PyTorch has a matrix product for
them: linears, and 1x1 convolutions, which are products over pixels. Everything else stays dense.
Choosing reads facts alone; no GPU is needed for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from obc_deploy.layers import Layer
    from obc_deploy.solvers.contract import CompressedLayer


class Arithmetic(Enum):
    """What the products of a session are computed in; the rest of the network runs in a float."""

    FLOAT16 = "fp16"
    BFLOAT16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"

    @property
    def is_float(self) -> bool:
        """Whether weights and activations are both 16-bit floats."""
        return self in (Arithmetic.FLOAT16, Arithmetic.BFLOAT16)


class Kernel(Enum):
    """A product of one layer."""

    DENSE = "dense"
    SPARSE = "2:4"
    INT8 = "int8"
    SPARSE_INT8 = "2:4+int8"
    FP8 = "fp8"
    SPARSE_FP8 = "2:4+fp8"
    INT4 = "int4"


_SPARSE = {
    Arithmetic.FLOAT16: Kernel.SPARSE,
    Arithmetic.BFLOAT16: Kernel.SPARSE,
    Arithmetic.INT8: Kernel.SPARSE_INT8,
    Arithmetic.FP8: Kernel.SPARSE_FP8,
}
_PLAIN = {
    Arithmetic.FLOAT16: Kernel.DENSE,
    Arithmetic.BFLOAT16: Kernel.DENSE,
    Arithmetic.INT8: Kernel.INT8,
    Arithmetic.FP8: Kernel.FP8,
    Arithmetic.INT4: Kernel.INT4,
}
_SPARSE_MULTIPLE = {
    Arithmetic.FLOAT16: 16, Arithmetic.BFLOAT16: 16, Arithmetic.INT8: 32, Arithmetic.FP8: 32,
}  # fmt: skip
"""What cuSPARSELt wants rows and columns of a 2:4 weight to be multiples of."""
_PLAIN_MULTIPLE = {Arithmetic.INT8: 8, Arithmetic.FP8: 16}
"""The same for the dense products."""
INT4_GROUPS = (256, 128, 64, 32)
"""Columns that may share a scale in PyTorch's 4-bit product."""


@dataclass(frozen=True)
class GpuAbilities:
    """What the products need to know of a device.

    Attributes:
        name: the device, for messages.
        compute_capability: (major, minor); None for the CPU, which has the 8-bit and 4-bit
            products but no 2:4 ones.
        cusparselt: PyTorch was built with cuSPARSELt and it loads.
    """

    name: str
    compute_capability: tuple[int, int] | None
    cusparselt: bool

    @classmethod
    def of(cls, device: torch.device) -> GpuAbilities:
        """The abilities of a device that is here."""
        import torch

        if device.type != "cuda":
            return cls("the CPU", None, cusparselt=False)
        return cls(
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
            cusparselt=torch.backends.cusparselt.is_available(),
        )

    def lacks(self, arithmetic: Arithmetic) -> str | None:
        """Why there is no dense product of that arithmetic, or None where there is one."""
        least = {Arithmetic.BFLOAT16: (8, 0), Arithmetic.INT8: (7, 5), Arithmetic.FP8: (8, 9),
                 Arithmetic.INT4: (8, 0)}.get(arithmetic)  # fmt: skip
        found = self.compute_capability
        if least is None or found is None or found >= least:
            return None
        return (
            f"{arithmetic.value} needs compute capability {_version(least)}, and {self.name} "
            f"has {_version(found)}"
        )

    @property
    def lacks_sparsity(self) -> str | None:
        """Why there is no 2:4 product, or None where there is one."""
        if self.compute_capability is None:
            return f"{self.name} has no 2:4 product"
        if self.compute_capability < (8, 0):
            return (
                f"2:4 needs compute capability 8.0, and {self.name} has "
                f"{_version(self.compute_capability)}"
            )
        if not self.cusparselt:
            return "this PyTorch has no cuSPARSELt"
        return None


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


@dataclass(frozen=True)
class LayerFacts:
    """A layer as far as its kernel goes.

    Attributes:
        name: the layer.
        rows: output channels.
        cols: inputs of one output value.
        not_a_product: why it is no plain matrix product, or None.
        is_two_four: at most two of each four consecutive weights of a row are not zero.
        is_sparse: it has a mask that prunes something.
        weight_bits: of its codes; None without codes.
        activation_bits: that its input is to be in; None for a float input.
        symmetric: all zero points are 0.
        grid_group: columns that share a grid step; `cols` for one step a row.
        has_range: a range of its input was calibrated.
    """

    name: str
    rows: int
    cols: int
    not_a_product: str | None = None
    is_two_four: bool = False
    is_sparse: bool = False
    weight_bits: int | None = None
    activation_bits: int | None = None
    symmetric: bool = True
    grid_group: int | None = None
    has_range: bool = False


@dataclass(frozen=True)
class KernelChoice:
    """What one layer runs on.

    Attributes:
        layer: its name.
        kernel: the kernel.
        reason: why it is not the kernel that was asked for; None where it is.
    """

    layer: str
    kernel: Kernel
    reason: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """JSON-ready values."""
        return {"layer": self.layer, "kernel": self.kernel.value, "reason": self.reason}


def is_two_four(matrix: Tensor) -> bool:
    """Whether at most two of each four consecutive columns of every row are not zero."""
    rows, cols = matrix.shape
    return cols % 4 == 0 and bool(((matrix.reshape(rows, -1, 4) != 0).sum(2) <= 2).all())


def layer_facts(
    layer: Layer, weight: Tensor, form: CompressedLayer[Tensor] | None, *, has_range: bool
) -> LayerFacts:
    """The facts of a layer of a network.

    Args:
        layer: the layer.
        weight: its (rows, cols) matrix.
        form: its compressed form, or None where it is dense.
        has_range: whether a range of its input is known.
    """
    quantization = None if form is None or form.codes is None else form.scheme.quantization
    return LayerFacts(
        name=layer.name,
        rows=layer.rows,
        cols=layer.cols,
        not_a_product=_obstacle(layer),
        is_two_four=is_two_four(weight),
        is_sparse=form is not None and form.scheme.pattern is not None,
        weight_bits=None if quantization is None else quantization.weight_bits,
        activation_bits=None if quantization is None else quantization.activation_bits,
        symmetric=form is None or form.zero_point is None or not bool(form.zero_point.any()),
        grid_group=None if quantization is None else quantization.group or layer.cols,
        has_range=has_range,
    )


def _obstacle(layer: Layer) -> str | None:
    from obc_deploy.layers import LayerKind

    if layer.kind is LayerKind.LINEAR:
        return None
    kernel = "x".join(map(str, layer.weight_shape[2:]))
    if layer.kind is LayerKind.CONV_TRANSPOSE2D:
        return f"a {kernel} transposed convolution is no matrix product"
    if layer.groups > 1:
        return f"a convolution of {layer.groups} groups is no single matrix product"
    if any(size > 1 for size in layer.weight_shape[2:]):
        return (
            f"a {kernel} convolution has only a dense float kernel in PyTorch; TensorRT has others"
        )
    if any(before or after for before, after in layer.padding):
        return "a padded 1x1 convolution is no plain matrix product"
    if layer.kind is not LayerKind.CONV2D:
        return "only 2-d convolutions of 1x1 are run as matrix products"
    return None


def choose_kernel(
    facts: LayerFacts, arithmetic: Arithmetic, gpu: GpuAbilities, *, sparse: bool = True
) -> KernelChoice:
    """The kernel of a layer: 2:4 where the weight is, the arithmetic that was asked for, or dense.

    Args:
        facts: of the layer.
        arithmetic: what products are to be computed in.
        gpu: where.
        sparse: whether 2:4 products may be used.
    """

    def chosen(kernel: Kernel, reason: str | None = None) -> KernelChoice:
        return KernelChoice(facts.name, kernel, reason)

    if arithmetic.is_float and not (sparse and facts.is_sparse):
        return chosen(Kernel.DENSE, gpu.lacks(arithmetic))
    obstacle = facts.not_a_product or _lacks_arithmetic(facts, arithmetic, gpu)
    if obstacle is not None:
        return chosen(Kernel.DENSE, obstacle)
    plain = _PLAIN[arithmetic]
    if not sparse or not facts.is_sparse:
        return chosen(plain)
    obstacle = _lacks_sparsity(facts, arithmetic, gpu)
    return chosen(_SPARSE[arithmetic]) if obstacle is None else chosen(plain, obstacle)


def _lacks_arithmetic(facts: LayerFacts, arithmetic: Arithmetic, gpu: GpuAbilities) -> str | None:
    """Why the layer has no product of that arithmetic."""
    lacking = gpu.lacks(arithmetic)
    if lacking is not None or arithmetic.is_float:
        return lacking
    multiple = _PLAIN_MULTIPLE.get(arithmetic)
    if multiple is not None and (facts.rows % multiple or facts.cols % multiple):
        return (
            f"{facts.rows}x{facts.cols} are no multiples of {multiple}, which "
            f"{arithmetic.value} products need"
        )
    if arithmetic is Arithmetic.INT8:
        return _lacks_int8(facts)
    if arithmetic is Arithmetic.INT4:
        return _lacks_int4(facts)
    return None


def _lacks_int8(facts: LayerFacts) -> str | None:
    if facts.weight_bits is None or facts.activation_bits is None:
        return "its scheme leaves weights or activations in float"
    if not facts.symmetric:
        return "its grid is asymmetric; int8 products want zero points of 0"
    if facts.grid_group != facts.cols:
        return f"{facts.grid_group} columns share a grid step; int8 products want one a row"
    if not facts.has_range:
        return "no range of its input was calibrated"
    return None


def _lacks_int4(facts: LayerFacts) -> str | None:
    if facts.weight_bits is None or facts.weight_bits > 4:
        return "its weights are not on a grid of 4 bits or less"
    if int4_group(facts.cols, facts.grid_group or facts.cols) is None:
        return (
            f"{facts.cols} columns with a grid step for each {facts.grid_group} do not divide into "
            f"groups of {', '.join(map(str, sorted(INT4_GROUPS)))}"
        )
    if facts.rows % 8:
        return f"{facts.rows} output channels are no multiple of 8, which 4-bit products need"
    return None


def int4_group(cols: int, grid_group: int) -> int | None:
    """The widest group of columns that a 4-bit product can take for a grid, or None."""
    fits = (g for g in INT4_GROUPS if cols % g == 0 and grid_group % g == 0)
    return next(fits, None)


def _lacks_sparsity(facts: LayerFacts, arithmetic: Arithmetic, gpu: GpuAbilities) -> str | None:
    """Why the layer has no 2:4 product of an arithmetic that it has a dense product of."""
    if arithmetic not in _SPARSE:
        return f"there is no 2:4 product of {arithmetic.value} weights"
    if not facts.is_two_four:
        return "its zeros are no 2:4 pattern"
    multiple = _SPARSE_MULTIPLE[arithmetic]
    if facts.rows % multiple or facts.cols % multiple:
        return (
            f"{facts.rows}x{facts.cols} are no multiples of {multiple}, which 2:4 products of "
            f"{arithmetic.value} need"
        )
    return gpu.lacks_sparsity
