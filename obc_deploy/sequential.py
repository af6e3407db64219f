"""Sequential mode: layers in network order, each on what the compressed ones before it give it.

With x a layer's inputs in the dense network and x̂ those in the partly compressed one, its weight
should give the dense outputs back:

    min ‖W X - Ŵ X̂‖²        H = 2/n · Σ x̂ x̂ᵀ        D = 2/n · Σ (x - x̂) x̂ᵀ

Whatever Ŵ may be, ‖W X - Ŵ X̂‖² is tr((W* - Ŵ) H (W* - Ŵ)ᵀ) and a constant, where

    W* = W + W D H⁻¹

is the best weight without any constraint. So the layer problem becomes (W*, H), and solvers run on
it unchanged (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). Where nothing was compressed
before a layer, D is zero and W* is W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obc_deploy.calibration import HessianAccumulator, LayerStatistics, VectorProducts
from obc_deploy.layers import Layer, input_vectors
from obc_deploy.paired_networks import PairedNetworks
from obc_deploy.solvers.contract import DEFAULT_DAMPING, LayerProblem
from obc_deploy.solvers.problems import check_problem, damp

STRENGTH = 1.0
"""Share of the step from W to W* that is taken, unless told otherwise."""


@dataclass(frozen=True)
class SequentialStatistics:
    """What one layer sees in the compressed network, and how that differs from the dense one.

    Attributes:
        inputs: H = 2/n · Σ x̂ x̂ᵀ and its counts, as calibration gives them.
        drift: D = 2/n · Σ (x - x̂) x̂ᵀ, of H's shape; exactly zero where x̂ = x.
    """

    inputs: LayerStatistics
    drift: Tensor


def corrected_weight(
    weight: Tensor,
    statistics: SequentialStatistics,
    *,
    damping: float = DEFAULT_DAMPING,
    strength: float = STRENGTH,
    name: str = "layer",
) -> Tensor:
    """W* = W + strength · W D (H + damping · mean(diag H) · I)⁻¹.

    Damping pulls W* to W, not to zero; where D is zero, W* is W to the last bit.

    Args:
        weight: (rows, cols) of the dense layer.
        statistics: of the layer.
        damping: relative damping of H.
        strength: 0 leaves the weight as it is, 1 goes all the way.
        name: the layer's name, for messages.

    Returns:
        (rows, cols), of the weight's dtype and on its device.

    Raises:
        ProblemError: H is singular under this damping, or values are not finite.
    """
    if strength == 0.0 or not bool(statistics.drift.any()):
        return weight
    hessian = statistics.inputs.hessian
    problem = LayerProblem(weight.to(hessian.device), hessian, damping, None, name)
    inverse = damp(check_problem(problem, needs_hessian=True, device=hessian.device)).inverse
    rows, cols = weight.shape
    grouped = weight.to(inverse).reshape(inverse.shape[0], -1, cols)
    step = grouped @ statistics.drift.to(inverse).reshape(inverse.shape) @ inverse
    return (grouped + strength * step).reshape(rows, cols).to(weight)


class _PairedAccumulator:
    """Adds up H and D of one layer from its inputs in both networks."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        self._layer = layer
        self._inputs = HessianAccumulator(layer, dtype, device)
        self._drift = VectorProducts(layer, dtype, device)
        self._vectors = 0

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """Add one call of the layer on the same samples in both networks."""
        dense, compressed = dense.detach().float(), compressed.detach().float()
        drifts = not torch.equal(dense, compressed)
        pairs = zip(
            input_vectors(self._layer, dense), input_vectors(self._layer, compressed), strict=True
        )
        for wanted, found in pairs:
            self._vectors += found.shape[-1]
            self._inputs.add_vectors(found)
            if drifts:
                # As rows, which is how the vectors lie in memory.
                difference = (wanted.mT - found.mT).mT
                self._drift.add(difference, found)

    def statistics(self) -> SequentialStatistics:
        inputs = self._inputs.statistics()
        drift = self._drift.total() * (2.0 / self._vectors)
        return SequentialStatistics(inputs, drift.reshape(inputs.hessian.shape))


def sequential_statistics(
    pair: PairedNetworks, layer: Layer, *, dtype: torch.dtype = torch.float64
) -> SequentialStatistics:
    """H and D of a layer; the networks go on to its first call and stop before it.

    Args:
        pair: the dense and the partly compressed network.
        layer: a layer that they have not passed yet.
        dtype: of the sums.

    Raises:
        CalibrationError: the layer never ran, or its inputs are not finite.
    """
    accumulator = _PairedAccumulator(layer, dtype, pair.device)
    pair.inputs(layer, accumulator.add)
    return accumulator.statistics()
