"""The steps between two updates of the inverses by Triton kernels, one program a row.

In torch calls a step is some twenty launches over all rows; here all steps up to the next update
are one. What they give is the same but for rounding. `triton_kernels.py` has the kernels.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import TYPE_CHECKING, Any

import torch

from obc_deploy.errors import ProblemError
from obc_deploy.schemes import BLOCK_SIZE
from obc_deploy.solvers.native_rows import SlowSolverWarning

if TYPE_CHECKING:
    from obc_deploy.solvers.inverse import DowndatedInverse
    from obc_deploy.solvers.obq import QuantizationRun
    from obc_deploy.solvers.prune_blocks import BlockRun
    from obc_deploy.solvers.prune_columns import ColumnRun
    from obc_deploy.solvers.settings import SolverSettings

_LEAST_BLOCK = 128
_PLACES_OF_A_WARP = 128
_MOST_WARPS = 16
_MOST_AHEAD = 8
_BYTES_AHEAD = 1 << 12
"""Of the update vectors' values, what a warp waits for at once; more would not fit registers."""


def is_triton(settings: SolverSettings, device: torch.device) -> bool:
    """Whether Triton kernels take the steps; warns once where they should and cannot.

    `settings.triton` forces them onto any device; on the CPU that takes Triton's interpreter.

    Raises:
        ProblemError: `settings.triton` is True, and Triton does not work here.
    """
    if settings.triton is False or (settings.triton is None and device.type != "cuda"):
        return False
    reason = why_not(device)
    if reason and settings.triton:
        raise ProblemError(f"triton=True, but Triton {reason}; or leave the setting at None")
    if reason:
        _warn(reason)
    return not reason


@functools.cache
def why_not(device: torch.device) -> str:
    """What keeps Triton from working on a device, with the fix; empty where it works."""
    try:
        kernels = _kernels()
    except ImportError:
        return "is not installed: install the package 'triton'"
    ones = torch.ones(1, 1, 1, device=device)
    empty = torch.zeros(1, 1, dtype=torch.int64, device=device)
    flat = ones[0].clone()
    try:
        kernels.prune_columns[(1,)](
            ones, 1, 1, 1, ones.clone(), 1, 1, flat, flat, torch.zeros_like(flat), flat, empty,
            empty, empty.clone(), flat.clone(), 1, 1, 1, 1, 1, 1, GROUPED=False,
            **_shape(1, 4),
        )  # fmt: skip
    except Exception as error:  # whatever its compiler, its driver or its cache come up with
        told = (str(error).splitlines() or [""])[0]
        return f"does not run on '{device}' ({type(error).__name__}: {told}): repair it"
    return ""


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"the exact solver launches every step from Python, several times slower, because Triton "
        f"{reason}",
        SlowSolverWarning,
        stacklevel=2,
    )


def prune_columns(run: ColumnRun, order: torch.Tensor, increase: torch.Tensor) -> None:
    """As many steps as `order` and `increase`, (steps, rows), have room for."""
    inverse = run.inverse
    steps, rows = order.shape
    run.weight = run.weight.contiguous()
    run.closed = run.closed.contiguous()
    _kernels().prune_columns[(rows,)](
        *_of(inverse),
        run.weight,
        run.diagonal.contiguous(),
        run.closed,
        inverse.floor.contiguous(),
        inverse.column.contiguous(),
        run.given,
        order,
        increase,
        rows,
        inverse.size,
        steps,
        run.given.shape[1],
        run.group,
        run.zeros,
        GROUPED=run.zeros < run.group,
        **_shape(inverse.size, run.weight.itemsize),
    )
    inverse.kept += steps


def quantize(run: QuantizationRun, codes: torch.Tensor, steps: int) -> None:
    """The next `steps` steps; codes go to their columns."""
    inverse = run.inverse
    run.weight = run.weight.contiguous()
    run.closed = run.closed.contiguous()
    _kernels().quantize[(codes.shape[0],)](
        *_of(inverse),
        run.weight,
        run.diagonal.contiguous(),
        run.closed,
        inverse.floor.contiguous(),
        inverse.column.contiguous(),
        run.scale.contiguous(),
        run.zero_point.contiguous(),
        codes,
        codes.shape[1],
        inverse.size,
        steps,
        run.code_min,
        run.code_max,
        **_shape(inverse.size, run.weight.itemsize),
    )
    inverse.kept += steps


def prune_blocks(run: BlockRun, order: torch.Tensor, increase: torch.Tensor) -> None:
    """As many steps as `order` and `increase`, (steps, rows), have room for."""
    inverse = run.inverse
    steps, rows = order.shape
    run.weight = run.weight.contiguous()
    run.closed = run.closed.contiguous()
    gram = run.gram.contiguous()
    _kernels().prune_blocks[(rows,)](
        *_of(inverse),
        run.weight,
        gram,
        gram.stride(1),
        run.closed,
        inverse.floor.contiguous(),
        inverse.column.contiguous(),
        order,
        increase,
        rows,
        inverse.size // BLOCK_SIZE,
        steps,
        **_shape(inverse.size // BLOCK_SIZE, run.weight.itemsize, tensors=BLOCK_SIZE),
    )
    inverse.kept += steps * BLOCK_SIZE


def _of(inverse: DowndatedInverse) -> tuple[torch.Tensor | int, ...]:
    """The stored matrices and the update vectors, with their strides.

    Of the vectors only rows and steps have strides: their places are neighbours.
    """
    stored, vectors = inverse.stored, inverse.vectors
    return (stored, *stored.stride(), vectors, *vectors.stride()[:2])


def _shape(places: int, itemsize: int, *, tensors: int = 1) -> dict[str, int]:
    """Lanes that hold a row, warps among which they are split, update vectors read ahead.

    Few different numbers of lanes: each is compiled once.
    """
    lanes = max(_LEAST_BLOCK, 1 << (places - 1).bit_length())
    warps = min(_MOST_WARPS, max(1, lanes * tensors // _PLACES_OF_A_WARP))
    ahead = _BYTES_AHEAD * warps // (lanes * tensors * itemsize)
    ahead = min(_MOST_AHEAD, max(1, ahead))
    return {"BLOCK": lanes, "AHEAD": ahead, "num_warps": warps, "enable_fp_fusion": True}


def _kernels() -> Any:
    return importlib.import_module("obc_deploy.solvers.triton_kernels")
