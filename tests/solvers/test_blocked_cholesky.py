"""Factors of batches in blocks are those of the matrices as a whole."""

from __future__ import annotations

import pytest
import torch
from devices import CUDA

from obc_deploy.solvers.blocked_cholesky import (
    backward_in_place,
    factor_in_place,
    forward_in_place,
)


def matrices(batch, size, device="cpu"):
    made = torch.Generator().manual_seed(size)
    x = torch.randn(batch, size, 2 * size + 1, generator=made, dtype=torch.float64)
    return (x @ x.mT / size).to(device)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 40, 300])
@pytest.mark.parametrize("block", [None, 8, 13])
def test_a_factor_and_both_substitutions_are_the_whole_matrixs(size, block, device):
    matrix = matrices(3, size, device)
    expected = torch.linalg.cholesky(matrix)
    factor = factor_in_place(matrix.clone(), block=block)
    torch.testing.assert_close(factor.tril(), expected, rtol=1e-10, atol=1e-12)
    # Nothing reads what is above the diagonal.
    factor.masked_fill_(torch.ones_like(factor, dtype=torch.bool).triu(1), torch.nan)
    right = torch.randn(3, size, 5, dtype=torch.float64, device=device)
    half = forward_in_place(factor, right.clone(), block=block)
    torch.testing.assert_close(expected @ half, right, rtol=1e-9, atol=1e-10)
    solved = backward_in_place(factor, half, block=block)
    torch.testing.assert_close(matrix @ solved, right, rtol=1e-8, atol=1e-9)
    assert solved is half


@pytest.mark.parametrize("block", [None, 4])
def test_zeros_at_the_end_stay_zeros(block):
    """So one factor solves for every leading part of its matrix."""
    matrix = matrices(2, 20)
    factor = factor_in_place(matrix.clone(), block=block)
    half = torch.randn(2, 20, 1, dtype=torch.float64)
    half[:, 11:] = 0.0
    solved = backward_in_place(factor, half.clone(), block=block)
    assert torch.all(solved[:, 11:] == 0.0)
    part = torch.linalg.cholesky(matrix[:, :11, :11])
    expected = torch.linalg.solve_triangular(part.mT, half[:, :11], upper=True)
    torch.testing.assert_close(solved[:, :11], expected)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("wrong", [0, 9])
def test_a_matrix_that_has_no_factor_is_an_error(block, wrong):
    matrix = matrices(2, 10)
    matrix[1, wrong, wrong] = -1.0
    with pytest.raises(torch.linalg.LinAlgError):
        factor_in_place(matrix, block=block)
