"""Networks whose dense and sparse layers take turns, and what a change between the two costs.

Some runtimes compute neighbours as one where all or none of them skip zeros. A layer's own time,
from networks where all layers are alike, then promises too much to a plan that mixes them. So
networks that change every 1, 2, 3 and 4 layers are timed, and what they take beyond the sum is laid
on their changes, one cost for all by least squares:

    change = Σ n (ms - sum) / Σ n²        n changes in a network
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from obc_deploy.latency import TimedNetwork, neighbours
from obc_deploy.schemes import Scheme

LONGEST_RUN = 4
"""Layers in a row that are alike, at most."""


def mixed_networks(levels: Mapping[str, Sequence[Scheme]]) -> dict[str, dict[str, Scheme]]:
    """Name to each layer's scheme; empty where no neighbours can be dense and sparse.

    Runs of each length begin at the first layer and, in another network, one layer later: a runtime
    fuses some neighbours and not others.

    Args:
        levels: layer name to what it can be, in the network's order.
    """
    if not neighbours(levels):
        return {}
    sparse, dense = {}, {}
    for name, schemes in levels.items():
        pruned = sorted((one for one in schemes if one.skips_zeros), key=lambda one: one.density)
        whole = [one for one in schemes if not one.skips_zeros]
        if pruned and whole:
            sparse[name] = pruned[len(pruned) // 2]
        dense[name] = (whole or pruned)[0]
    found = {}
    for run in range(1, LONGEST_RUN + 1):
        for shift in (0, 1):
            chosen = [name for place, name in enumerate(sparse) if (place + shift) // run % 2 == 0]
            name = f"every {run}" + (", one later" if shift else "")
            found[name] = dense | {each: sparse[each] for each in chosen}
    return found


def cost_of_a_change(networks: Iterable[TimedNetwork], fixed_ms: float) -> float:
    """What one change costs, in ms; 0 where mixed networks are no slower than the sum.

    Args:
        networks: mixed ones, as they were timed.
        fixed_ms: what an inference takes beside its layers.
    """
    networks = list(networks)
    squares = sum(one.changes**2 for one in networks)
    if not squares:
        return 0.0
    beyond = math.fsum(one.changes * (one.ms - fixed_ms - one.layers_ms) for one in networks)
    return max(0.0, beyond / squares)
