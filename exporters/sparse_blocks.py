"""Weights as the sparse kernels store them: only blocks of four that hold a non-zero.

A block is four consecutive input channels of one output channel at one kernel position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 4
"""Input channels of a block."""


@dataclass(frozen=True)
class StoredBlocks:
    """Weights of one layer.

    Attributes:
        values: (blocks, 4) int8.
        mask: (outputs, ceil(places of one / 8)) uint8: which places are stored, in order; place
            kernel position · ceil(channels / 4) + input channels / 4 is bit place % 8, from the
            lowest on, of byte place / 8.
        places: blocks that there would be without zeros.
    """

    values: npt.NDArray[Any]
    mask: npt.NDArray[Any]
    places: int

    @property
    def zeros(self) -> float:
        """Fraction of blocks that need not be stored."""
        return 1.0 - len(self.values) / self.places


def stored_blocks(codes: npt.NDArray[Any]) -> StoredBlocks:
    """The non-zero blocks of int8 weights (outputs, channels, height, width) or (outputs, cols)."""
    if codes.ndim == 2:
        codes = codes[:, :, None, None]
    outputs, channels = codes.shape[:2]
    padded = np.pad(codes, ((0, 0), (0, -channels % BLOCK), (0, 0), (0, 0)))
    rows = padded.reshape(outputs, -1, BLOCK, *codes.shape[2:]).transpose(0, 3, 4, 1, 2)
    rows = rows.reshape(outputs, -1, BLOCK)
    kept = rows.any(axis=2)
    return StoredBlocks(
        values=np.ascontiguousarray(rows[kept], dtype=np.int8),
        mask=np.packbits(kept, axis=1, bitorder="little"),
        places=kept.size,
    )
