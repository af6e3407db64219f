"""Grids (scale s, zero point z): minimise Σ |(clamp(round(w/s) + z) - z) s - w|^2.4 over s.

The range of a row's (or group's) weights, always widened to include 0, is shrunk in 80 steps, to
1.00, 0.99, ... 0.21 of itself; the best step gives the grid (OBC, arXiv 2208.11580, section 5 and
its reference implementation). Zero is always a grid point, so that pruned weights stay zero.
Symmetric grids are narrow: codes ±(2^(bits-1) - 1), zero point 0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from obc_deploy import native
from obc_deploy.schemes import Quantization

_NORM = 2.4
_SHRINK_STEPS = 80
_SHRINK_STEP = 0.01
_WORTH_THREADS = 1 << 20
"""Roundings from which a second thread pays."""
_SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Grid:
    """The grids of a layer's weights.

    Attributes:
        scale: (rows, groups) float32 grid step.
        zero_point: (rows, groups) int8 code of exact zero.
        code_min: smallest code.
        code_max: largest code.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    code_min: int
    code_max: int

    @classmethod
    def of_all_rows(cls, parts: Sequence[Grid]) -> Grid:
        """The grids of a layer's rows from those of neighbouring batches of them."""
        scale = torch.cat([part.scale for part in parts])
        zero_point = torch.cat([part.zero_point for part in parts])
        return cls(scale, zero_point, parts[0].code_min, parts[0].code_max)

    def per_column(self, cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of each weight, (rows, cols) in `dtype`."""
        width = cols // self.scale.shape[1]
        scale = self.scale.to(dtype).repeat_interleave(width, dim=1)
        return scale, self.zero_point.to(dtype).repeat_interleave(width, dim=1)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes (rows, cols) int8 of the nearest grid points."""
        scale, zero_point = self.per_column(weight.shape[1], torch.float64)
        codes = torch.round(weight.to(torch.float64) / scale) + zero_point
        return codes.clamp_(self.code_min, self.code_max).to(torch.int8)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """(codes - zero_point) · scale, (rows, cols) float32."""
        scale, zero_point = self.per_column(codes.shape[1], torch.float32)
        return (codes.to(torch.float32) - zero_point) * scale


def find_grid(
    weight: torch.Tensor,
    quantization: Quantization,
    *,
    shrink: bool = True,
    threads: int | None = None,
) -> Grid:
    """The best grids of a (rows, cols) weight: one per row, or one per group of its columns.

    Args:
        weight: (rows, cols).
        quantization: bits, groups, symmetry.
        shrink: search over shrunk ranges; the whole range is taken otherwise.
        threads: CPU threads to search with; None: as many as torch uses.
    """
    rows, cols = weight.shape
    code_min, code_max = quantization.code_min, quantization.code_max
    grouped = weight.to(torch.float64).reshape(rows, -1, quantization.group or cols)
    steps = _SHRINK_STEPS if shrink else 1
    if weight.device.type == "cpu" and native.is_available():
        return _find_natively(
            grouped.contiguous(), quantization, steps, threads or torch.get_num_threads()
        )
    low = grouped.amin(-1, keepdim=True).clamp_(max=0.0)
    high = grouped.amax(-1, keepdim=True).clamp_(min=0.0)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    if not quantization.asymmetric:
        high = torch.maximum(-low, high)
        low = -high

    best_loss = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for step in range(steps):
        share = 1.0 - step * _SHRINK_STEP
        scale = share * (high - low) / (code_max - code_min)
        scale = scale.clamp_(min=_SMALLEST_SCALE).to(torch.float32).to(torch.float64)
        # Of a symmetric range this is code_min + (code_max - code_min) / 2 = 0.
        zero = code_min + torch.round(-share * low / scale).clamp_(max=code_max - code_min)
        if not quantization.asymmetric:
            zero = torch.zeros_like(scale)
        codes = torch.round(grouped / scale).add_(zero).clamp_(code_min, code_max)
        loss = codes.sub_(zero).mul_(scale).sub_(grouped).abs_().pow_(_NORM).sum(-1, keepdim=True)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return Grid(
        best_scale.squeeze(-1).to(torch.float32),
        best_zero.squeeze(-1).to(torch.int8),
        code_min,
        code_max,
    )


def _find_natively(
    grouped: torch.Tensor, quantization: Quantization, steps: int, threads: int
) -> Grid:
    """The same search, compiled; `grouped` is (rows, groups, width) float64."""
    rows, groups, width = grouped.shape
    scale = torch.empty(rows, groups, dtype=torch.float32)
    zero_point = torch.empty(rows, groups, dtype=torch.int8)
    control = native.Control(0, 0)
    if grouped.numel() * steps <= _WORTH_THREADS:
        threads = 1
    find = native.library().obc_find_grid

    def call() -> int:
        # All memory is held from here, so it stays until native code returns.
        search = native.GridSearch(
            native.address(grouped), rows * groups, width, quantization.code_min,
            quantization.code_max, int(quantization.asymmetric), steps, _SHRINK_STEP,
            _SMALLEST_SCALE, native.address(scale), native.address(zero_point),
        )  # fmt: skip
        return int(find(ctypes.addressof(search), threads, ctypes.addressof(control)))

    native.run(call, control, 1.0, lambda _: None)
    return Grid(scale, zero_point, quantization.code_min, quantization.code_max)
