"""How a solver works, apart from what it solves: precision, batch memory, lazy update length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from obc_deploy.errors import ProblemError
from obc_deploy.schemes import BLOCK_SIZE
from obc_deploy.solvers.contract import Progress

_PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class SolverSettings:
    """Precision and memory of the batched row solvers.

    Attributes:
        dtype: precision in which inverses are down-dated (they are made in float64).
        memory: bytes that the inverses of one batch of rows may take.
        lazy: eliminations whose rank-one updates are kept before the inverse itself is updated; a
            multiple of the block size.
    """

    dtype: torch.dtype = torch.float32
    memory: int = 1 << 30
    lazy: int = 32

    def __post_init__(self) -> None:
        if self.lazy < BLOCK_SIZE or self.lazy % BLOCK_SIZE:
            raise ProblemError(
                f"lazy={self.lazy} update vectors do not hold whole blocks; use a multiple of "
                f"{BLOCK_SIZE}, such as 32"
            )

    def row_batches(self, rows: int, cols: int) -> Iterator[slice]:
        """Slices of rows, near equal, whose (cols, cols) inverses fit the memory."""
        row_bytes = cols * cols * self.dtype.itemsize
        batches = -(-rows // max(1, self.memory // row_bytes))
        size = -(-rows // batches)
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))


def precision(name: str) -> torch.dtype:
    """The torch dtype of "float32" or "float64".

    Raises:
        ProblemError: any other name.
    """
    if name not in _PRECISIONS:
        raise ProblemError(f"dtype '{name}' is no solver precision; use 'float32' or 'float64'")
    return _PRECISIONS[name]


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """A progress whose 0 to 1 is `start` to `end` of another's."""

    def report(share: float) -> None:
        progress(start + share * (end - start))

    return report
