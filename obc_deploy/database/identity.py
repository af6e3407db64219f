"""What a stored layer is an answer to: the problem's very bytes, and how it was solved.

A level is looked up by this identity and its scheme; anything else is another level.
"""

from __future__ import annotations

import hashlib

import torch
from pydantic import BaseModel, ConfigDict

from obc_deploy.solvers.contract import LayerProblem

SOLVER_VERSION = "1"
"""Raised when a solver's results change: levels of another version are solved again."""


class Identity(BaseModel):
    """A layer problem and its solver, to the bit.

    Attributes:
        weight: SHA-256 of the weight's shape, dtype and bytes.
        hessian: the same of the Hessian, or None where there is none.
        channels: columns at one kernel position.
        damping: relative damping.
        method: the solver.
        dtype: its precision.
        solver: its version.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: str
    hessian: str | None
    channels: int
    damping: float
    method: str
    dtype: str
    solver: str

    def difference(self, other: Identity) -> str | None:
        """What another identity has that this one has not, in words, or None.

        Solver versions do not count: an older answer is to the same question.
        """
        if self.weight != other.weight:
            return "other weights"
        if self.hessian != other.hessian:
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
        hessian=None if problem.hessian is None else _digest(problem.hessian),
        channels=problem.channels or problem.weight.shape[-1],
        damping=problem.damping,
        method=method,
        dtype=dtype,
        solver=solver,
    )


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
