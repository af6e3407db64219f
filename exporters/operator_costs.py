"""Nanoseconds of operators on processors that they were measured on: one thread, one count of work.

Fits to what `obc_deploy.benchmarks.sparse_layer_costs` measured, interleaved in one process, with
ONNX Runtime 1.31: 24 convolutions of ResNets, VGG and MobileNet at 0 to 90 % zero blocks, 10
depthwise ones, 9 planes and 5 fully connected layers; in float the same convolutions at 50 to 95 %
zeros, and the fully connected layers at 1, 16 and 128 rows. `call` holds what ONNX
Runtime's trace adds to an operator, on both sides. What the counts are is said in `sparse_cost`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from obc_deploy.runtimes.fingerprint import take_fingerprint
from obc_deploy.targets import Processor, Target

Costs = Mapping[str, Mapping[str, float]]

CASCADE_LAKE: Costs = {
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
"""Intel Xeon at 2.5 GHz with AVX512-VNNI.

In the geometric mean off by a factor of 1.19 for ONNX Runtime's convolutions, 1.18 for ours, 1.04
to 1.7 for the rest; in float 1.23 and 1.26 for convolutions, 1.08 to 1.88 for fully connected
layers. The call of a sparse convolution was measured again in chains of small ones, after it had
become 5 us shorter.
"""

ZEN_4: Costs = {
    "QLinearConv": {
        "call": 4310,
        "multiplications": 0.00406,
        "results": 0.0964,
        "columns": 0.0359,
        "odd_columns": 0.493,
        "weights": 0.011,
    },
    "SparseConvolution": {
        "call": 3690,
        "band_pixels": 0.0236,
        "blocks": 0.219,
        "results": 0.0644,
        "channels_in": 0.0199,
        "residuals": 0.253,
    },
    "QuantizeLinear": {"call": 2700, "elements": 0.122},
    "QuantizeToBlocks": {"call": 3910, "lanes": 0.107, "lines": 11.5},
    "DequantizeLinear": {"call": 2620, "elements": 0.109},
    "DequantizeFromBlocks": {"call": 1370, "lanes": 0.123, "lines": 27.3},
    "QLinearConv depthwise": {"call": 3520, "taps": 0.0456},
    "DepthwiseConvolution": {"call": 2220, "lane_taps": 0.043, "line_taps": 2.46},
    "Transpose": {"call": 1720, "elements": 0.0563},
    "QLinearAdd": {"call": 3240, "elements": 0.141},
    "Add": {"call": 2680, "lanes": 0.238, "lines": 1.32},
    "QLinearConcat": {"call": 2980, "elements": 0.0324},
    "Concat": {"call": 2820, "lanes": 0.0356, "lines": 1.88},
    "NchwMaxPool": {"taps": 2.1},
    "NhwcMaxPool": {"call": 2580, "taps": 0.0463},
    "MaxPool": {"call": 2240, "lane_taps": 0.0213, "line_taps": 2.59},
    "QLinearAveragePool": {"call": 3770, "taps": 2.08},
    "AveragePool": {"call": 736, "lane_taps": 0.558, "line_taps": 8.62},
    "QLinearGlobalAveragePool": {"call": 2920, "elements": 0.0414},
    "GlobalAveragePool": {"call": 2180, "lanes": 0.031, "lines": 4.38},
    "FromBlocks": {"call": 2200, "lanes": 0.0435, "lines": 1.26},
    "ToBlocks": {"call": 1820, "lanes": 0.0483, "lines": 0.587},
    "Conv": {"call": 1860, "multiplications": 0.0166, "results": 0.149, "weights": 0.0626},
    "SparseConvolutionFloat": {
        "call": 5030,
        "block_pixels": 0.0373,
        "results": 0.457,
        "channels_in": 0.351,
    },
    "Gemm row": {"call": 3270, "multiplications": 0.0778},
    "Gemm rows": {"call": 2990, "multiplications": 0.0219},
    "SparseLinearFloat row": {"call": 2990, "block_pixels": 0.416, "results": 11.4},
    "SparseLinearFloat rows": {
        "call": 2600,
        "block_pixels": 0.0742,
        "results": 0.202,
        "columns": 0.749,
    },
    "QGemm": {"call": 2930, "multiplications": 0.0189},
    "SparseLinearDequantize": {"call": 3080, "block_pixels": 0.389, "results": 2.81},
}
"""AMD EPYC at 3.6 GHz with AVX512-VNNI.

In the geometric mean off by a factor of 1.07 for ONNX Runtime's convolutions, 1.09 for ours, 1.02
to 1.6 for the rest; in float 1.08 and 1.14 for convolutions, 1.05 to 2.0 for fully connected
layers.
"""


COSTS: Mapping[Processor, Costs] = {
    Processor.CASCADE_LAKE: CASCADE_LAKE,
    Processor.ZEN_4: ZEN_4,
}

_chosen: ContextVar[Processor | None] = ContextVar("processor", default=None)


@cache
def processor_here() -> Processor:
    """The one that this machine's is most like: its maker's."""
    return Processor.ZEN_4 if "AMD" in take_fingerprint().cpu else Processor.CASCADE_LAKE


def processor_of(target: Target) -> Processor | None:
    """Whose costs decide between kernels in files for a target; None where it has no choice."""
    return (target.processor or processor_here()) if target.sparse_operators else None


@contextmanager
def costs_of(processor: Processor | None) -> Iterator[None]:
    """Within it a processor's costs decide; None is the one of `processor_here`."""
    before = _chosen.set(processor)
    try:
        yield
    finally:
        _chosen.reset(before)


def deciding_costs() -> Costs:
    """Of the processor that `costs_of` named, else of this machine's kind."""
    return COSTS[_chosen.get() or processor_here()]
