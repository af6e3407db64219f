"""Which levels of a grid are timed, and what the levels between them take.

A grid has dozens of sparsities, and a network to export, load and time for each. A layer's time is
nearly linear in what is left of it, so a dozen levels are timed, evenly spread over the grid, and

    ms(d) = ms(a) + (d - a) / (b - a) * (ms(b) - ms(a))        densities a <= d <= b, timed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from obc_deploy.errors import LatencyError
from obc_deploy.schemes import Block4, Scheme, Unstructured

MOST_TIMED = 12
"""Levels of one grid that are timed."""


def timed_levels(layers: Iterable[Sequence[Scheme]], most: int = MOST_TIMED) -> tuple[Scheme, ...]:
    """The schemes to time: a few sparsities of each grid, and all that is on no grid.

    The ends of a grid are among them, and of each layer's part of it too.

    Args:
        layers: what each layer may have, in any order.
        most: sparsities of one grid to spread over it, 2 or more.
    """
    layers = [tuple(schemes) for schemes in layers]
    every = tuple(dict.fromkeys(scheme for schemes in layers for scheme in schemes))
    ends = {end for schemes in layers for grid in _grids(schemes) for end in (grid[0], grid[-1])}
    left_out: set[Scheme] = set()
    for grid in _grids(every):
        last = len(grid) - 1
        if last >= most:
            kept = {round(place * last / (most - 1)) for place in range(most)}
            left_out |= {one for place, one in enumerate(grid) if place not in kept} - ends
    return tuple(scheme for scheme in every if scheme not in left_out)


def between(timed: Mapping[Scheme, float], wanted: Sequence[Scheme]) -> dict[Scheme, float]:
    """Each wanted scheme's ms: as timed, or on the line between its neighbours on the grid.

    Args:
        timed: one layer's ms.
        wanted: its schemes.

    Raises:
        LatencyError: a scheme was not timed and is not between two that were.
    """
    return {scheme: _between(timed, scheme) for scheme in wanted}


def _between(timed: Mapping[Scheme, float], scheme: Scheme) -> float:
    if scheme in timed:
        return timed[scheme]
    grid = _grid(scheme)
    known = [one for one in timed if grid is not None and _grid(one) == grid]
    density = _density(scheme) if known else 0.0
    below = max((one for one in known if _density(one) < density), key=_density, default=None)
    above = min((one for one in known if _density(one) > density), key=_density, default=None)
    if below is None or above is None:
        raise LatencyError(f"'{scheme}' was not timed, and is not between two levels that were")
    share = (density - _density(below)) / (_density(above) - _density(below))
    return timed[below] + share * (timed[above] - timed[below])


def _grids(schemes: Iterable[Scheme]) -> list[list[Scheme]]:
    """The schemes of each grid, sparsest first."""
    grids: dict[object, list[Scheme]] = {}
    for scheme in schemes:
        if (grid := _grid(scheme)) is not None:
            grids.setdefault(grid, []).append(scheme)
    return [sorted(members, key=_density) for members in grids.values()]


def _grid(scheme: Scheme) -> tuple[object, object] | None:
    """What schemes of one grid share; None where there is no grid."""
    if isinstance(scheme.pattern, Unstructured | Block4):
        return type(scheme.pattern), scheme.quantization
    return None


def _density(scheme: Scheme) -> float:
    assert isinstance(scheme.pattern, Unstructured | Block4)
    return 1.0 - scheme.pattern.sparsity
