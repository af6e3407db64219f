"""Layer problems made ready: H + damping · mean(diag H) · I and its inverse, checked once.

Dead inputs (H_ii = 0) get H_ii = 1 and weight 0, as in OBC (arXiv 2208.11580, section 4 and its
reference implementation). Everything here is float64; solvers choose their own working precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from obc_deploy.errors import ProblemError, SchemeError
from obc_deploy.schemes import BLOCK_SIZE, NM, Block4, Scheme
from obc_deploy.solvers import native_hessians

if TYPE_CHECKING:
    from obc_deploy.solvers.contract import LayerProblem

_SYMMETRY_TOLERANCE = 1e-4
"""Largest |H_ij - H_ji| taken for rounding, as a share of the largest |H_ij|."""

_DAMPINGS_TRIED = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class CheckedProblem:
    """A layer problem whose values and shapes are known to be good.

    Attributes:
        weight: (rows, cols) float64, as given.
        hessian: (groups, cols, cols) float64, symmetric and undamped, or None.
        damping: relative damping.
        channels: columns at one kernel position.
        name: the layer's name.
        threads: CPU threads of its inverse and errors; None: as many as torch uses.
    """

    weight: torch.Tensor
    hessian: torch.Tensor | None
    damping: float
    channels: int
    name: str
    threads: int | None = None

    @cached_property
    def output_energy(self) -> float:
        """tr(W H Wᵀ), what errors are shares of; without a Hessian H = I."""
        return _output_energy(self.weight, self.hessian, self.threads)


@dataclass(frozen=True)
class DampedProblem:
    """What the exact solvers work on.

    Attributes:
        weight: (rows, cols) float64, zero at dead inputs.
        hessian: (groups, cols, cols) float64, damped.
        inverse: (groups, cols, cols) float64, the inverse of `hessian`.
        group_of_row: (rows,) int64, which Hessian a row belongs to.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    inverse: torch.Tensor
    group_of_row: torch.Tensor

    def of_rows(self, rows: slice | torch.Tensor) -> DampedProblem:
        """Some of the rows alone."""
        return replace(self, weight=self.weight[rows], group_of_row=self.group_of_row[rows])


def check_scheme(
    scheme: Scheme, *, rows: int, cols: int, channels: int | None = None, name: str = "layer"
) -> None:
    """Whether a scheme fits a (rows, cols) layer with `channels` columns at each kernel position.

    Raises:
        SchemeError: N:M groups or blocks do not divide the input channels, or a grid group does not
            divide the columns.
    """
    per_position = cols if channels is None else channels
    pattern, quantization = scheme.pattern, scheme.quantization
    if isinstance(pattern, NM) and per_position % pattern.m:
        raise SchemeError(
            f"scheme '{scheme}' needs input channels in multiples of {pattern.m}, but layer "
            f"'{name}' ({rows}x{cols}) has {per_position}: leave the layer dense or use "
            "'unstructured@S'"
        )
    if isinstance(pattern, Block4) and per_position % BLOCK_SIZE:
        raise SchemeError(
            f"scheme '{scheme}' needs input channels in multiples of {BLOCK_SIZE}, but layer "
            f"'{name}' ({rows}x{cols}) has {per_position}: leave the layer dense or use "
            "'unstructured@S'"
        )
    if isinstance(pattern, Block4) and rows % pattern.together:
        raise SchemeError(
            f"scheme '{scheme}' needs output channels in multiples of {pattern.together}, but "
            f"layer '{name}' ({rows}x{cols}) has {rows}: use 'block4@S' for it"
        )
    if quantization is not None and quantization.group is not None and cols % quantization.group:
        raise SchemeError(
            f"scheme '{scheme}' has grid groups of {quantization.group} columns, which do not "
            f"divide the {cols} columns of layer '{name}': use a divisor of {cols} or leave "
            f"'g{quantization.group}' out for one grid per output channel"
        )


def check_problem(
    problem: LayerProblem, *, needs_hessian: bool, device: torch.device, threads: int | None = None
) -> CheckedProblem:
    """The problem in float64 on `device`, after every check that needs no factorization.

    Args:
        problem: as given.
        needs_hessian: whether the method reads the Hessian.
        device: where the work will be done.
        threads: as in CheckedProblem.

    Raises:
        ProblemError: wrong shapes, no rows or columns, values that are not finite, a Hessian that
            is not symmetric or has a negative diagonal, an impossible damping, or no Hessian where
            the method needs one.
    """
    name = problem.name
    weight = _checked_weight(problem.weight, name).to(device=device, dtype=torch.float64)
    cols = weight.shape[1]
    channels = cols if problem.channels is None else problem.channels
    if channels < 1 or cols % channels:
        raise ProblemError(
            f"layer '{name}': channels={channels} does not divide its {cols} columns; give the "
            "input channels at one kernel position"
        )
    if not (math.isfinite(problem.damping) and problem.damping >= 0.0):
        raise ProblemError(
            f"layer '{name}': damping {problem.damping} is not a finite number of 0 or more; "
            "0.01 is usual"
        )
    given = problem.hessian
    if given is None and needs_hessian:
        raise ProblemError(
            f"layer '{name}': hessian is None, but this method needs it; calibrate the layer or "
            "use method='magnitude' or 'rtn'"
        )
    hessian = None if given is None else _checked_hessian(given, weight, name)
    return CheckedProblem(weight.clone(), hessian, problem.damping, channels, name, threads)


def _checked_weight(weight: torch.Tensor, name: str) -> torch.Tensor:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ProblemError(
            f"layer '{name}': weight of shape {tuple(weight.shape)} is no (rows, cols) matrix with "
            "at least one row and column; flatten the kernel into columns"
        )
    if not weight.is_floating_point():
        raise ProblemError(f"layer '{name}': weight is {weight.dtype}; give floating-point numbers")
    bad = ~torch.isfinite(weight.detach().to(torch.float32))
    if bool(bad.any()):
        row, col = (int(i) for i in bad.nonzero()[0])
        raise ProblemError(
            f"layer '{name}': weight[{row}, {col}] = {float(weight[row, col])} is not a finite "
            "float32; repair the checkpoint"
        )
    return weight.detach()


def _checked_hessian(hessian: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    rows, cols = weight.shape
    if hessian.ndim not in (2, 3) or hessian.shape[-2:] != (cols, cols) or 0 in hessian.shape:
        raise ProblemError(
            f"layer '{name}': hessian of shape {tuple(hessian.shape)} does not fit a weight of "
            f"{rows}x{cols}; it must be ({cols}, {cols}) or (groups, {cols}, {cols})"
        )
    full = hessian.detach().to(device=weight.device, dtype=torch.float64).reshape(-1, cols, cols)
    if rows % full.shape[0]:
        raise ProblemError(
            f"layer '{name}': {full.shape[0]} Hessian groups do not divide its {rows} rows; give "
            "one Hessian for each group of the convolution"
        )
    low, high = (float(end) for end in torch.aminmax(full))
    if not (math.isfinite(low) and math.isfinite(high)):
        group, i, j = (int(k) for k in (~torch.isfinite(full)).nonzero()[0])
        raise ProblemError(
            f"layer '{name}': hessian[{i}, {j}] of group {group} is {float(full[group, i, j])}; "
            "remove samples that are not finite from the calibration data"
        )
    turned = full.mT.clone(memory_format=torch.contiguous_format)  # never the caller's own
    skew = float((full - turned).abs_().max())
    if skew > _SYMMETRY_TOLERANCE * max(-low, high):
        raise ProblemError(
            f"layer '{name}': hessian is not symmetric (entries differ by {skew:.3g}); it must be "
            "2/n · sum of x xᵀ"
        )
    diagonal = full.diagonal(dim1=1, dim2=2)
    if bool((diagonal < 0).any()):
        group, i = (int(k) for k in (diagonal < 0).nonzero()[0])
        raise ProblemError(
            f"layer '{name}': hessian[{i}, {i}] of group {group} is "
            f"{float(diagonal[group, i]):.3g}; a sum of squares cannot be negative: recompute it "
            "as 2/n · sum of x xᵀ"
        )
    return turned.add_(full).mul_(0.5)


def damp(problem: CheckedProblem, *, compiled: bool = True) -> DampedProblem:
    """H + damping · mean(diag H) · I with its inverse, by one factorization per group.

    Args:
        problem: the layer.
        compiled: whether compiled code may do it, where there is any.

    Raises:
        ProblemError: the damped Hessian is singular; the message names the smallest damping, among
            powers of ten, that works in float32.
    """
    damped, dead = damp_hessian(problem)
    rows, groups = problem.weight.shape[0], damped.shape[0]
    group_of_row = torch.arange(groups, device=damped.device).repeat_interleave(rows // groups)
    inverse = _inverse(damped, problem.threads, compiled=compiled)
    if inverse is None:
        raise ProblemError(_singular_message(problem))
    weight = problem.weight.masked_fill(dead[group_of_row], 0.0)
    return DampedProblem(weight, damped, inverse, group_of_row)


def damp_hessian(problem: CheckedProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """H + damping · mean(diag H) · I, (groups, cols, cols), and which inputs are dead.

    Raises:
        ProblemError: there is no Hessian.
    """
    hessian = problem.hessian
    if hessian is None:
        raise ProblemError(f"layer '{problem.name}': hessian is None; calibrate the layer first")
    dead = _dead(hessian)
    return _damped(hessian, dead, problem.damping), dead


def ordered_factor(
    problem: CheckedProblem, damped: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """V of P H Pᵀ = V Vᵀ, upper triangular, P an order of the inputs: (groups, cols, cols).

    Args:
        problem: the layer.
        damped: its damped Hessians.
        order: (groups, cols) the inputs of each in that order.

    Raises:
        ProblemError: the damped Hessian is singular, as in `damp`.
    """
    # The Cholesky factor of the reverse order, in reverse.
    last_first = order.flip(1)
    turned = damped.gather(1, last_first[:, :, None].expand_as(damped))
    turned = turned.gather(2, last_first[:, None].expand_as(damped))
    factor = _factor(turned)
    if factor is None:
        raise ProblemError(_singular_message(problem))
    return factor.flip(1, 2)


def _dead(hessian: torch.Tensor) -> torch.Tensor:
    return hessian.diagonal(dim1=1, dim2=2) == 0


def _damped(hessian: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor:
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    share = damping * diagonal.mean(1, keepdim=True)
    # A zero diagonal of a sum of squares means zero rows; what rounding left there goes too.
    damped.masked_fill_(dead[:, :, None] | dead[:, None, :], 0.0)
    diagonal.copy_(torch.where(dead, torch.ones_like(diagonal), diagonal + share))
    return damped


def _inverse(damped: torch.Tensor, threads: int | None, *, compiled: bool) -> torch.Tensor | None:
    """The inverses, or None where a pivot is no more than rounding."""
    if compiled and native_hessians.is_native(damped.device):
        inverse, pivots = native_hessians.inverses(damped, threads)
        return inverse if _is_regular(pivots, damped) else None
    factor = _factor(damped)
    # Symmetric, and laid out by columns: its transpose is the same matrix by rows, without a copy.
    return None if factor is None else torch.cholesky_inverse(factor).mT.contiguous()


def _factor(damped: torch.Tensor, *, least_pivot: float = 0.0) -> torch.Tensor | None:
    """The Cholesky factors, or None where a pivot is no more than rounding, or `least_pivot`."""
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        return None
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    return factor if _is_regular(pivots, damped, least_pivot=least_pivot) else None


def _is_regular(pivots: torch.Tensor, damped: torch.Tensor, *, least_pivot: float = 0.0) -> bool:
    """Whether all pivots, (groups, cols), are more than rounding, and than `least_pivot`.

    They count as shares of H's own diagonal: what of an input the inputs before it do not tell.
    """
    least = max(10 * damped.shape[-1] * torch.finfo(damped.dtype).eps, least_pivot)
    return bool((pivots > least * damped.diagonal(dim1=1, dim2=2)).all())


def _singular_message(problem: CheckedProblem) -> str:
    assert problem.hessian is not None
    hessian, dead = problem.hessian, _dead(problem.hessian)
    start = f"layer '{problem.name}': the Hessian is singular with damping={problem.damping:g}; "
    # What is named must leave float32 down-dating something to work with, so it is held to more.
    least = torch.finfo(torch.float32).eps
    for damping in _DAMPINGS_TRIED:
        damped = _damped(hessian, dead, damping)
        if damping > problem.damping and _factor(damped, least_pivot=least) is not None:
            return start + f"damping={damping:g} works, or calibrate on more samples"
    return start + "it is not positive semi-definite: recompute it as 2/n · sum of x xᵀ"


def relative_error(problem: CheckedProblem, compressed: torch.Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ) under the undamped H, in float64.

    Without a Hessian H = I: the relative squared error of the weight itself. A layer whose output
    is zero has error 0 where nothing changed it, and infinity otherwise.
    """
    off = problem.weight - compressed.to(torch.float64)
    lost = _output_energy(off, problem.hessian, problem.threads)
    whole = problem.output_energy
    if whole > 0.0:
        return max(lost, 0.0) / whole
    return 0.0 if lost <= 0.0 else math.inf


def _output_energy(
    weight: torch.Tensor, hessian: torch.Tensor | None, threads: int | None
) -> float:
    if hessian is None:
        return float(weight.square().sum())
    if native_hessians.is_native(hessian.device):
        return native_hessians.output_energy(weight, hessian, threads)
    grouped = weight.reshape(hessian.shape[0], -1, weight.shape[1])
    return float(((grouped @ hessian) * grouped).sum())
