"""Quantization of a layer that was pruned earlier: OBQ on what survives, on grids of its own.

Pruning and quantization may have something between them (batch-norm statistics measured anew,
batch norms folded), and some runtimes want one grid step for a whole layer. Rows may have been
multiplied by a factor each in between: that changes neither which codes are best nor the Hessian.
"""

from __future__ import annotations

import torch

from obc_deploy.errors import SchemeError
from obc_deploy.schemes import Quantization, Scheme
from obc_deploy.solvers.contract import CompressedLayer, LayerProblem, Progress
from obc_deploy.solvers.dispatch import (
    needs_hessian,
    threads_for,
    torch_device,
    within_memory,
)
from obc_deploy.solvers.grids import Grid, find_grid
from obc_deploy.solvers.obq import obq_codes, obq_codes_of_survivors
from obc_deploy.solvers.ordered_obq import ordered_obq_codes
from obc_deploy.solvers.problems import check_problem, check_scheme, damp, relative_error
from obc_deploy.solvers.rounding import rounding_suffices
from obc_deploy.solvers.rtn import rtn_codes
from obc_deploy.solvers.settings import SolverSettings, precision


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

    Pruned rows are rounded where that loses next to nothing (`rounding_suffices`); dense ones of
    eight bits are quantized in one order for all rows (`ordered_obq`); elsewhere it is OBQ.

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
    exact, wanted = needs_hessian(method), SolverSettings(dtype=precision(dtype), shortcuts=True)
    there, report = torch_device(device), progress or (lambda _: None)
    with threads_for(problem, there, wanted) as settings:
        checked = check_problem(
            problem, needs_hessian=exact, device=there, threads=settings.threads
        )
        rows, cols = checked.weight.shape
        check_scheme(scheme, rows=rows, cols=cols, channels=checked.channels, name=checked.name)
        quantization = scheme.quantization
        if quantization is None:
            raise SchemeError(f"layer '{checked.name}': scheme '{scheme}' has no quantization")
        mask = pruned.mask.to(checked.weight.device)
        weight = pruned.weight.to(checked.weight).masked_fill(~mask, 0.0)
        # Of the pruned rows: survivors have grown to stand in for what is gone.
        if shared_step:
            grid = shared_grid(weight, quantization, shrink=exact)
        else:
            grid = find_grid(weight, quantization, shrink=exact, threads=settings.threads)
        codes = rtn_codes(weight, mask, grid)
        with within_memory(checked):
            if exact and scheme.pattern is None:
                if settings.takes_shortcut(quantization):
                    codes = ordered_obq_codes(checked, grid, report)
                else:
                    codes = obq_codes(damp(checked), grid, settings, report)
            elif exact and not rounding_suffices(checked, weight, grid, codes):
                codes = obq_codes_of_survivors(damp(checked), weight, mask, grid, settings, report)
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
