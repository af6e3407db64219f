"""Which of two forms each operator gets: the cheapest choice, conversions between them included.

An operator has a plain and a blocked form, each with a cost. A value that is made in one form and
read in the other is converted once, at a cost. The total is that of a cut which parts operators in
plain form from those in blocked form, so a minimum cut finds the least (Greig, Porteous and
Seheult, "Exact maximum a posteriori estimation for binary images", 1989).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_UNITS_PER_NS = 0.1
_NEVER = 1 << 30


@dataclass(frozen=True)
class Choice:
    """An operator's costs in ns."""

    plain: float
    blocked: float


@dataclass(frozen=True)
class Passing:
    """A value between operators.

    Attributes:
        maker: place of the operator that makes it; None for what is always plain.
        readers: places of those that read it; None among them for what is always plain.
        to_blocks: ns of converting it from plain to blocked.
        from_blocks: ns of the other way.
    """

    maker: int | None
    readers: tuple[int | None, ...]
    to_blocks: float
    from_blocks: float


def cheapest_forms(choices: Sequence[Choice], passed: Sequence[Passing]) -> list[bool]:
    """For each operator whether it is blocked, so that the sum of all costs is least."""
    if not choices:
        return []
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    plain, blocked = len(choices), len(choices) + 1
    edges: dict[tuple[int, int], float] = {}

    def part(one: int, other: int, cost: float) -> None:
        """A cost where `one` is plain and `other` is blocked."""
        if one != other:
            edges[one, other] = edges.get((one, other), 0.0) + cost

    for place, choice in enumerate(choices):
        part(place, blocked, choice.plain)
        part(plain, place, choice.blocked)
    count = blocked + 1
    for value in passed:
        maker = plain if value.maker is None else value.maker
        readers = [plain if reader is None else reader for reader in value.readers]
        some_blocked, some_plain, count = count, count + 1, count + 2
        for reader in readers:
            part(some_blocked, reader, float("inf"))
            part(reader, some_plain, float("inf"))
        part(maker, some_blocked, value.to_blocks)
        part(some_plain, maker, value.from_blocks)
    ends = np.array(list(edges)).T
    scaled = [min(cost * _UNITS_PER_NS, _NEVER) for cost in edges.values()]
    capacity = csr_array(
        (np.rint(scaled).astype(np.int32), (ends[0], ends[1])), shape=(count, count)
    )
    left = capacity - maximum_flow(capacity, plain, blocked).flow
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, plain, return_predecessors=False).tolist())
    return [place not in reached for place in range(len(choices))]
