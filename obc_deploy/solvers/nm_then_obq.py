"""N:M, then OBQ of the survivors from the inverses that pruning left.

Once a greedy run has eliminated P, what is left of each row's G is (H_SS)⁻¹, the very matrix that
OBQ starts from: nothing need be inverted again. All rows of an N:M pattern stop after the same
number of steps, so none waits for the rest of the layer as levels of a sparsity do. The inverses of
a batch of rows wait in memory while its grids are found (OBC, arXiv 2208.11580, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from obc_deploy.schemes import NM, Quantization
from obc_deploy.solvers import native_rows
from obc_deploy.solvers.contract import Progress
from obc_deploy.solvers.exact_obs import PrunedRows
from obc_deploy.solvers.grids import Grid, find_grid
from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.settings import SolverSettings, part_of


@dataclass(frozen=True)
class QuantizedRows:
    """One grid's outcome.

    Attributes:
        codes: (rows, cols) int8.
        grid: the rows' grids.
    """

    codes: torch.Tensor
    grid: Grid


def nm_then_obq(
    problem: DampedProblem,
    pattern: NM,
    quantizations: Sequence[Quantization],
    settings: SolverSettings,
    progress: Progress,
) -> tuple[PrunedRows, list[QuantizedRows]]:
    """One N:M pattern on the CPU's compiled rows, and each quantization of what it leaves.

    Args:
        problem: the layer.
        pattern: the pattern.
        quantizations: grids to solve for, by themselves; activations do not matter.
        settings: precision, and the memory that inverses may wait in.
        progress: told the share of the work done.
    """
    rows, cols = problem.weight.shape
    left_share = pattern.n / pattern.m
    row_bytes = native_rows.LeftInverses.row_bytes(cols, pattern, settings.dtype)
    pruning = 1.0 - left_share**3
    pruning /= pruning + len(quantizations) * left_share**3

    mask = torch.empty(rows, cols, dtype=torch.bool)
    weight = torch.empty(rows, cols, dtype=torch.float64)
    codes = [torch.empty(rows, cols, dtype=torch.int8) for _ in quantizations]
    grids: list[list[Grid]] = [[] for _ in quantizations]
    for some in settings.row_batches_of(rows, row_bytes):
        part = problem.of_rows(some)
        report = part_of(progress, some.start / rows, some.stop / rows)
        batch = some.stop - some.start
        left = native_rows.LeftInverses.room(batch, cols, pattern, settings.dtype)
        mask[some], weight[some] = native_rows.prune_and_weigh(
            part, pattern, settings, part_of(report, 0.0, pruning), left=left
        )
        for i, quantization in enumerate(quantizations):
            share = (1.0 - pruning) / len(quantizations)
            begin = pruning + i * share
            # Of the pruned rows: survivors have grown to stand in for what is gone.
            grid = find_grid(weight[some], quantization, threads=settings.threads)
            codes[i][some] = native_rows.quantize(
                part, weight[some], None, grid, settings, part_of(report, begin, begin + share),
                left=left,
            )  # fmt: skip
            grids[i].append(grid)
    quantized = [
        QuantizedRows(code, Grid.of_all_rows(parts))
        for code, parts in zip(codes, grids, strict=True)
    ]
    return PrunedRows(mask, weight), quantized
