"""Magnitude pruning: keep the largest |w|; of blocks the largest Σ w²; no weight is updated.

The baseline every other pattern is compared with. Unstructured and block patterns choose over all
rows of the layer, N:M within each group.
"""

from __future__ import annotations

import torch

from obc_deploy.schemes import BLOCK_SIZE, NM, Block4, Pattern
from obc_deploy.solvers.exact_obs import zeros_of


def magnitude_mask(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(rows, cols) bool, true where the weight stays."""
    energy = weight.square()
    if isinstance(pattern, NM):
        grouped = energy.reshape(-1, pattern.m)
        smallest = torch.argsort(grouped, dim=1, stable=True)[:, : pattern.m - pattern.n]
        mask = torch.ones_like(grouped, dtype=torch.bool).scatter_(1, smallest, False)
        return mask.reshape(weight.shape)
    width = BLOCK_SIZE if isinstance(pattern, Block4) else 1
    block_energy = energy.reshape(-1, width).sum(1)
    count = zeros_of(block_energy.numel(), pattern.sparsity)
    smallest = torch.argsort(block_energy, dim=0, stable=True)[:count]
    mask = torch.ones_like(block_energy, dtype=torch.bool).index_fill_(0, smallest, False)
    return mask.repeat_interleave(width).reshape(weight.shape)
