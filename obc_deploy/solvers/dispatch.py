"""solve(W, H, scheme) -> Ŵ: one layer problem, one or many schemes, one of the methods.

`exact_obs` is ExactOBS for patterns and OBQ for grids (both in turn for compound schemes);
`magnitude` and `rtn` are the baselines: magnitude pruning and round-to-nearest, neither of which
updates any weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from obc_deploy.errors import DeviceMemoryError, ProblemError
from obc_deploy.schemes import NM, Pattern, Quantization, Scheme, as_scheme
from obc_deploy.solvers import native_rows
from obc_deploy.solvers.codes import codes_of
from obc_deploy.solvers.contract import (
    DEFAULT_DAMPING,
    ArrayT,
    CompressedLayer,
    LayerProblem,
    Progress,
)
from obc_deploy.solvers.exact_obs import PrunedRows, exact_obs
from obc_deploy.solvers.grids import Grid, find_grid
from obc_deploy.solvers.magnitude import magnitude_mask
from obc_deploy.solvers.nm_then_obq import QuantizedRows, nm_then_obq
from obc_deploy.solvers.problems import (
    CheckedProblem,
    DampedProblem,
    check_problem,
    check_scheme,
    damp,
    relative_error,
)
from obc_deploy.solvers.rtn import rtn_codes
from obc_deploy.solvers.settings import SolverSettings, part_of, precision, torch_beside_rows

METHODS = ("exact_obs", "magnitude", "rtn")
"""Names `method` may take; None is the first."""

_NEED_HESSIAN = frozenset({"exact_obs"})


def needs_hessian(method: str | None) -> bool:
    """Whether a method reads the Hessian (None is the default method).

    Raises:
        ProblemError: no such method.
    """
    return _method(method) in _NEED_HESSIAN


def solve(
    weight: ArrayT,
    hessian: ArrayT | None,
    scheme: Scheme | str,
    *,
    method: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    damping: float = DEFAULT_DAMPING,
    channels: int | None = None,
    name: str = "layer",
    progress: Progress | None = None,
) -> CompressedLayer[ArrayT]:
    """Ŵ = argmin tr((W - Ŵ) H (W - Ŵ)ᵀ) over what the scheme allows, greedily.

    Args:
        weight: (rows, cols) floating point, NumPy array or torch tensor; never changed.
        hessian: H = 2/n · Σ x xᵀ, undamped, (cols, cols), or (groups, cols, cols) for a grouped
            convolution whose rows are split evenly and in order among the groups (depthwise: one
            row each). May be None for "magnitude" and "rtn"; `error` is then that of the weight
            itself, Σ (W - Ŵ)² / Σ W².
        scheme: a scheme or its text, such as "block4@0.9+w8a8".
        method: one of METHODS; None is "exact_obs".
        dtype: "float32" down-dates inverses in float32 (they are made in float64); "float64" does
            everything in float64.
        device: where the work is done: "cpu", "cuda", "cuda:1", or "auto" for CUDA where there is
            any. Results return to where the weight was.
        damping: damping · mean(diag H) is added to H's diagonal while solving.
        channels: columns at one kernel position; blocks and N:M groups never cross it. None: all.
        name: the layer's name, for messages.
        progress: called with the share of the work done.

    Returns:
        A CompressedLayer of the same kind of arrays; `weight` and `scale` are float32.

    Raises:
        ProblemError: values or shapes nothing can be done with, or an unknown method or dtype.
        SchemeError: a scheme that cannot be read or does not fit the layer.
    """
    tensors = LayerProblem(
        weight=_as_tensor(weight, "weight", name),
        hessian=None if hessian is None else _as_tensor(hessian, "hessian", name),
        damping=damping,
        channels=channels,
        name=name,
    )
    solved = solve_problem(
        tensors, scheme, method=method, dtype=dtype, device=device, progress=progress
    )
    return solved if isinstance(weight, torch.Tensor) else _as_numpy(solved)


def solve_problem(
    problem: LayerProblem,
    scheme: Scheme | str,
    *,
    method: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> CompressedLayer[torch.Tensor]:
    """`solve` for a LayerProblem of torch tensors."""
    return solve_levels(
        problem, [as_scheme(scheme)], method=method, dtype=dtype, device=device, progress=progress
    )[0]


def solve_levels(
    problem: LayerProblem,
    schemes: Sequence[Scheme | str],
    *,
    method: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
    settings: SolverSettings | None = None,
) -> list[CompressedLayer[torch.Tensor]]:
    """Many schemes of one layer from shared work, in the order asked for.

    One trace gives all unstructured levels and one all block levels; compound schemes start from
    the pruned layer of their pattern; schemes that differ in activations alone share everything.

    Args:
        problem: the layer; its Hessian may be None where the method needs none.
        schemes: schemes or their texts.
        method: one of METHODS; None is "exact_obs".
        dtype: "float32" or "float64", as in `solve`.
        device: as in `solve`.
        progress: called with the share of the work done.
        settings: memory, update length, shortcuts; its dtype wins over `dtype`.

    Raises:
        DeviceMemoryError: not even one row at a time fits the device.
        ProblemError: as in `solve`.
        SchemeError: as in `solve`; nothing is solved if any scheme does not fit.
    """
    chosen = _method(method)
    settings = settings or SolverSettings(dtype=precision(dtype))
    wanted = [as_scheme(scheme) for scheme in schemes]
    report = progress or _silent
    run = _solve_exactly if chosen == "exact_obs" else _solve_baseline
    home, there = problem.weight.device, torch_device(device)
    with threads_for(problem, there, settings) as theirs:
        checked = check_problem(
            problem, needs_hessian=chosen in _NEED_HESSIAN, device=there, threads=theirs.threads
        )
        rows, cols = checked.weight.shape
        for scheme in wanted:
            check_scheme(scheme, rows=rows, cols=cols, channels=checked.channels, name=checked.name)
        with within_memory(checked):
            solved = run(checked, wanted, theirs, report)
            report(1.0)
            return [_result(checked, each, chosen, home) for each in solved]


def threads_for(
    problem: LayerProblem, device: torch.device, settings: SolverSettings
) -> AbstractContextManager[SolverSettings]:
    """Who gets the cores while a layer is solved; nobody has looked at its shapes yet."""
    if native_rows.is_native(settings, device) and problem.weight.ndim == 2:
        return torch_beside_rows(settings, problem.weight.shape[1])
    return nullcontext(settings)


@contextmanager
def within_memory(problem: CheckedProblem) -> Iterator[None]:
    """Turn an out-of-memory that no smaller batch of rows could avoid into an error that says so.

    Raises:
        DeviceMemoryError: the layer does not fit the device.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows, cols = problem.weight.shape
        raise DeviceMemoryError(
            f"layer '{problem.name}' ({rows}x{cols}) does not fit the memory of "
            f"'{problem.weight.device}' even one row at a time: allow more device memory, or work "
            "on the CPU"
        ) from error


@dataclass(frozen=True)
class _Solved:
    """A solved scheme on the working device; `weight` counts where there is no grid."""

    scheme: Scheme
    weight: torch.Tensor
    mask: torch.Tensor
    codes: torch.Tensor | None = None
    grid: Grid | None = None


def _solve_exactly(
    checked: CheckedProblem,
    schemes: Sequence[Scheme],
    settings: SolverSettings,
    progress: Progress,
) -> list[_Solved]:
    """ExactOBS, then OBQ on what survives, each pattern and each grid once."""
    compiled = native_rows.is_native(settings, checked.weight.device)
    problem = damp(checked, compiled=compiled)
    dense = torch.ones_like(checked.weight, dtype=torch.bool)
    pruned: dict[Pattern | None, PrunedRows] = {None: PrunedRows(dense, checked.weight)}
    quantized: dict[tuple[Pattern | None, Quantization], QuantizedRows] = {}
    grids = _grids_of_patterns(schemes)
    patterns = [pattern for pattern in grids if pattern is not None]
    leaves = compiled and native_rows.leaves_precise_inverses(problem, settings)
    handed: dict[NM, list[Quantization]] = {}
    for each in patterns:
        by_obq = [q for q in grids[each] if not settings.takes_shortcut(q)]
        if leaves and isinstance(each, NM) and by_obq:
            handed[each] = by_obq
            grids[each] = [q for q in grids[each] if settings.takes_shortcut(q)]
    others = [pattern for pattern in patterns if pattern not in handed]
    jobs = len(handed) + bool(others) + sum(map(len, grids.values()))
    spans = iter(_spans(max(jobs, 1)))

    for pattern, quantizations in handed.items():
        report = part_of(progress, *next(spans))
        found = nm_then_obq(problem, pattern, quantizations, settings, report)
        pruned[pattern] = found[0]
        quantized.update({(pattern, q): r for q, r in zip(quantizations, found[1], strict=True)})
    if others:
        forms = exact_obs(problem, others, settings, part_of(progress, *next(spans)))
        pruned.update(zip(others, forms, strict=True))
    for given, quantizations in grids.items():
        rows = None if given is None else pruned[given]
        for quantization in quantizations:
            report = part_of(progress, *next(spans))
            quantized[given, quantization] = _quantize(
                checked, problem, rows, quantization, settings, report
            )
    return [_solved(scheme, pruned, quantized) for scheme in schemes]


def _grids_of_patterns(schemes: Sequence[Scheme]) -> dict[Pattern | None, list[Quantization]]:
    """Each pattern once, None for none, with each of the quantizations that follow it."""
    grids: dict[Pattern | None, list[Quantization]] = {}
    for scheme in schemes:
        of_pattern = grids.setdefault(scheme.pattern, [])
        quantization = _weight_grid(scheme)
        if quantization is not None and quantization not in of_pattern:
            of_pattern.append(quantization)
    return grids


def _quantize(
    checked: CheckedProblem,
    problem: DampedProblem,
    rows: PrunedRows | None,
    quantization: Quantization,
    settings: SolverSettings,
    progress: Progress,
) -> QuantizedRows:
    # Of the rows as they are now: survivors have grown to stand in for what was pruned.
    of_now = problem.weight if rows is None else rows.weight
    grid = find_grid(of_now, quantization, threads=settings.threads)
    codes = codes_of(checked, lambda: problem, rows, quantization, grid, settings, progress)
    return QuantizedRows(codes, grid)


def _solved(
    scheme: Scheme,
    pruned: dict[Pattern | None, PrunedRows],
    quantized: dict[tuple[Pattern | None, Quantization], QuantizedRows],
) -> _Solved:
    rows, quantization = pruned[scheme.pattern], _weight_grid(scheme)
    if quantization is None:
        return _Solved(scheme, rows.weight, rows.mask)
    found = quantized[scheme.pattern, quantization]
    return _Solved(scheme, rows.weight, rows.mask, found.codes, found.grid)


def _solve_baseline(
    checked: CheckedProblem,
    schemes: Sequence[Scheme],
    settings: SolverSettings,
    progress: Progress,
) -> list[_Solved]:
    """Magnitude pruning, then round-to-nearest."""
    solved: list[_Solved] = []
    for done, scheme in enumerate(schemes):
        mask = torch.ones_like(checked.weight, dtype=torch.bool)
        if scheme.pattern is not None:
            mask = magnitude_mask(checked.weight, scheme.pattern)
        weight = checked.weight.masked_fill(~mask, 0.0)
        codes = grid = None
        if scheme.quantization is not None:
            grid = find_grid(weight, scheme.quantization, shrink=False)
            codes = rtn_codes(weight, mask, grid)
        solved.append(_Solved(scheme, weight, mask, codes, grid))
        progress((done + 1) / len(schemes))
    return solved


def _result(
    checked: CheckedProblem, solved: _Solved, method: str, home: torch.device
) -> CompressedLayer[torch.Tensor]:
    weight, scale, zero_point = solved.weight.to(torch.float32), None, None
    if solved.grid is not None and solved.codes is not None:
        weight = solved.grid.dequantize(solved.codes)
        scale, zero_point = solved.grid.scale.to(home), solved.grid.zero_point.to(home)
    return CompressedLayer(
        scheme=solved.scheme,
        weight=weight.to(home, copy=True),
        mask=solved.mask.to(home, copy=True),
        codes=None if solved.codes is None else solved.codes.to(home, copy=True),
        scale=scale,
        zero_point=zero_point,
        error=relative_error(checked, weight),
        method=method,
    )


def _weight_grid(scheme: Scheme) -> Quantization | None:
    """The scheme's quantization less its activations, which no layer solver looks at."""
    quantization = scheme.quantization
    return None if quantization is None else replace(quantization, activation_bits=None)


def _spans(count: int) -> list[tuple[float, float]]:
    """0 to 1 in equal parts."""
    return [(i / count, (i + 1) / count) for i in range(count)]


def _silent(share: float) -> None:
    """No progress is shown."""


def _method(method: str | None) -> str:
    if method is None:
        return METHODS[0]
    if method not in METHODS:
        raise ProblemError(f"method '{method}' is unknown; use one of {', '.join(METHODS)}")
    return method


def torch_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is any, else the CPU.

    Raises:
        ProblemError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ProblemError(f"device '{name}' is unknown; use 'cpu', 'cuda' or 'auto'") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ProblemError(f"device '{name}' is not supported; use 'cpu', 'cuda' or 'auto'")
    if not torch.cuda.is_available():
        why = "no CUDA device works here"
        if torch.version.cuda is None:
            why = "this PyTorch was built for the CPU alone"
        raise ProblemError(f"device '{name}': {why}; use 'cpu' or 'auto'")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ProblemError(f"device '{name}' is not there; cuda:0 to cuda:{count - 1} are")
    return device


def _as_tensor(array: np.ndarray | torch.Tensor, what: str, name: str) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    try:
        # A copy: torch must not warn of, or write to, arrays that are read-only.
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise ProblemError(
            f"layer '{name}': {what} has dtype {np.asarray(array).dtype}; give floating point"
        ) from error


def _as_numpy(solved: CompressedLayer[torch.Tensor]) -> CompressedLayer[np.ndarray]:
    """The same layer in NumPy arrays."""

    def array(tensor: torch.Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.numpy()

    return CompressedLayer(
        scheme=solved.scheme,
        weight=solved.weight.numpy(),
        mask=solved.mask.numpy(),
        codes=array(solved.codes),
        scale=array(solved.scale),
        zero_point=array(solved.zero_point),
        error=solved.error,
        method=solved.method,
    )
