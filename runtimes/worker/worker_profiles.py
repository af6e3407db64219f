"""Which of an engine's optimization profiles takes inputs of given shapes."""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence, Tuple

from worker_backend import Explained

Shape = Tuple[int, ...]
Profile = Mapping[str, Tuple[Shape, Shape, Shape]]
"""Smallest, usual and largest shape by input."""


def fits(shape: Shape, smallest: Shape, largest: Shape) -> bool:
    """Whether each size lies within its bounds."""
    return len(shape) == len(smallest) and all(
        low <= size <= high
        for low, size, high in zip(smallest, shape, largest)  # noqa: B905
    )


def _outside(name: str, shape: Shape, profiles: Sequence[Profile]) -> str:
    ranges = ", ".join(
        "%s to %s" % (list(profile[name][0]), list(profile[name][2])) for profile in profiles
    )
    return (
        "input '%s' of shape %s is outside the engine's profile (%s): give such a shape, or build "
        "the engine again for it (--batches SMALLEST:USUAL:LARGEST)" % (name, list(shape), ranges)
    )


def choose_profile(shapes: Mapping[str, Shape], profiles: Sequence[Profile]) -> int:
    """The number of the profile that takes all inputs, of several the one tuned nearest to them.

    Raises:
        Explained: none does; the first input that is outside all of them is named.
    """
    found: List[Tuple[int, int]] = []
    for index, profile in enumerate(profiles):
        if all(fits(shape, profile[name][0], profile[name][2]) for name, shape in shapes.items()):
            distance = sum(
                abs(size - usual)
                for name, shape in shapes.items()
                for size, usual in zip(shape, profile[name][1])  # noqa: B905
            )
            found.append((distance, index))
    if found:
        return min(found)[1]
    for name, shape in shapes.items():
        if not any(fits(shape, profile[name][0], profile[name][2]) for profile in profiles):
            raise Explained(_outside(name, shape, profiles))
    given: Dict[str, List[int]] = {name: list(shape) for name, shape in shapes.items()}
    raise Explained(
        "no profile of the engine takes all of %s at once: build it again with one that does"
        % given
    )
