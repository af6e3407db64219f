"""What solvers need of Hessians by themselves, compiled: their inverses, and energies of outputs.

All in float64, on the CPU. Half of each symmetric matrix is worked on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from obc_deploy import native

_BRIEF = 1e9
"""Operations below which a call is not worth a thread that could be interrupted: some 50 ms."""
_WORTH_THREADS = 1e7
"""Operations from which a second thread pays: half a millisecond of work."""


def is_native(device: torch.device) -> bool:
    """Whether the compiled functions can work there."""
    return device.type == "cpu" and native.is_available()


def inverses(
    hessian: torch.Tensor, threads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """H⁻¹ of each group, and the pivots of its factorization: cols³ operations each.

    Args:
        hessian: (groups, cols, cols) float64, symmetric.
        threads: CPU threads; None: as many as torch uses. They change no number.

    Returns:
        (groups, cols, cols) float64, which means something where all pivots are above rounding;
        and (groups, cols), the squares of the Cholesky factors' diagonals.
    """
    held = hessian.contiguous()
    groups, cols, _ = held.shape
    inverse, pivots = torch.empty_like(held), held.new_empty(groups, cols)

    def call(given: int) -> int:
        function = native.library().obc_invert_hessians
        return int(function(given, native.address(inverse), native.address(pivots)))

    _run(held, call, float(groups) * cols**3, threads)
    return inverse, pivots


def output_energy(weight: torch.Tensor, hessian: torch.Tensor, threads: int | None = None) -> float:
    """tr(W H Wᵀ): rows · cols² operations, half of what W H takes.

    Args:
        weight: (rows, cols) float64; a group's rows are neighbours.
        hessian: (groups, cols, cols) float64, symmetric.
        threads: as in `inverses`.
    """
    rows, held = weight.contiguous(), hessian.contiguous()
    count, cols = rows.shape
    energy = ctypes.c_double()

    def call(given: int) -> int:
        function, of_group = native.library().obc_output_energy, count // held.shape[0]
        return int(function(given, native.address(rows), of_group, ctypes.addressof(energy)))

    _run(held, call, float(count) * cols**2, threads)
    return energy.value


def _run(
    hessian: torch.Tensor, call: Callable[[int], int], work: float, threads: int | None
) -> None:
    control = native.Control(0, 0)
    groups, cols, _ = hessian.shape
    threads = 1 if work < _WORTH_THREADS else threads or torch.get_num_threads()
    given = native.Hessians(
        native.address(hessian), groups, cols, threads, ctypes.addressof(control)
    )

    def beside() -> int:
        return call(ctypes.addressof(given))

    if work >= _BRIEF:
        native.run(beside, control, work, lambda _: None)
    else:
        native.check(beside())
