"""What an operator costs in ONNX Runtime and in our kernels, from measurements.

Nanoseconds on one thread, as sums of counts times constants that were measured on two processors
(`operator_costs`); those of this machine's maker are taken. Where the file is to run on the other,
the times differ more than the ratios that decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from obc_deploy.exporters.operator_costs import deciding_costs
from obc_deploy.exporters.sparse_blocks import BLOCK

_PLAIN = ("call", "elements")
_BLOCKED = ("call", "lanes", "lines")
_PLAIN_POOL = ("call", "elements", "taps")
_BLOCKED_POOL = ("call", "lane_taps", "line_taps")
_CONVOLUTION = ("call", "multiplications", "results", "columns", "odd_columns", "weights")
COUNTS: Mapping[str, tuple[str, ...]] = {
    "QLinearConv": _CONVOLUTION,
    "SparseConvolution": ("call", "band_pixels", "blocks", "results", "channels_in", "residuals"),
    "QLinearConv depthwise": _PLAIN_POOL,
    "DepthwiseConvolution": _BLOCKED_POOL,
    "Conv": ("call", "multiplications", "results", "columns", "weights"),
    "SparseConvolutionFloat": ("call", "block_pixels", "results", "channels_in"),
    "Gemm row": ("call", "multiplications", "results"),
    "Gemm rows": ("call", "multiplications", "results"),
    "SparseLinearFloat row": ("call", "block_pixels", "results"),
    "SparseLinearFloat rows": ("call", "block_pixels", "results", "columns"),
    "QGemm": ("call", "multiplications", "results"),
    "SparseLinearDequantize": ("call", "block_pixels", "results"),
    "NhwcMaxPool": _PLAIN_POOL,
    "NchwMaxPool": _PLAIN_POOL,
    "MaxPool": _BLOCKED_POOL,
    "QLinearAveragePool": _PLAIN_POOL,
    "AveragePool": _BLOCKED_POOL,
    **dict.fromkeys(
        (
            "QuantizeLinear", "DequantizeLinear", "Transpose", "QLinearAdd", "QLinearConcat",
            "QLinearGlobalAveragePool",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(
        (
            "QuantizeToBlocks", "DequantizeFromBlocks", "FromBlocks", "ToBlocks", "Add", "Concat",
            "GlobalAveragePool",
        ),
        _BLOCKED,
    ),
}  # fmt: skip
"""By operator, the counts that its time is the sum of.

ONNX Runtime pools codes channels last behind a convolution of its own (NhwcMaxPool), and else in a
plain loop, forty times slower (NchwMaxPool).
"""


FLOAT_TILE = 128
"""Pixels that a kernel for floats computes at a time, with AVX-512."""
FEW_ROWS = 8
"""Rows below which a fully connected layer is a product with each row by itself."""


@dataclass(frozen=True)
class Work:
    """How much an operator has to do, by name of the count; `name` where it is not the type's."""

    counts: Mapping[str, float]
    name: str | None = None

    def named(self, name: str) -> Work:
        """The same under a name of its own."""
        return replace(self, name=name)

    @classmethod
    def of_plane(cls, channels: int, height: int, width: int, positions: int = 1) -> Work:
        """An operator that does as much for each element of its input or output.

        Args:
            channels: of the tensor.
            height: of its planes; times the images.
            width: of its planes.
            positions: kernel height times width, of pools and depthwise convolutions.
        """
        elements = float(channels * height * width)
        lines = float(-(-channels // BLOCK) * height)
        return cls(
            {
                "call": 1.0,
                "elements": elements,
                "taps": elements * positions,
                "lanes": lines * width * BLOCK,
                "lines": lines,
                "lane_taps": lines * width * BLOCK * positions,
                "line_taps": lines * positions,
            }
        )

    @classmethod
    def of_linear(cls, rows: int, features: int, outputs: int, blocks: int) -> Work:
        """A fully connected layer."""
        return cls(
            {
                "call": 1.0,
                "multiplications": float(rows * features * outputs),
                "results": float(rows * outputs),
                "columns": float(rows * features),
                "block_pixels": float(rows * blocks),
                "weights": float(features * outputs),
            }
        )

    @classmethod
    def of_convolution(
        cls,
        *,
        pixels: int,
        in_pixels: int,
        channels: int,
        outputs: int,
        positions: int,
        blocks: int,
        residual: bool = False,
    ) -> Work:
        """A convolution.

        Args:
            pixels: of the output, all images together.
            in_pixels: of the input.
            channels: input channels.
            outputs: output channels.
            positions: kernel height times width.
            blocks: blocks with a non-zero weight.
            residual: whether a residual is added to the result.
        """
        columns = float(pixels) * channels * positions
        return cls(
            {
                "call": 1.0,
                "multiplications": float(pixels) * channels * positions * outputs,
                "results": float(pixels) * outputs,
                "weights": float(channels) * positions * outputs,
                "columns": columns,
                "odd_columns": columns if channels % BLOCK else 0.0,
                "block_pixels": float(pixels) * blocks,
                "band_pixels": pixels
                * _in_bands(blocks, outputs * positions * -(-channels // BLOCK)),
                "blocks": float(blocks),
                "channels_in": float(in_pixels) * channels,
                "residuals": float(pixels) * outputs * residual,
            }
        )

    @classmethod
    def of_float_convolution(
        cls,
        *,
        images: int,
        in_size: tuple[int, int],
        out_size: tuple[int, int],
        channels: int,
        outputs: int,
        positions: int,
        entries: int,
    ) -> Work:
        """A convolution of floats; our kernel computes a row's pixels and the padding behind them.

        Args:
            images: of the batch.
            in_size: height and width of the input.
            out_size: height and width of the output.
            channels: input channels.
            outputs: output channels.
            positions: kernel height times width.
            entries: weights that are not zero.
        """
        height, width = out_size
        work = cls.of_convolution(
            pixels=images * height * width, in_pixels=images * in_size[0] * in_size[1],
            channels=channels, outputs=outputs, positions=positions, blocks=entries,
        )  # fmt: skip
        border = 2 if positions > 1 else 0
        line = height * (width + border) - border
        tiled = images * -(-line // FLOAT_TILE) * FLOAT_TILE
        return cls({**work.counts, "block_pixels": float(tiled) * entries})


def _in_bands(blocks: int, most: int) -> float:
    """As many blocks of channels on their own as would take as long: few share what they load.

    Two or four output channels load the pixels of all blocks that one of them has, and a block then
    takes 0.75 or 0.7 of its time (`runtimes/sparse/bands.cpp`): it pays where most are there.

    Args:
        blocks: with a non-zero weight, anywhere.
        most: blocks in all.
    """
    density = min(blocks / most, 1.0)
    pair, four = (1.0 - (1.0 - density) ** channels for channels in (2, 4))
    return most * min(density, 0.75 * pair, 0.7 * four)


def nanoseconds(operator: str, work: Work) -> float:
    """What an operator takes on one thread.

    Args:
        operator: a key of `COUNTS`.
        work: how much it has to do.
    """
    return sum(cost * work.counts[count] for count, cost in deciding_costs()[operator].items())


def residual_ns(results: int) -> float:
    """What a sparse convolution takes longer where it adds a residual to so many results."""
    return deciding_costs()["SparseConvolution"].get("residuals", 0.0) * results
