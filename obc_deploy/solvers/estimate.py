"""How long the exact solver will take: its operations, over rates measured here and now.

A trace of a (rows, cols) layer is rows · cols³ / 3 operations of rank updates and rows · cols² / 2
visits of a weight that is left. Both rates come from a probe of a few hundredths of a second; the
solves in double precision (weights of a mask, inverses of survivors) have a rate of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from obc_deploy import native
from obc_deploy.schemes import NM, Block4, Pattern, Quantization, Scheme
from obc_deploy.solvers import native_rows
from obc_deploy.solvers.contract import LayerProblem
from obc_deploy.solvers.dispatch import solve_levels
from obc_deploy.solvers.exact_obs import (
    factored_share,
    pattern_kind,
    sparsity_of,
    trace_weights,
)
from obc_deploy.solvers.grids import find_grid
from obc_deploy.solvers.problems import check_problem, damp
from obc_deploy.solvers.settings import SolverSettings, torch_threads

_PROBE_ROWS, _PROBE_COLS = 16, 384
_NM_SHARE = 0.7
"""Torch's rank updates of 2:4 beside a whole trace: full groups drop out with all their columns."""
_DOUBLE_SHARE = 0.35
"""Rate of the double-precision solves, gathering included, as a share of the rank update's."""
_INVERSE_SHARE = 0.5
"""The same for inverses of survivors."""
_COLUMN_CALLS = 0.05
"""Schemes' calls that a column in one order for all rows takes in torch besides its products."""


@dataclass(frozen=True)
class LayerShape:
    """A layer as far as its solving time goes.

    Attributes:
        rows: rows of the matrix problem.
        cols: columns of the matrix problem.
        schemes: what is to be solved for it.
        pruned: whether the pruning was done earlier and quantization alone is left.
    """

    rows: int
    cols: int
    schemes: tuple[Scheme, ...]
    pruned: bool = False


@dataclass(frozen=True)
class Work:
    """What a layer asks for, in operations.

    Attributes:
        updates: floating-point operations of rank updates.
        visits: weights looked at, summed over all steps.
        solves: floating-point operations of double-precision solves.
        inverses: floating-point operations of double-precision inverses and error sums.
        factors: the same of the layer's own Hessian's inverse.
        searched: weights whose grid is searched for.
        calls: schemes.
    """

    updates: float = 0.0
    visits: float = 0.0
    solves: float = 0.0
    inverses: float = 0.0
    factors: float = 0.0
    searched: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.updates + other.updates,
            self.visits + other.visits,
            self.solves + other.solves,
            self.inverses + other.inverses,
            self.factors + other.factors,
            self.searched + other.searched,
            self.calls + other.calls,
        )


def layer_work(shape: LayerShape, settings: SolverSettings) -> Work:
    """The operations of the exact method for one layer's schemes."""
    rows, cols = float(shape.rows), float(shape.cols)

    def run(size: float, share: float = 1.0) -> Work:
        return Work(share * rows * size**3 / 3, share * rows * size**2 / 2)

    schemes = len(shape.schemes)
    native = native_rows.is_native(settings, torch.device("cpu"))
    of_error = rows * cols**2 * (1 if native else 2)
    total = Work(factors=cols**3, inverses=of_error * schemes, calls=schemes)
    patterns = list(dict.fromkeys(s.pattern for s in shape.schemes if s.pattern is not None))
    kinds = dict.fromkeys(pattern_kind(pattern) for pattern in patterns)
    for kind in () if shape.pruned else kinds:
        of_kind = [pattern for pattern in patterns if pattern_kind(pattern) == kind]
        levels = [sparsity_of(pattern) for pattern in of_kind]
        if native and isinstance(kind, NM):
            total += run(cols, 1.0 - (1.0 - levels[0]) ** 3)
            continue
        total += run(
            cols, _NM_SHARE if isinstance(kind, NM) else 1.0 / _rows_of_an_inverse(of_kind)
        )
        total += Work(solves=rows * factored_share(levels) * cols**3 / 3)
    quantized: set[tuple[Pattern | None, Quantization]] = set()
    for scheme in shape.schemes:
        if scheme.quantization is None:
            continue
        # Schemes that differ in activations alone share everything.
        grid = replace(scheme.quantization, activation_bits=None)
        if (scheme.pattern, grid) in quantized:
            continue
        quantized.add((scheme.pattern, grid))
        total += Work(searched=rows * cols)
        if settings.takes_shortcut(grid):
            if scheme.pattern is None:
                products = 2 * rows * cols**2 + cols**3 / 3
                total += Work(inverses=products, calls=_COLUMN_CALLS * cols)
            else:
                total += Work(inverses=2 * of_error)
            continue
        if scheme.pattern is None:
            total += run(cols)
        else:
            left = (1 - sparsity_of(scheme.pattern)) * cols
            total += run(left)
            if native and not shape.pruned and isinstance(scheme.pattern, NM):
                continue  # compiled rows hand over the inverses that pruning left
            if native and 2 * left >= cols:
                total += Work(updates=rows * (cols**3 - left**3) / 3)
            else:
                total += Work(inverses=rows * left**3)
    return total


def operations(shapes: Iterable[LayerShape]) -> float:
    """Floating-point operations of all layers together."""
    works = [layer_work(shape, SolverSettings()) for shape in shapes]
    return sum(work.updates + work.solves + work.inverses for work in works)


@dataclass(frozen=True)
class SolverRates:
    """What this machine does in a second on one thread.

    Attributes:
        updates: operations of rank updates.
        visits: weights looked at.
        doubles: operations of rank updates in double precision.
        factors: operations of a symmetric inverse in double precision.
        searches: weights whose grid is searched for.
        call: seconds of a scheme, however small the layer.
    """

    updates: float
    visits: float
    doubles: float
    factors: float
    searches: float
    call: float

    def seconds(self, work: Work, threads: int = 1) -> float:
        """The time that so many threads take."""
        alone = (
            work.updates / self.updates
            + work.visits / self.visits
            + work.solves / (_DOUBLE_SHARE * self.doubles)
            + work.inverses / (_INVERSE_SHARE * self.doubles)
            + work.searched / self.searches
            + work.factors / self.factors
            + work.calls * self.call
        )
        return alone / threads


def measure_rates(cols: int, settings: SolverSettings) -> SolverRates:
    """Rates for layers of about `cols` columns, from a probe of the solver that will be used.

    Args:
        cols: columns; wide layers fall out of the caches.
        settings: precision; whether the compiled rows are used.
    """
    rows, probe = _PROBE_ROWS, _PROBE_COLS
    made = torch.Generator().manual_seed(0)
    mixed = torch.randn(probe, 2 * probe, generator=made, dtype=torch.float64)
    weight = torch.randn(rows, probe, generator=made)
    problem = LayerProblem(weight, mixed @ mixed.T / probe)
    tiny = LayerProblem(weight[:4, :16], problem.hessian[:16, :16])  # type: ignore[index]
    with torch_threads(1):
        call = _best_of(lambda: solve_levels(tiny, ["unstructured@0.5"], settings=settings))
        grid = Quantization(8)
        searched = _best_of(lambda: find_grid(weight, grid))
        checked = check_problem(problem, needs_hessian=True, device=torch.device("cpu"))
        damped = damp(checked)
        factored = _best_of(lambda: damp(checked))
        traced = _best_of(lambda: trace_weights(damped, settings, lambda _: None))
    work = rows * probe**3 / 3
    if native_rows.is_native(settings, torch.device("cpu")):
        bits = torch.finfo(settings.dtype).bits
        depth = settings.update_length(wide=cols >= native_rows.WIDE)

        def rate(size: int, bits: int) -> float:
            repeats = max(1, int(1e8 / size / size / depth))
            measure = native.library().obc_update_rate
            return max(float(measure(bits, size, depth, repeats)) for _ in range(3))

        near, far, doubles = rate(probe, bits), rate(cols, bits), rate(cols, 64)
    else:
        # Batched torch calls: the probe's time is all visits, which stands for everything.
        near = far = doubles = 3 * work / traced
    left = max(traced - work / near, 0.1 * traced)
    return SolverRates(
        updates=far,
        visits=rows * probe**2 / 2 / left,
        doubles=doubles,
        factors=probe**3 / factored,
        searches=rows * probe / searched,
        call=call,
    )


def _best_of(call: Callable[[], object], times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def estimate_seconds(shapes: Iterable[LayerShape], settings: SolverSettings | None = None) -> float:
    """Seconds that the exact method will take on the CPU with the threads torch has now.

    Args:
        shapes: the layers with their schemes.
        settings: how the solver works.
    """
    settings = settings or SolverSettings()
    wanted = list(shapes)
    rates: dict[int, SolverRates] = {}
    total = 0.0
    for shape in wanted:
        near = _near(shape.cols)
        if near not in rates:
            rates[near] = measure_rates(near, settings)
        threads = settings.workers(shape.rows, shape.cols)
        total += rates[near].seconds(layer_work(shape, settings), threads)
    return total


def _near(cols: int) -> int:
    """A power of two near the columns, so that a network needs few probes."""
    size = 64
    while size * 1.5 < cols and size < 4096:
        size *= 2
    return size


def _rows_of_an_inverse(patterns: Sequence[Pattern]) -> int:
    """Rows that share masks share inverses too; of patterns of one kind."""
    return patterns[0].together if isinstance(patterns[0], Block4) else 1
