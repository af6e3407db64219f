"""What a network costs: multiply-accumulates, bit operations and bytes, layer by layer.

Three counts, because the literature uses all three and they promise different speedups:

    macs            multiply-accumulates with a weight that is left, one sample (FLOPs = 2 · macs)
    bops            macs · max(weight bits, activation bits)      linear in the bit width
    bit_operations  macs · weight bits · activation bits          quadratic in the bit width

`bops` is the convention of OBC (arXiv 2208.11580, section 6): against float32, 8-bit weights and
activations are worth 4x, 4-bit ones 8x, and a 2:4 pattern another 2x. A float counts 32 bits.

Bias additions, activations and poolings are not counted. Counts are for one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from obc_deploy.errors import LayerError
from obc_deploy.schemes import Scheme, as_scheme

if TYPE_CHECKING:
    import torch

FLOAT_BITS = 32
"""Bits of a weight or an activation that nothing was done to."""


def conv_macs(
    out_channels: int,
    in_channels_per_group: int,
    kernel: Sequence[int],
    output_spatial: Sequence[int],
) -> int:
    """MACs of a convolution, one sample: out · in/groups · Π kernel · Π output.

    Taps that fall on the padding count: runtimes compute them. Stride and dilation are already in
    the output's size. Works for any number of spatial dimensions.
    """
    return out_channels * in_channels_per_group * math.prod(kernel) * math.prod(output_spatial)


def conv_transpose_macs(
    in_channels: int,
    out_channels_per_group: int,
    kernel: Sequence[int],
    input_spatial: Sequence[int],
) -> int:
    """MACs of a transposed convolution, one sample: in · out/groups · Π kernel · Π input.

    Every *input* position is multiplied with the whole kernel, so it is the input's size that
    counts, whatever the stride.
    """
    return in_channels * out_channels_per_group * math.prod(kernel) * math.prod(input_spatial)


def linear_macs(out_features: int, in_features: int, positions: int = 1) -> int:
    """MACs of a linear layer, one sample: out · in · positions.

    `positions` is how often the layer is applied to one sample (tokens of a sequence).
    """
    return out_features * in_features * positions


@dataclass(frozen=True)
class LayerCost:
    """One layer's cost, for one sample.

    Attributes:
        name: the layer's name.
        macs: multiply-accumulates of the dense layer.
        density: fraction of weights that are not zero, 0 to 1.
        weight_bits: bits of a stored weight (32 = float).
        activation_bits: bits of the layer's input (32 = float).
        weights: number of weights of the dense layer (0 where the layer has none).
    """

    name: str
    macs: int
    density: float = 1.0
    weight_bits: int = FLOAT_BITS
    activation_bits: int = FLOAT_BITS
    weights: int = 0

    def __post_init__(self) -> None:
        if self.macs < 0 or self.weights < 0:
            raise LayerError(
                f"layer '{self.name}' has {self.macs} MACs and {self.weights} weights; "
                "counts are 0 or more"
            )
        if not 0.0 <= self.density <= 1.0:
            raise LayerError(
                f"density {self.density:g} of layer '{self.name}' is not between 0 and 1; "
                "it is the fraction of weights that are not zero"
            )
        if min(self.weight_bits, self.activation_bits) < 1:
            raise LayerError(
                f"layer '{self.name}' has {self.weight_bits}-bit weights and "
                f"{self.activation_bits}-bit activations; a width is 1 bit or more"
            )

    @property
    def macs_left(self) -> int:
        """Multiply-accumulates with a weight that is not zero: macs · density."""
        return round(self.macs * self.density)

    @property
    def bops(self) -> int:
        """The paper's linear count: macs_left · max(weight bits, activation bits)."""
        return self.macs_left * max(self.weight_bits, self.activation_bits)

    @property
    def dense_bops(self) -> int:
        """The linear count of the dense float layer: macs · 32."""
        return self.macs * FLOAT_BITS

    @property
    def bit_operations(self) -> int:
        """The quadratic count: macs_left · weight bits · activation bits."""
        return self.macs_left * self.weight_bits * self.activation_bits

    @property
    def dense_bit_operations(self) -> int:
        """The quadratic count of the dense float layer: macs · 32 · 32."""
        return self.macs * FLOAT_BITS**2

    @property
    def weights_left(self) -> int:
        """Weights that are not zero."""
        return round(self.weights * self.density)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that are left, packed.

        What says where they are (masks, indices) and the grids' scales are not counted: that
        depends on the file, whose size an artifact states.
        """
        return -(-self.weights_left * self.weight_bits // 8)

    @property
    def dense_weight_bytes(self) -> int:
        """Bytes of the dense float weights."""
        return self.weights * FLOAT_BITS // 8


@dataclass(frozen=True)
class PredictedSpeedup:
    """How much faster than the dense float network operation counts promise."""

    macs: float
    bops: float


@dataclass(frozen=True)
class Costs:
    """A network's costs: sums over its layers, beside those of its dense float self. One sample."""

    macs: int
    bops: int
    bit_operations: int
    bytes: int
    dense_macs: int
    dense_bops: int
    dense_bit_operations: int
    dense_bytes: int

    @property
    def predicted_speedup(self) -> PredictedSpeedup | None:
        """Dense over left, by MACs and by BOPs; None where no operation is left to divide by."""
        if self.macs == 0 or self.bops == 0:
            return None
        return PredictedSpeedup(
            macs=self.dense_macs / self.macs,
            bops=self.dense_bops / self.bops,
        )


def layer_cost(
    name: str,
    macs: int,
    scheme: Scheme | str = "dense",
    *,
    density: float | None = None,
    weights: int = 0,
) -> LayerCost:
    """A layer's cost under a scheme.

    Args:
        name: the layer's name.
        macs: multiply-accumulates of the dense layer, one sample.
        scheme: what was done to the layer.
        density: the fraction of non-zero weights really found; the scheme's own where not given.
        weights: number of weights of the dense layer.

    Raises:
        SchemeError: the scheme cannot be read.
        LayerError: a count or the density is out of its range.
    """
    scheme = as_scheme(scheme)
    return LayerCost(
        name=name,
        macs=macs,
        density=scheme.density if density is None else density,
        weight_bits=scheme.weight_bits,
        activation_bits=scheme.activation_bits,
        weights=weights,
    )


def total(layers: Iterable[LayerCost]) -> Costs:
    """Sum of the layers' costs."""
    layers = tuple(layers)
    return Costs(
        macs=sum(layer.macs_left for layer in layers),
        bops=sum(layer.bops for layer in layers),
        bit_operations=sum(layer.bit_operations for layer in layers),
        bytes=sum(layer.weight_bytes for layer in layers),
        dense_macs=sum(layer.macs for layer in layers),
        dense_bops=sum(layer.dense_bops for layer in layers),
        dense_bit_operations=sum(layer.dense_bit_operations for layer in layers),
        dense_bytes=sum(layer.dense_weight_bytes for layer in layers),
    )


def module_costs(
    model: torch.nn.Module,
    example: torch.Tensor | tuple[torch.Tensor, ...],
    schemes: Mapping[str, Scheme | str] | None = None,
    *,
    densities: Mapping[str, float] | None = None,
) -> dict[str, LayerCost]:
    """Cost of every convolution and linear layer, from the shapes of one forward pass.

    The model runs once in evaluation mode on `example`, whose first dimension is the batch; costs
    are per sample. A layer that runs several times in a pass counts each time. Layers that no
    scheme names are dense floats. Products without a weight (attention) are not counted.

    Args:
        model: left as it was, training modes of its modules included.
        example: the model's input, or the tuple of its inputs.
        schemes: layer name to scheme.
        densities: layer name to the fraction of non-zero weights really found.

    Raises:
        LayerError: `schemes` or `densities` name a layer that did not run.
    """
    import torch
    from torch import nn

    inputs = example if isinstance(example, tuple) else (example,)
    batch = int(inputs[0].shape[0])
    macs: dict[str, int] = {}
    weights: dict[str, int] = {}

    def count(name: str, layer: nn.Module, args: Any, out: torch.Tensor) -> None:
        if isinstance(layer, nn.Linear):
            samples = out.numel() // layer.out_features
            found = linear_macs(layer.out_features, layer.in_features, samples)
        elif isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            spatial = args[0].shape[-len(layer.kernel_size) :]
            found = batch * conv_transpose_macs(
                layer.in_channels, layer.out_channels // layer.groups, layer.kernel_size, spatial
            )
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            spatial = out.shape[-len(layer.kernel_size) :]
            found = batch * conv_macs(
                layer.out_channels, layer.in_channels // layer.groups, layer.kernel_size, spatial
            )
        macs[name] = macs.get(name, 0) + found
        weights[name] = layer.weight.numel()

    kinds = (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
    training = {module: module.training for module in model.modules()}
    handles = [
        module.register_forward_hook(
            lambda layer, args, out, name=name: count(name, layer, args, out)
        )
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode

    for named in (schemes or {}, densities or {}):
        for name in named:
            if name not in macs:
                raise LayerError(
                    f"no layer '{name}' ran in the forward pass; the counted layers are "
                    f"{', '.join(macs) or 'none'}"
                )
    return {
        name: layer_cost(
            name,
            found // batch,
            (schemes or {}).get(name, "dense"),
            density=(densities or {}).get(name),
            weights=weights[name],
        )
        for name, found in macs.items()
    }
