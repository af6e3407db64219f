"""Quantization of a layer that was pruned earlier: OBQ on what survives, on grids of its own.

Pruning and quantization may have something between them (batch-norm statistics measured anew,
batch norms folded), and some runtimes want one grid step for a whole layer. Rows may have been
multiplied by a factor each in between: that changes neither which codes are best nor the Hessian.
"""

from __future__ import annotations

import torch

from obc_deploy.errors import SchemeError
from obc_deploy.schemes import Quantization, Scheme
from obc_deploy.solvers.codes import codes_of
from obc_deploy.solvers.contract import CompressedLayer, LayerProblem, Progress
from obc_deploy.solvers.dispatch import (
    needs_hessian,
    threads_for,
    torch_device,
    within_memory,
)
from obc_deploy.solvers.exact_obs import PrunedRows
from obc_deploy.solvers.grids import Grid, find_grid
from obc_deploy.solvers.problems import check_problem, check_scheme, damp, relative_error
from obc_deploy.solvers.rtn import rtn_codes
from obc_deploy.solvers.settings import compression_settings


def shared_grid(weight: torch.Tensor, quantization: Quantization, *, shrink: bool = True) -> Grid:
    """One grid for all rows of a (rows, cols) weight; its scale is repeated, (rows, 1)."""
    rows = weight.shape[0]
    one = find_grid(weight.reshape(1, -1), quantization, shrink=shrink)
    return Grid(
        one.scale.expand(rows, 1).clone(),
        one.zero_point.expand(rows, 1).clone(),
        one.code_min,
        one.code_max,
    )


def quantize_pruned(
    problem: LayerProblem,
    pruned: CompressedLayer[torch.Tensor],
    scheme: Scheme,
    *,
    shared_step: bool = False,
    method: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> CompressedLayer[torch.Tensor]:
    """Codes for a pruned layer; what was pruned stays exactly zero.

    With the shortcuts of `codes_of`.

    Args:
        problem: the dense layer, rows scaled as the pruned ones are; its error is measured against.
        pruned: the layer after pruning (or unpruned, with a mask of ones).
        scheme: the whole scheme; its quantization is applied here.
        shared_step: one grid for the layer instead of one a row.
        method: as in `solve`.
        dtype: as in `solve`.
        device: as in `solve`.
        progress: told the share of the rows done.

    Raises:
        DeviceMemoryError: as in `solve_levels`.
        ProblemError: as in `solve`.
        SchemeError: as in `solve`, or the scheme has no quantization.
    """
    exact, wanted = needs_hessian(method), compression_settings(dtype)
    there, report = torch_device(device), progress or (lambda _: None)
    with threads_for(problem, there, wanted) as settings:
        checked = check_problem(
            problem, needs_hessian=exact, device=there, threads=settings.threads
        )
        rows, cols = checked.weight.shape
        quantization = scheme.quantization
        if quantization is None:
            raise SchemeError(f"layer '{checked.name}': scheme '{scheme}' has no quantization")
        # Its pattern has been applied, and these may be some of the layer's rows.
        check_scheme(
            Scheme(None, quantization), rows=rows, cols=cols, channels=checked.channels,
            name=checked.name,
        )  # fmt: skip
        mask = pruned.mask.to(checked.weight.device)
        weight = pruned.weight.to(checked.weight).masked_fill(~mask, 0.0)
        # Of the pruned rows: survivors have grown to stand in for what is gone.
        if shared_step:
            grid = shared_grid(weight, quantization, shrink=exact)
        else:
            grid = find_grid(weight, quantization, shrink=exact, threads=settings.threads)
        with within_memory(checked):
            if exact:
                rows_left = None if scheme.pattern is None else PrunedRows(mask, weight)
                codes = codes_of(
                    checked, lambda: damp(checked), rows_left, quantization, grid, settings, report
                )
            else:
                codes = rtn_codes(weight, mask, grid)
        report(1.0)
        dequantized = grid.dequantize(codes)
        error = relative_error(checked, dequantized)
    home = problem.weight.device
    return CompressedLayer(
        scheme=scheme,
        weight=dequantized.to(home),
        mask=pruned.mask,
        codes=codes.to(home),
        scale=grid.scale.to(home),
        zero_point=grid.zero_point.to(home),
        error=error,
        method=pruned.method,
    )
