"""The row solvers of `obc_deploy.native` on tensors: the same greedy runs, compiled.

Everything here runs on the CPU, rows spread over `torch.get_num_threads()` threads, each with one
inverse of its own: threads · 4 · cols² bytes in float32, beside the shared float64 inverse.
"""

from __future__ import annotations

import ctypes
import functools
import warnings

import torch

from obc_deploy import native
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.grids import Grid
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.settings import SolverSettings, worker_threads

BLOCK_WIDTHS = (2, 4, 8, 16)
"""Widths of blocks that are compiled."""

_WIDE = 1024
"""Columns from which longer updates pay: the inverse no longer fits the second-level cache."""


class SlowSolverWarning(UserWarning):
    """The compiled solvers are missing, so the exact methods take several times longer."""


def is_native(settings: SolverSettings, device: torch.device) -> bool:
    """Whether the compiled solvers do the work; warns once where they should and cannot."""
    if device.type != "cpu" or settings.native is False:
        return False
    if not native.is_available():
        _warn(native.why_missing())
        return False
    return True


@functools.cache
def _warn(reason: str) -> None:
    if not reason.startswith(native.DISABLE_VARIABLE):
        warnings.warn(
            f"the exact solver runs on torch, about ten times slower, because the compiled solvers "
            f"are missing ({reason})",
            SlowSolverWarning,
            stacklevel=2,
        )


def prune_columns(
    problem: DampedProblem,
    settings: SolverSettings,
    progress: Progress,
    *,
    group: int,
    zeros: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune `zeros` of each `group` consecutive columns of every row, as `solvers.prune_columns`.

    Returns:
        (rows, steps) int32 pruned column and (rows, steps) loss increase of each step.
    """
    rows, cols = problem.weight.shape
    steps = cols // group * zeros
    order = torch.empty(rows, steps, dtype=torch.int32)
    increase = torch.empty(rows, steps, dtype=settings.dtype)
    with _Job(problem, settings, progress) as job:
        job.run("obc_prune_columns", group, zeros, order, increase)
    return order, increase


def prune_blocks(
    problem: DampedProblem, settings: SolverSettings, progress: Progress, *, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune every block of `width` columns of every row, as `solvers.prune_blocks`.

    Returns:
        (rows, blocks) int32 pruned block and (rows, blocks) loss increase of each step.
    """
    rows, cols = problem.weight.shape
    order = torch.empty(rows, cols // width, dtype=torch.int32)
    increase = torch.empty(rows, cols // width, dtype=settings.dtype)
    with _Job(problem, settings, progress) as job:
        job.run("obc_prune_blocks", width, order, increase)
    return order, increase


def quantize(
    problem: DampedProblem,
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    grid: Grid,
    settings: SolverSettings,
    progress: Progress,
) -> torch.Tensor:
    """OBQ codes (rows, cols) int8; with a mask of the survivors only, as `solvers.obq`.

    Args:
        problem: the layer.
        weight: (rows, cols) float64: dense, or pruned and best for the mask.
        mask: (rows, cols) bool, or None where all weights take part.
        grid: the rows' grids.
        settings: precision.
        progress: told the share of the work done.
    """
    cols = weight.shape[1]
    scale, zero_point = (each.contiguous() for each in grid.per_column(cols, torch.float64))
    codes = torch.empty(weight.shape, dtype=torch.int8)
    stays = None if mask is None else mask.to(torch.uint8).contiguous()
    with _Job(problem, settings, progress, weight=weight) as job:
        job.run("obc_quantize", scale, zero_point, grid.code_min, grid.code_max, stays, codes)
    return codes


def replay(
    problem: DampedProblem,
    order: torch.Tensor,
    counts: torch.Tensor,
    settings: SolverSettings,
    progress: Progress,
    *,
    width: int,
) -> torch.Tensor:
    """The weights of many levels of one trace, by eliminating in its order once more.

    Args:
        problem: the layer.
        order: (rows, steps) the column, or block of columns, pruned at each step.
        counts: (rows, levels) steps that a row takes to each level, ascending.
        settings: precision.
        progress: told the share of the work done.
        width: columns pruned at a step.

    Returns:
        (levels, rows, cols) float32.
    """
    rows, cols = problem.weight.shape
    weights = torch.empty(counts.shape[1], rows, cols, dtype=torch.float32)
    order, counts = order.to(torch.int32).contiguous(), counts.to(torch.int64).contiguous()
    with _Job(problem, settings, progress) as job:
        job.run("obc_replay", order, order.shape[1], width, counts, counts.shape[1], weights)
    return weights


def selected_solve(
    problem: DampedProblem,
    matrix: torch.Tensor,
    mask: torch.Tensor,
    right: torch.Tensor,
    settings: SolverSettings,
) -> torch.Tensor:
    """x_S = (M_SS)⁻¹ b_S for each row's S, its true places of the mask; 0 elsewhere; float64.

    Args:
        problem: which matrix belongs to which row.
        matrix: (groups, cols, cols) float64, symmetric positive definite.
        mask: (rows, cols) bool.
        right: (rows, cols) float64, b.
        settings: how the library works.
    """
    solution = torch.empty(right.shape, dtype=torch.float64)
    with _Job(problem, settings, lambda _: None) as job:
        job.run(
            "obc_selected_solve", matrix.contiguous(), mask.to(torch.uint8).contiguous(),
            right.contiguous(), solution,
        )  # fmt: skip
    return solution


class _Job:
    """One call of the library: a layer's pointers, kept alive while native code reads them."""

    def __init__(
        self,
        problem: DampedProblem,
        settings: SolverSettings,
        progress: Progress,
        *,
        weight: torch.Tensor | None = None,
    ) -> None:
        rows, cols = problem.weight.shape
        self._bits = torch.finfo(settings.dtype).bits
        self._progress = progress
        self._work = float(rows) * cols**3
        self._kept = [
            problem.inverse.contiguous(),
            problem.hessian.contiguous(),
            problem.group_of_row.to(torch.int64).contiguous(),
            (problem.weight if weight is None else weight).to(torch.float64).contiguous(),
        ]
        self._control = native.Control(0, 0)
        pointers = [native.address(tensor) for tensor in self._kept]
        self._layer = native.Layer(
            rows, cols, problem.inverse.shape[0], *pointers,
            settings.update_length(wide=cols >= _WIDE), worker_threads(rows, cols),
            ctypes.addressof(self._control),
        )  # fmt: skip

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()

    def run(self, name: str, *arguments: torch.Tensor | int | None) -> None:
        """Call `name` with tensors as pointers."""
        passed = [
            native.address(each) if isinstance(each, torch.Tensor) else each for each in arguments
        ]
        front = [ctypes.addressof(self._layer)]
        if name != "obc_selected_solve":
            front.append(self._bits)
        function = getattr(native.library(), name)
        native.run(
            lambda: int(function(*front, *passed)), self._control, self._work, self._progress
        )
