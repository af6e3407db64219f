"""Some columns of each row, as many as it wants, in batches of rows that want about as many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_PADDING = 1.2
"""A batch takes rows whose sizes lie within this factor."""


@dataclass(frozen=True)
class Selection:
    """Selected columns of some rows, padded to one width.

    Attributes:
        rows: (batch,) int64 rows of the layer.
        index: (batch, width) int64 columns, all different; padding has any of the others.
        valid: (batch, width) bool, false at padding.
    """

    rows: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor

    def submatrix(self, matrix: torch.Tensor, group_of_row: torch.Tensor) -> torch.Tensor:
        """Selected rows and columns of each row's (cols, cols) matrix; padding is the identity.

        `matrix` is (groups, cols, cols); the result (batch, width, width).
        """
        group = group_of_row[self.rows][:, None, None]
        selected = matrix[group, self.index[:, :, None], self.index[:, None, :]]
        selected.mul_(self.valid[:, :, None]).mul_(self.valid[:, None, :])
        selected.diagonal(dim1=1, dim2=2).add_((~self.valid).to(selected.dtype))
        return selected

    def values(self, full: torch.Tensor) -> torch.Tensor:
        """Selected values of a (rows, cols) matrix, 0 at padding."""
        return full[self.rows[:, None], self.index] * self.valid

    def entries(self) -> int:
        """Entries of the rows' selected matrices together."""
        rows, width = self.index.shape
        return rows * width * width

    def halves(self) -> list[Selection]:
        """The first and the second half of the rows; itself where it has one row."""
        middle = self.rows.shape[0] // 2
        if middle == 0:
            return [self]
        return [
            Selection(self.rows[part], self.index[part], self.valid[part])
            for part in (slice(0, middle), slice(middle, None))
        ]

    def put(self, full: torch.Tensor, values: torch.Tensor) -> None:
        """Write (batch, width) values back into a (rows, cols) matrix, leaving padding out."""
        rows = self.rows[:, None]
        # Padding keeps what is there: to leave it out by a mask would make the host wait.
        kept = torch.where(self.valid, values.to(full.dtype), full[rows, self.index])
        full[rows, self.index] = kept


def selections(
    order: torch.Tensor, counts: torch.Tensor, memory: int, *, least: int = 0
) -> Iterator[Selection]:
    """The first columns of each row's order, rows of like counts batched.

    Args:
        order: (rows, cols) int64, a permutation of the columns in each row.
        counts: (rows,) columns that each row wants; rows that want none are left out.
        memory: bytes that the float64 matrices of a batch's selected columns may take.
        least: columns that a row's matrix is counted for at least.
    """
    counts, rows = counts.sort()
    sizes: list[int] = counts.tolist()
    start = next((i for i, size in enumerate(sizes) if size), len(sizes))
    while start < len(sizes):
        widest = max(sizes[start] + 8, int(_PADDING * sizes[start]))
        end = start + 1
        while (
            end < len(sizes)
            and sizes[end] <= widest
            and (end + 1 - start) * max(sizes[end], least) ** 2 * 8 <= memory
        ):
            end += 1
        width = sizes[end - 1]
        chosen = rows[start:end]
        valid = torch.arange(width, device=order.device) < counts[start:end, None]
        yield Selection(chosen, order[chosen, :width], valid)
        start = end
