"""Solvers: one algorithm, one file, all behind the contract in `contract.py`."""

from obc_deploy.solvers.contract import DEFAULT_DAMPING, CompressedLayer, LayerProblem, Progress
from obc_deploy.solvers.dispatch import (
    METHODS,
    needs_hessian,
    solve,
    solve_levels,
    solve_problem,
    torch_device,
)
from obc_deploy.solvers.problems import check_scheme
from obc_deploy.solvers.settings import SolverSettings

__all__ = [
    "DEFAULT_DAMPING",
    "METHODS",
    "CompressedLayer",
    "LayerProblem",
    "Progress",
    "SolverSettings",
    "check_scheme",
    "needs_hessian",
    "solve",
    "solve_levels",
    "solve_problem",
    "torch_device",
]
