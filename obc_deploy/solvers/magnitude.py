"""Magnitude pruning: keep the largest |w|; of blocks the largest Σ w²; no weight is updated.

The baseline every other pattern is compared with. Unstructured and block patterns choose over all
rows of the layer, N:M within each group.
"""

from __future__ import annotations

import torch

from obc_deploy.schemes import BLOCK_SIZE, NM, Block4, Pattern
from obc_deploy.solvers.exact_obs import zeros_of
from obc_deploy.solvers.shared_blocks import pairs_of


def magnitude_mask(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(rows, cols) bool, true where the weight stays."""
    energy = weight.square()
    if isinstance(pattern, NM):
        grouped = energy.reshape(-1, pattern.m)
        smallest = torch.argsort(grouped, dim=1, stable=True)[:, : pattern.m - pattern.n]
        mask = torch.ones_like(grouped, dtype=torch.bool).scatter_(1, smallest, False)
        return mask.reshape(weight.shape)
    if not isinstance(pattern, Block4):
        return _largest(energy, pattern.sparsity)
    blocks = energy.reshape(len(weight), -1, BLOCK_SIZE).sum(2)
    if pattern.together == 1:
        mask = _largest(blocks, pattern.sparsity)
    else:
        pairs = pairs_of(blocks)
        of_pairs = _largest(blocks[pairs].sum(1), pattern.sparsity)
        mask = torch.empty_like(blocks, dtype=torch.bool)
        mask[pairs] = of_pairs[:, None]
    return mask.repeat_interleave(BLOCK_SIZE, dim=1)


def _largest(energy: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True but for the share of the smallest."""
    flat = energy.flatten()
    smallest = torch.argsort(flat, dim=0, stable=True)[: zeros_of(flat.numel(), sparsity)]
    mask = torch.ones_like(flat, dtype=torch.bool).index_fill_(0, smallest, False)
    return mask.reshape(energy.shape)
