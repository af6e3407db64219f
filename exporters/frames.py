"""What lies around the planes of a blocked tensor: a border to pad with, or a margin below them.

A 1x1 convolution reads tiles of pixels straight from the tensor where planes begin with a cache
line, and else copies them first. Planes of 7x7 or 14x14 pixels end within a line, so rows are
added below them that nobody reads or writes: the margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from obc_deploy.exporters.sparse_blocks import BLOCK

LINE_PIXELS = 16
"""Of four bytes, in a cache line."""
FEW_READS = 64
"""Of each pixel, by output channels: with more, copying pixels first takes no time that counts.
Tiles in place were 1.2 to 1.3x as fast at 6 to 10 reads, 1.1x at 16, 1.03x at 50, 0.98x at 200."""
MOST_GROWTH = 2.5
"""A margin may not make a tensor larger by more; 16 rows of 7 pixels in place of 7 are 2.3x."""


@dataclass(frozen=True)
class Frame:
    """What lies around each plane.

    Attributes:
        border: pixels on all sides that hold the zero point.
        margin: rows below the border that hold nothing.
    """

    border: int = 0
    margin: int = 0

    @classmethod
    def around(cls, height: int, width: int, *, border: int, gains_by_margin: bool) -> Frame:
        """A border as wide as readers pad, or without one a margin, where it makes one faster.

        Args:
            height: of the plane, in pixels.
            width: of the plane, in pixels.
            border: the widest padding of a reader.
            gains_by_margin: whether a reader does.
        """
        if border or not gains_by_margin:
            return cls(border)
        return cls(margin=margin_of(height, width))

    def attributes(self, whose: str = "") -> dict[str, int]:
        """Of the operator that makes the tensor, or with a prefix of one that reads it."""
        found = {f"{whose}border": self.border}
        return {**found, f"{whose}margin": self.margin} if self.margin else found


def gains_by_margin(
    kernel: Sequence[int], strides: Sequence[int], blocks: int, channels: int
) -> bool:
    """Whether a convolution without padding can read its pixels in place, and reads them few times.

    Args:
        kernel: height and width.
        strides: vertical and horizontal.
        blocks: with a non-zero weight.
        channels: of the input.
    """
    in_place = max(*kernel, *strides) == 1
    return in_place and blocks <= FEW_READS * -(-channels // BLOCK)


def margin_of(height: int, width: int) -> int:
    """Rows below a plane without a border that let the next plane begin with a cache line.

    Args:
        height: of the plane, in pixels.
        width: of the plane, in pixels.

    Returns:
        0 to 15; 0 too where the plane would grow beyond `MOST_GROWTH`.
    """
    margin = next(rows for rows in range(LINE_PIXELS) if (height + rows) * width % LINE_PIXELS == 0)
    return margin if height + margin <= MOST_GROWTH * height else 0
