"""Compounds of a pattern and a grid: which are solved and stored, and what the others cost.

Rounding to 8 bits adds its own error to that of pruning: on all layers and 4-block levels of a
CIFAR-10 ResNet-20 the sum of the two is within 0.5 % of the compound's own error. So a pattern
with 8 bits is not solved once more; its pattern is stored, and quantized when a plan has chosen it.
Fewer bits are solved as what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from obc_deploy.schemes import Scheme
from obc_deploy.solvers.settings import FINE_BITS


def stored_form(choice: Scheme) -> Scheme:
    """The level whose weights stand for a choice."""
    return Scheme(choice.pattern, None) if _adds_up(choice) else choice


def stored_levels(choices: Iterable[Scheme]) -> tuple[Scheme, ...]:
    """Levels that a database needs for these choices, each once.

    Of every pattern the one without a grid too: it is what compression starts from.
    """
    found: dict[Scheme, None] = {}
    for choice in choices:
        if choice.pattern is not None:
            found[Scheme(choice.pattern, None)] = None
        found[Scheme(None, choice.quantization) if _adds_up(choice) else choice] = None
    return tuple(found)


def choice_error(errors: Mapping[Scheme, float], choice: Scheme) -> float:
    """A choice's relative squared output error.

    Args:
        errors: of a layer's stored levels.
        choice: one that these levels were stored for.
    """
    if choice.is_dense:
        return 0.0
    if _adds_up(choice):
        return errors[Scheme(choice.pattern, None)] + errors[Scheme(None, choice.quantization)]
    return errors[choice]


def _adds_up(choice: Scheme) -> bool:
    quantization = choice.quantization
    return (
        choice.pattern is not None
        and quantization is not None
        and quantization.weight_bits >= FINE_BITS
    )
