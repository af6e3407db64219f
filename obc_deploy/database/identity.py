"""What a stored layer is an answer to: the problem, and how it was solved.

Weights are known by their bytes. A Hessian is known by a few quadratic forms vᵀHv with fixed random
vectors: the same samples summed up in another order, by another number of threads, are the same
Hessian; other samples are not.
"""

from __future__ import annotations

import hashlib
import math

import torch
from pydantic import BaseModel, ConfigDict

from obc_deploy.solvers.contract import LayerProblem

SOLVER_VERSION = "3"
"""Raised when a solver's results change: levels of another version are solved again."""


_FORMS = 4
"""Quadratic forms that a Hessian is known by."""
_SAME = 1e-5
"""Relative difference up to which they are the same; summing in another order makes some 1e-7."""


class Identity(BaseModel):
    """A layer problem and its solver.

    Attributes:
        weight: SHA-256 of the weight's shape, dtype and bytes.
        hessian: quadratic forms of the Hessian, or None where there is none.
        channels: columns at one kernel position.
        damping: relative damping.
        method: the solver.
        dtype: its precision.
        solver: its version.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: str
    hessian: tuple[float, ...] | None
    channels: int
    damping: float
    method: str
    dtype: str
    solver: str

    def answers(self, other: Identity) -> bool:
        """Whether what was solved for this identity is an answer to the other one."""
        return self.difference(other) is None and self.solver == other.solver

    def difference(self, other: Identity) -> str | None:
        """What another identity has that this one has not, in words, or None.

        Solver versions do not count: an older answer is to the same question.
        """
        if self.weight != other.weight:
            return "other weights"
        if not _same(self.hessian, other.hessian):
            return "another Hessian (other calibration samples, or calibrated in another way)"
        for field in ("channels", "damping", "method", "dtype"):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                return f"{field} {theirs} instead of {ours}"
        return None


def identity_of(problem: LayerProblem, *, method: str, dtype: str, solver: str) -> Identity:
    """The identity of a problem and the solver that is to work on it.

    Args:
        problem: the layer.
        method: the solver's name.
        dtype: "float32" or "float64".
        solver: the solver's version.
    """
    return Identity(
        weight=_digest(problem.weight),
        hessian=None if problem.hessian is None else _forms(problem.hessian),
        channels=problem.channels or problem.weight.shape[-1],
        damping=problem.damping,
        method=method,
        dtype=dtype,
        solver=solver,
    )


def _forms(hessian: torch.Tensor) -> tuple[float, ...]:
    """vᵀHv / cols for random vectors v of signs, all groups of a layer together."""
    generator = torch.Generator().manual_seed(0)
    matrices = hessian.detach().cpu().double().reshape(-1, *hessian.shape[-2:])
    signs = torch.randint(0, 2, (len(matrices), _FORMS, hessian.shape[-1]), generator=generator)
    vectors = 2.0 * signs.double() - 1.0
    forms = ((vectors @ matrices) * vectors).sum((0, 2)) / hessian.shape[-1]
    return tuple(float(form) for form in forms)


def _same(one: tuple[float, ...] | None, two: tuple[float, ...] | None) -> bool:
    if one is None or two is None:
        return one is two
    return all(
        math.isclose(a, b, rel_tol=_SAME) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(one, two, strict=True)
    )


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
