"""Levels of a layer: sparsities 1 - 0.9^i, N:M, bits, and both, as far as a target gains from them.

The grid of sparsities is geometric: each level keeps nine tenths of the weights that the one before
it keeps, so that equal steps cost about equal shares of what is left (OBC, arXiv 2208.11580,
section 6: up to 99 % zeros for single weights, 95 % for blocks of four).
"""

from __future__ import annotations

from obc_deploy.schemes import (
    BLOCK_SIZE,
    DENSE,
    NM,
    Block4,
    Pattern,
    Quantization,
    Scheme,
    Unstructured,
)
from obc_deploy.targets import Target, as_target

KEPT_PER_LEVEL = 0.9
"""Density of a level over that of the level before it."""
UNSTRUCTURED_LEVELS = 45
"""Levels of single weights: the last has 99.13 % zeros."""
BLOCK4_LEVELS = 30
"""The paper's levels of blocks of four: the last has 95.76 % zeros."""
LAST_BLOCK4_LEVEL = 44
"""Up to here every second level goes on: 99.03 % zeros."""

_DIGITS = 4
"""Decimals of a sparsity; enough to tell all levels apart."""
_W8A8 = Quantization(8, activation_bits=8)
_W4A4 = Quantization(4, activation_bits=4)
_ALL_BITS = (
    _W8A8,
    Quantization(4, activation_bits=8),
    _W4A4,
    Quantization(4),
    Quantization(4, group=128),
    Quantization(3),
    Quantization(2),
)


def sparsity_grid(levels: int) -> tuple[float, ...]:
    """1 - 0.9^i for i = 1 ... levels, to four decimals."""
    return tuple(round(1.0 - KEPT_PER_LEVEL**i, _DIGITS) for i in range(1, levels + 1))


def block4_sparsities() -> tuple[float, ...]:
    """The paper's levels of blocks, then every second one up to LAST_BLOCK4_LEVEL.

    Wide layers of an easy task bear more zeros than 95 %: a CIFAR-10 VGG's last ones do.
    """
    grid = sparsity_grid(LAST_BLOCK4_LEVEL)
    return (*grid[:BLOCK4_LEVELS], *grid[BLOCK4_LEVELS + 1 :: 2])


def levels_for(target: Target | str | None, channels: int, cols: int) -> tuple[Scheme, ...]:
    """What is worth solving for a layer: dense first, then patterns, bits, and compounds of both.

    Args:
        target: only what its runtime accelerates; None: everything that has a use anywhere.
        channels: columns at one kernel position; blocks and N:M must divide them.
        cols: columns; groups of grids must divide them.

    Returns:
        Schemes, each once.

    Raises:
        TargetError: there is no target of that name.
    """
    patterns = [each for each in _patterns(channels) if _gains(target, each)]
    # The integer kernels of every target so far are 8-bit ones: fewer bits gain nothing there.
    bits = _ALL_BITS if target is None else (_W8A8,)
    fitting = [each for each in bits if each.group is None or cols % each.group == 0]
    compounds = [Scheme(pattern, _W8A8) for pattern in patterns]
    if target is None:
        compounds += [Scheme(each, _W4A4) for each in patterns if isinstance(each, NM)]
    return (
        DENSE,
        *(Scheme(pattern) for pattern in patterns),
        *(Scheme(None, each) for each in fitting),
        *compounds,
    )


def _patterns(channels: int) -> list[Pattern]:
    patterns: list[Pattern] = [Unstructured(s) for s in sparsity_grid(UNSTRUCTURED_LEVELS)]
    if channels % BLOCK_SIZE == 0:
        patterns += [Block4(s) for s in block4_sparsities()]
    if channels % 4 == 0:
        patterns.append(NM(2, 4))
    return patterns


def _gains(target: Target | str | None, pattern: Pattern) -> bool:
    """Whether a target runs a pattern faster than dense."""
    if target is None:
        return True
    least = as_target(target).sparse_from.get(type(pattern))
    return least is not None and pattern.sparsity >= least
