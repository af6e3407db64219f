"""A = L Lᵀ of a batch of matrices, and A x = b by it, on GPUs in products of blocks.

The libraries' batched factorizations on GPUs are made for small matrices. There they get the blocks
on the diagonal, and all else is batched matrix products, which GPUs do at their full rate. Column
by column of blocks, each less what the ones before it account for:

    A_:j ← A_:j - L_:k L_jkᵀ (k < j)        L_jj L_jjᵀ = A_jj        L_ij = A_ij L_jj⁻ᵀ (i > j)

On the CPU a matrix is one block.
"""

from __future__ import annotations

import torch

_BLOCK = 256
"""Rows of a block on a GPU."""


def factor_in_place(matrix: torch.Tensor, *, block: int | None = None) -> torch.Tensor:
    """L of each of a batch of symmetric positive definite matrices.

    Args:
        matrix: (batch, size, size); its lower triangle gets L, what is above it is left undefined.
        block: rows of a block; None: what suits the device.

    Returns:
        `matrix`.

    Raises:
        torch.linalg.LinAlgError: a matrix is not positive definite.
    """
    for start, end in _blocks(matrix, block):
        if start:
            matrix[:, start:, start:end].baddbmm_(
                matrix[:, start:, :start], matrix[:, start:end, :start].mT, alpha=-1.0
            )
        corner = torch.linalg.cholesky(matrix[:, start:end, start:end])
        matrix[:, start:end, start:end] = corner
        if end < matrix.shape[1]:
            matrix[:, end:, start:end] = torch.linalg.solve_triangular(
                corner.mT, matrix[:, end:, start:end], upper=True, left=False
            )
    return matrix


def forward_in_place(
    factor: torch.Tensor, right: torch.Tensor, *, block: int | None = None
) -> torch.Tensor:
    """L⁻¹ b, written over `right`, (batch, size, columns)."""
    for start, end in _blocks(factor, block):
        part = right[:, start:end]
        if start:
            part.baddbmm_(factor[:, start:end, :start], right[:, :start], alpha=-1.0)
        corner = factor[:, start:end, start:end]
        right[:, start:end] = torch.linalg.solve_triangular(corner, part, upper=False)
    return right


def backward_in_place(
    factor: torch.Tensor, right: torch.Tensor, *, block: int | None = None
) -> torch.Tensor:
    """L⁻ᵀ b, written over `right`, (batch, size, columns)."""
    for start, end in reversed(_blocks(factor, block)):
        part = right[:, start:end]
        if end < factor.shape[1]:
            part.baddbmm_(factor[:, end:, start:end].mT, right[:, end:], alpha=-1.0)
        corner = factor[:, start:end, start:end].mT
        right[:, start:end] = torch.linalg.solve_triangular(corner, part, upper=True)
    return right


def _blocks(matrix: torch.Tensor, block: int | None) -> list[tuple[int, int]]:
    size = matrix.shape[1]
    step = block or (size if matrix.device.type == "cpu" else _BLOCK)
    return [(start, min(start + step, size)) for start in range(0, size, step)]
