"""The row solvers of `obc_deploy.native` on tensors: the same greedy runs, compiled.

Everything here runs on the CPU, rows spread over `torch.get_num_threads()` threads, each with one
inverse of its own: threads · 4 · cols² bytes in float32, beside the shared float64 inverse.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from dataclasses import dataclass

import torch

from obc_deploy import native
from obc_deploy.errors import ProblemError
from obc_deploy.schemes import NM
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.grids import Grid
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.settings import SolverSettings

BLOCK_WIDTHS = (2, 4, 8, 16)
"""Widths of blocks that are compiled."""

WIDE = 1024
"""Columns from which longer updates pay: the inverse no longer fits the second-level cache."""


_LEAST_PRECISE = 1e-3
"""Rounding that an inverse may carry, as a share of what is least in it."""


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
    _run("obc_prune_columns", problem, settings, progress, group, zeros, order, increase)
    return order, increase


def leaves_precise_inverses(problem: DampedProblem, settings: SolverSettings) -> bool:
    """Whether down-dating leaves (H_SS)⁻¹ with a few digits.

    1 / (H_ii · G_ii) is the share of a column's energy that the other columns do not tell; what is
    far below it is rounding.
    """
    told = problem.hessian.diagonal(dim1=1, dim2=2) * problem.inverse.diagonal(dim1=1, dim2=2)
    return float(told.max()) * torch.finfo(settings.dtype).eps < _LEAST_PRECISE


@dataclass(frozen=True)
class LeftInverses:
    """(H_SS)⁻¹ of the survivors S of N:M pruning, as it ended: what quantization starts from.

    Attributes:
        columns: (rows, size) int32, each row's survivors in the order of its matrix.
        triangles: (rows, size · (size + 1) / 2), each row's lower triangle by rows.
    """

    columns: torch.Tensor
    triangles: torch.Tensor

    @classmethod
    def room(cls, rows: int, cols: int, pattern: NM, dtype: torch.dtype) -> LeftInverses:
        """Memory for what a pattern leaves of so many rows."""
        size = cols // pattern.m * pattern.n
        return cls(
            torch.empty(rows, size, dtype=torch.int32),
            torch.empty(rows, size * (size + 1) // 2, dtype=dtype),
        )

    @staticmethod
    def row_bytes(cols: int, pattern: NM, dtype: torch.dtype) -> int:
        """Memory that a row takes."""
        size = cols // pattern.m * pattern.n
        return size * (size + 1) // 2 * dtype.itemsize + 4 * size


def _as_arguments(
    left: LeftInverses | None,
) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
    return (
        (0, None, None) if left is None else (left.columns.shape[1], left.columns, left.triangles)
    )


def prune_and_weigh(
    problem: DampedProblem,
    pattern: NM,
    settings: SolverSettings,
    progress: Progress,
    *,
    left: LeftInverses | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune to an N:M pattern, and find the best weights for what survives.

    Args:
        problem: the layer.
        pattern: the pattern, which divides the columns.
        settings: precision.
        progress: told the share of the work done.
        left: gets the survivors' inverses, where they are wanted.

    Returns:
        (rows, cols) bool, true at survivors; (rows, cols) float64 weights.
    """
    rows, cols = problem.weight.shape
    zeros = pattern.m - pattern.n
    order = torch.empty(rows, cols // pattern.m * zeros, dtype=torch.int32)
    weights = torch.empty(rows, cols, dtype=torch.float64)
    _run(
        "obc_prune_and_weigh", problem, settings, progress,
        pattern.m, zeros, int(leaves_precise_inverses(problem, settings)), order, weights,
        *_as_arguments(left),
    )  # fmt: skip
    mask = torch.ones(rows, cols, dtype=torch.bool)
    return mask.scatter_(1, order.to(torch.int64), False), weights


def prune_blocks(
    problem: DampedProblem,
    settings: SolverSettings,
    progress: Progress,
    *,
    width: int,
    together: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune every block of `width` columns of every row, as `solvers.prune_blocks`.

    Args:
        problem: the layer.
        settings: precision.
        progress: told the share of the work done.
        width: columns of a block; 4 where rows share masks.
        together: (units, 2) int64 rows with one mask; each row has its own where not given.

    Returns:
        (units, blocks) int32 pruned block and (units, blocks) loss increase of each step.

    Raises:
        ProblemError: a width that is not among BLOCK_WIDTHS or does not divide the columns.
    """
    cols = problem.weight.shape[1]
    if width not in BLOCK_WIDTHS or cols % width:
        raise ProblemError(
            f"blocks of {width} columns do not fit {cols} columns; use a divisor among "
            f"{', '.join(map(str, BLOCK_WIDTHS))}"
        )
    units, weight = problem, problem.weight
    if together is not None:
        units, weight = problem.of_rows(together[:, 0]), problem.weight[together.flatten()]
    rows = units.weight.shape[0]
    order = torch.empty(rows, cols // width, dtype=torch.int32)
    increase = torch.empty(rows, cols // width, dtype=settings.dtype)
    _run(
        "obc_prune_blocks", units, settings, progress,
        width, weight.shape[0] // rows, order, increase, weight=weight,
    )  # fmt: skip
    return order, increase


def quantize(
    problem: DampedProblem,
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    grid: Grid,
    settings: SolverSettings,
    progress: Progress,
    *,
    left: LeftInverses | None = None,
) -> torch.Tensor:
    """OBQ codes (rows, cols) int8; with a mask of the survivors only, as `solvers.obq`.

    Args:
        problem: the layer.
        weight: (rows, cols) float64: dense, or pruned and best for the mask.
        mask: (rows, cols) bool, or None where all weights take part.
        grid: the rows' grids.
        settings: precision.
        progress: told the share of the work done.
        left: in place of a mask, what pruning left, in the settings' precision.
    """
    cols = weight.shape[1]
    scale, zero_point = (each.contiguous() for each in grid.per_column(cols, torch.float64))
    codes = torch.empty(weight.shape, dtype=torch.int8)
    stays = None if mask is None else mask.to(torch.uint8).contiguous()
    _run(
        "obc_quantize", problem, settings, progress,
        scale, zero_point, grid.code_min, grid.code_max, stays, *_as_arguments(left), codes,
        weight=weight,
    )  # fmt: skip
    return codes


def best_weights(
    problem: DampedProblem,
    order: torch.Tensor,
    counts: torch.Tensor,
    settings: SolverSettings,
    progress: Progress,
) -> torch.Tensor:
    """The best weights of each row once a prefix of its order is zero, for many prefixes at once.

    One factorization of G in the row's order and one of H in the reverse serve all prefixes: cols³
    / 12 operations in double precision, however many there are.

    Args:
        problem: the layer.
        order: (rows, cols) columns, a permutation in each row.
        counts: (rows, levels) length of the prefix for each level, ascending.
        settings: precision of the result.
        progress: told the share of the work done.

    Returns:
        (levels, rows, cols) in the settings' dtype.
    """
    rows, cols = problem.weight.shape
    groups, levels = problem.hessian.shape[0], counts.shape[1]
    target = (problem.weight.reshape(groups, -1, cols) @ problem.hessian).reshape(rows, cols)
    weights = torch.empty(levels, rows, cols, dtype=settings.dtype)
    order, counts = order.to(torch.int32).contiguous(), counts.to(torch.int64).contiguous()
    _run(
        "obc_best_weights", problem, settings, progress,
        order, counts, levels, target.contiguous(), weights,
    )  # fmt: skip
    return weights


def _run(
    name: str,
    problem: DampedProblem,
    settings: SolverSettings,
    progress: Progress,
    *arguments: torch.Tensor | int | None,
    weight: torch.Tensor | None = None,
) -> None:
    """Call `name` of the library on the layer and `arguments`, tensors passed as pointers.

    `weight` takes the place of the layer's own.
    """
    rows, cols = problem.weight.shape
    tensors = (
        problem.inverse.contiguous(),
        problem.hessian.contiguous(),
        problem.group_of_row.to(torch.int64).contiguous(),
        (problem.weight if weight is None else weight).to(torch.float64).contiguous(),
    )
    lazy, threads = settings.update_length(wide=cols >= WIDE), settings.workers(rows, cols)
    function = getattr(native.library(), name)
    bits = torch.finfo(settings.dtype).bits
    control = native.Control(0, 0)

    def call() -> int:
        # All memory is held from here, so it stays until native code returns.
        layer = native.Layer(
            rows, cols, problem.inverse.shape[0], *map(native.address, tensors),
            lazy, threads, ctypes.addressof(control),
        )  # fmt: skip
        passed = [
            native.address(each) if isinstance(each, torch.Tensor) else each for each in arguments
        ]
        return int(function(ctypes.addressof(layer), bits, *passed))

    native.run(call, control, float(rows) * cols**3, progress)
