"""A layer's codes on given grids: by OBQ, or a shorter way where that loses next to nothing.

Networks are compressed with shortcuts: dense layers of eight bits are quantized in one order for
all rows (`ordered_obq`), and pruned ones are rounded where that adds little to what pruning lost
(`rounding`). Without them it is OBQ alone. Levels of a database have one way more: few bits after
N:M start from the inverses that pruning left (`nm_then_obq`), and nobody asks about rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from obc_deploy.schemes import Quantization
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.exact_obs import PrunedRows
from obc_deploy.solvers.grids import Grid
from obc_deploy.solvers.obq import obq_codes, obq_codes_of_survivors
from obc_deploy.solvers.ordered_obq import ordered_obq_codes
from obc_deploy.solvers.problems import CheckedProblem, DampedProblem
from obc_deploy.solvers.rounding import rounding_suffices
from obc_deploy.solvers.rtn import rtn_codes
from obc_deploy.solvers.settings import SolverSettings


def codes_of(
    checked: CheckedProblem,
    damped: Callable[[], DampedProblem],
    pruned: PrunedRows | None,
    quantization: Quantization,
    grid: Grid,
    settings: SolverSettings,
    progress: Progress,
) -> torch.Tensor:
    """Codes (rows, cols) int8; what was pruned stays zero.

    Args:
        checked: the dense layer.
        damped: makes its inverses; called where they are needed.
        pruned: what a pattern left of it, or None.
        quantization: the bits.
        grid: grids of the rows as they are now.
        settings: precision, memory, shortcuts.
        progress: told the share of the work done.

    Raises:
        ProblemError: the damped Hessian is singular.
    """
    if pruned is None:
        if settings.takes_shortcut(quantization):
            return ordered_obq_codes(checked, grid, progress)
        return obq_codes(damped(), grid, settings, progress)
    if settings.shortcuts:
        codes = rtn_codes(pruned.weight, pruned.mask, grid)
        if rounding_suffices(checked, pruned.weight, grid, codes):
            return codes
    return obq_codes_of_survivors(damped(), pruned.weight, pruned.mask, grid, settings, progress)
