"""A layer's outline: its name and shape, which is all that choosing its levels needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from obc_deploy.errors import ProblemError

if TYPE_CHECKING:
    from obc_deploy.layers import Layer
    from obc_deploy.solvers.contract import LayerProblem


@dataclass(frozen=True)
class LayerOutline:
    """The shape of a layer problem.

    Attributes:
        name: the layer's name.
        rows: rows of the weight matrix.
        cols: columns of the weight matrix.
        channels: columns at one kernel position.
        groups: Hessians of the layer; its rows are split evenly among them.
    """

    name: str
    rows: int
    cols: int
    channels: int
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.cols


def outline_of_layer(layer: Layer) -> LayerOutline:
    """The outline of a network's layer; needs no calibration."""
    return LayerOutline(layer.name, layer.rows, layer.cols, layer.channels, layer.groups)


def outline_of_problem(problem: LayerProblem) -> LayerOutline:
    """The outline of a layer problem.

    Raises:
        ProblemError: its weight is no matrix.
    """
    if problem.weight.ndim != 2:
        raise ProblemError(
            f"layer '{problem.name}': weight of shape {tuple(problem.weight.shape)} is no "
            "(rows, cols) matrix; flatten the kernel into columns"
        )
    rows, cols = problem.weight.shape
    hessian = problem.hessian
    groups = hessian.shape[0] if hessian is not None and hessian.ndim == 3 else 1
    return LayerOutline(problem.name, rows, cols, problem.channels or cols, groups)
