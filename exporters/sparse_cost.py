"""What an operator costs in ONNX Runtime and in our kernels, from measurements.

Nanoseconds on one thread, as sums of counts times constants. The constants are fits to what
`obc_deploy.benchmarks.sparse_layer_costs` measured, interleaved in one process, on an Intel Xeon at
2.5 GHz (Cascade Lake, AVX512-VNNI) with ONNX Runtime 1.31: 24 convolutions of ResNets, VGG and
MobileNet at 0 to 90 % zero blocks, 10 depthwise ones, 9 planes and 5 fully connected layers; in
float the same convolutions at 50 to 95 % zeros, and the fully connected layers at 1, 16 and 128
rows. In the geometric mean a fit is off by a factor of 1.19 for ONNX Runtime's convolutions, 1.18
for ours, 1.04 to 1.7 for the rest; in float by 1.23 and 1.26 for convolutions, 1.08 to 1.88 for
fully connected layers. The call of a sparse convolution was measured again in chains of small ones,
after it had become 5 us shorter. Another processor's times differ more than the ratios that decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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


_NANOSECONDS: Mapping[str, Mapping[str, float]] = {
    "QLinearConv": {
        "call": 9800,
        "multiplications": 0.00357,
        "results": 0.262,
        "columns": 0.0807,
        "odd_columns": 1.03,
        "weights": 0.0433,
    },
    "SparseConvolution": {
        "call": 5000,
        "band_pixels": 0.0271,
        "blocks": 0.675,
        "results": 0.269,
        "channels_in": 0.0694,
        "residuals": 0.475,
    },
    "QuantizeLinear": {"call": 7510, "elements": 0.328},
    "QuantizeToBlocks": {"call": 10900, "lanes": 0.358, "lines": 30.4},
    "DequantizeLinear": {"call": 6150, "elements": 0.292},
    "DequantizeFromBlocks": {"call": 3210, "lanes": 0.295, "lines": 71},
    "QLinearConv depthwise": {"call": 8840, "taps": 0.0864},
    "DepthwiseConvolution": {"call": 5240, "lane_taps": 0.0607, "line_taps": 8.95},
    "Transpose": {"call": 4150, "elements": 0.134},
    "QLinearAdd": {"call": 7290, "elements": 0.285},
    "Add": {"call": 6110, "lanes": 0.493, "lines": 5.5},
    "QLinearConcat": {"call": 5930, "elements": 0.0903},
    "Concat": {"call": 7190, "lanes": 0.148, "lines": 1.85},
    "NchwMaxPool": {"call": 17800, "taps": 6.63},
    "NhwcMaxPool": {"call": 6390, "taps": 0.113},
    "MaxPool": {"call": 5780, "lane_taps": 0.072, "line_taps": 5.86},
    "QLinearAveragePool": {"call": 13300, "taps": 4.65},
    "AveragePool": {"call": 3340, "lane_taps": 1.44, "line_taps": 19.2},
    "QLinearGlobalAveragePool": {"call": 6470, "elements": 0.119},
    "GlobalAveragePool": {"call": 5910, "lanes": 0.0461, "lines": 9.09},
    "FromBlocks": {"call": 5340, "lanes": 0.141, "lines": 3.02},
    "ToBlocks": {"call": 5120, "lanes": 0.145, "lines": 0.835},
    "Conv": {
        "call": 4360,
        "multiplications": 0.0204,
        "results": 0.34,
        "columns": 0.046,
        "weights": 0.319,
    },
    "SparseConvolutionFloat": {
        "call": 900,
        "block_pixels": 0.0733,
        "results": 1.79,
        "channels_in": 2.3,
    },
    "Gemm row": {"call": 9460, "multiplications": 0.21},
    "Gemm rows": {"call": 12900, "multiplications": 0.0294},
    "SparseLinearFloat row": {"call": 14700, "block_pixels": 1.2, "results": 10.1},
    "SparseLinearFloat rows": {
        "call": 18400,
        "block_pixels": 0.13,
        "results": 0.347,
        "columns": 1.97,
    },
    "QGemm": {"call": 6080, "multiplications": 0.0579},
    "SparseLinearDequantize": {"call": 7910, "block_pixels": 0.905, "results": 16},
}


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
    return sum(cost * work.counts[count] for count, cost in _NANOSECONDS[operator].items())


def residual_ns(results: int) -> float:
    """What a sparse convolution takes longer where it adds a residual to so many results."""
    return _NANOSECONDS["SparseConvolution"].get("residuals", 0.0) * results
