"""Activation ranges: calibrated intervals of a network's intermediate values, and their grids.

A range is found per tensor by one of three methods:

    min-max      the smallest and largest value seen
    percentile   the interval that leaves out the outermost share of values
    mse          the interval whose 8-bit grid has the least mean squared error

Ranges always include zero, so that zero padding and ReLU's floor are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from obc_deploy.capture import Network
from obc_deploy.data import Batches
from obc_deploy.errors import CalibrationError

HISTOGRAM_BINS = 4096
PERCENTILE = 99.99
MSE_STEPS = 100
FLOAT8_MAX = 448.0
"""The largest E4M3 float."""
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


class RangeMethod(Enum):
    """How a range is found from the values seen."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MSE = "mse"


@dataclass(frozen=True)
class ActivationRange:
    """The interval of real values that a tensor's grid covers; low <= 0 <= high."""

    low: float
    high: float


@dataclass(frozen=True)
class ActivationGrid:
    """A tensor's uniform grid: real = (code - zero_point) * scale, codes of `bits` bits.

    `signed` grids are symmetric (zero point 0, what TensorRT takes); unsigned ones have a zero
    point of their own, 0 where nothing is negative (what CPU runtimes are fast on). A `float8` one
    is no uniform grid: its codes are E4M3 floats.
    """

    scale: float
    zero_point: int
    bits: int = 8
    signed: bool = False
    float8: bool = False

    @property
    def code_min(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def code_max(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1


def activation_grid(
    interval: ActivationRange, *, bits: int = 8, signed: bool = False, float8: bool = False
) -> ActivationGrid:
    """The grid over a range.

    The scale is rounded to float32 first, since that is what the file holds; a range too narrow for
    a normal float32 scale gets the smallest one.
    """
    low, high = min(interval.low, 0.0), max(interval.high, 0.0)
    if float8:
        step = float(np.float32((max(-low, high) or 1.0) / FLOAT8_MAX))
        return ActivationGrid(max(step, _SMALLEST_SCALE), 0, signed=True, float8=True)
    levels = (1 << (bits - 1 if signed else bits)) - 1
    width = max(-low, high) if signed else high - low
    scale = max(float(np.float32((width or 1.0) / levels)), _SMALLEST_SCALE)
    if signed:
        return ActivationGrid(scale, 0, bits, signed=True)
    zero_point = int(np.clip(round(-low / scale), 0, levels))
    return ActivationGrid(scale, zero_point, bits)


class _Extremes:
    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0

    def add(self, values: Tensor) -> None:
        low, high = torch.aminmax(values)
        # Unlike min and max these keep a NaN, which must not go unseen.
        self.low = float(np.minimum(self.low, float(low)))
        self.high = float(np.maximum(self.high, float(high)))


class _Histogram:
    def __init__(self, extremes: _Extremes) -> None:
        self.low = extremes.low
        self.high = extremes.high if extremes.high > extremes.low else extremes.low + 1.0
        self.counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        counted = torch.histc(values.float(), HISTOGRAM_BINS, self.low, self.high)
        self.counts += counted.double().cpu()


class _ValueWatcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, sinks: Mapping[str, Any]) -> None:
        super().__init__(module)
        self._sinks = sinks

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        sink = self._sinks.get(n.name)
        if sink is not None and isinstance(value, Tensor) and value.is_floating_point():
            sink.add(value)
        return value


def _percentile(histogram: _Histogram, percentile: float) -> ActivationRange:
    share = histogram.counts.cumsum(0) / histogram.counts.sum()
    step = (histogram.high - histogram.low) / HISTOGRAM_BINS
    tail = (1.0 - percentile / 100.0) / (2.0 if histogram.low < 0 else 1.0)
    high_bin = int(torch.searchsorted(share, torch.tensor(1.0 - tail, dtype=torch.float64)))
    high = histogram.low + step * (min(high_bin, HISTOGRAM_BINS - 1) + 1)
    low = 0.0
    if histogram.low < 0:
        low_bin = int(torch.searchsorted(share, torch.tensor(tail, dtype=torch.float64)))
        low = histogram.low + step * low_bin
    return ActivationRange(min(low, 0.0), max(high, 0.0))


def grid_error(
    values: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], grid: ActivationGrid
) -> float:
    """Σ count · (value - nearest grid point)², clipping included."""
    codes = np.clip(np.round(values / grid.scale) + grid.zero_point, grid.code_min, grid.code_max)
    return float(np.sum(counts * (values - (codes - grid.zero_point) * grid.scale) ** 2))


def _least_squares(histogram: _Histogram) -> ActivationRange:
    step = (histogram.high - histogram.low) / HISTOGRAM_BINS
    counts: npt.NDArray[np.float64] = histogram.counts.numpy()
    values = histogram.low + step * (np.arange(HISTOGRAM_BINS, dtype=np.float64) + 0.5)
    filled = counts > 0
    values, counts = values[filled], counts[filled]
    full = ActivationRange(min(histogram.low, 0.0), max(histogram.high, 0.0))
    best, least = full, grid_error(values, counts, activation_grid(full))
    for index in range(1, MSE_STEPS):
        shrink = 1.0 - 0.8 * index / MSE_STEPS
        interval = ActivationRange(full.low * shrink, full.high * shrink)
        error = grid_error(values, counts, activation_grid(interval))
        if error < least:
            best, least = interval, error
    return best


def collect_ranges(
    network: Network,
    tensors: Collection[str],
    batches: Batches,
    *,
    method: RangeMethod = RangeMethod.MSE,
    percentile: float = PERCENTILE,
    progress: Callable[[float], None] | None = None,
) -> dict[str, ActivationRange]:
    """Ranges of the named nodes' values over the calibration batches.

    Min-max needs one pass, the others a second one for histograms.

    Args:
        network: the network whose values are watched.
        tensors: names of graph nodes.
        batches: the calibration batches.
        method: how ranges are found.
        percentile: share of values kept by the percentile method, in percent.
        progress: called with the share of the work done.

    Raises:
        CalibrationError: a value is not finite.
    """
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    passes = 1 if method is RangeMethod.MIN_MAX else 2

    def sweep(sinks: Mapping[str, Any], done: int) -> None:
        watcher = _ValueWatcher(network.module, sinks)
        with torch.no_grad():
            for seen, batch in enumerate(batches, start=1):
                watcher.run(*(tensor.to(device) for tensor in batch))
                if progress is not None:
                    progress((done + seen / len(batches)) / passes)

    extremes = {name: _Extremes() for name in tensors}
    sweep(extremes, 0)
    for name, found in extremes.items():
        if not np.isfinite([found.low, found.high]).all():
            raise CalibrationError(
                f"the values of '{name}' reach {found.low} to {found.high} on the calibration "
                "samples; check the pre-processing (scale, mean, std)"
            )
    if method is RangeMethod.MIN_MAX:
        return {name: ActivationRange(e.low, e.high) for name, e in extremes.items()}
    histograms = {name: _Histogram(found) for name, found in extremes.items()}
    sweep(histograms, 1)
    if method is RangeMethod.PERCENTILE:
        return {name: _percentile(h, percentile) for name, h in histograms.items()}
    return {name: _least_squares(h) for name, h in histograms.items()}
