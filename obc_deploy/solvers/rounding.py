"""Whether rounding what pruning left will do in place of OBQ, on the grid that OBQ would be given.

Pruned rows have an order and an inverse each, so there is no shorter way to OBQ than the one that
takes as long as pruning did; and a grid of eight bits loses little beside what pruning has lost.
"""

from __future__ import annotations

import torch

from obc_deploy.solvers.grids import Grid
from obc_deploy.solvers.problems import CheckedProblem, relative_error

ROUNDING_FACTOR = 1.02
"""Where rounding leaves the error of the pruned layer within this factor, it is not improved on."""
ROUNDING_ERROR = 2e-5
"""Nor is it where it adds less than this share of the outputs' energy, what activations of eight
bits add to a layer of an ImageNet MobileNet. A layer that is hardly pruned has lost so little that
the factor alone would not say so, and has most to quantize."""


def rounding_suffices(
    problem: CheckedProblem, pruned: torch.Tensor, grid: Grid, codes: torch.Tensor
) -> bool:
    """Whether rounding loses next to nothing, by itself or beside what pruning lost.

    Args:
        problem: the dense layer, that errors are measured against.
        pruned: (rows, cols) its weight after pruning.
        grid: the rows' grids.
        codes: (rows, cols) the pruned weight rounded to them.
    """
    lost = relative_error(problem, pruned)
    rounded = relative_error(problem, grid.dequantize(codes))
    return rounded <= max(ROUNDING_FACTOR * lost, lost + ROUNDING_ERROR)
