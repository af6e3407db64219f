"""Round to nearest: code = clamp(round(w / s) + z), each weight on its own.

The baseline of quantization. Grids span the whole range of a row, with no search; pruned weights
get the code of exact zero.
"""

from __future__ import annotations

import torch

from obc_deploy.solvers.grids import Grid


def rtn_codes(weight: torch.Tensor, mask: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (rows, cols) int8 of the weights that stay, zero points elsewhere."""
    return grid.round(weight.masked_fill(~mask, 0.0))
