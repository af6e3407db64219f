"""Stitching: a plan's layers from the database in the dense network, judged on calibration data.

What is judged are the network's outputs against the dense network's, without labels:

    classifiers     mean Kullback-Leibler divergence, Σ p log(p / q), of the dense network's classes
    all others      ‖y - ŷ‖² / ‖y‖² over all outputs

Batch norms normalise by the batch's own statistics, toward the dense network's: as after their
re-estimation, in one pass. Activations stay float, and so do weights that are pruned and then
rounded to 8 bits.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from obc_deploy.calibrated import CalibratedModel
from obc_deploy.capture import Network, get_tensor
from obc_deploy.corrections import Moments, batch_norm_moments, normalised_outputs
from obc_deploy.data import Batches, Samples
from obc_deploy.database import Database, stored_form
from obc_deploy.layers import weight_to_matrix
from obc_deploy.layerwise import set_matrix
from obc_deploy.schemes import DENSE, Scheme

KEPT_BYTES = 2 * 2**30
"""Weights of levels that are held in memory, so that they need not be unpacked again."""


def _flat(output: Any) -> list[Tensor]:
    tensors = output if isinstance(output, tuple | list) else (output,)
    return [tensor.detach().float() for tensor in tensors if tensor.is_floating_point()]


@dataclass
class StitchedNetwork:
    """A network whose layers can be exchanged for those of a database.

    Attributes:
        calibrated: the dense network.
        database: its layers at every level.
        samples: those that plans are judged on.
    """

    calibrated: CalibratedModel
    database: Database
    samples: Samples
    _network: Network = field(init=False)
    _current: dict[str, Scheme] = field(init=False)
    _moments: dict[str, Moments] = field(init=False)
    _dense: list[list[Tensor]] = field(init=False)
    _kept: OrderedDict[tuple[str, str], Tensor] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        dense = self.calibrated.network
        self._network = dense.branch()
        self._current = {layer.name: DENSE for layer in self.calibrated.layers}
        self._moments = batch_norm_moments(dense, self._batches())
        self._dense = [
            _flat(output) for output in normalised_outputs(dense, self._batches(), self._moments)
        ]

    def on(self, samples: Samples) -> StitchedNetwork:
        """The same judged on other samples; levels that either has unpacked serve both."""
        other = StitchedNetwork(self.calibrated, self.database, samples)
        other._kept = self._kept
        return other

    def _batches(self) -> Batches:
        return self.calibrated.batches(self.samples)

    def loss(self, schemes: Mapping[str, Scheme]) -> float:
        """How far the outputs are from the dense network's; 0 where nothing is compressed.

        Args:
            schemes: layer name to scheme; layers that are not named are dense.

        Raises:
            DatabaseError: a layer has no such level.
        """
        self._stitch(schemes)
        outputs = normalised_outputs(self._network, self._batches(), self._moments)
        parts = [
            _distance(dense, _flat(output))
            for dense, output in zip(self._dense, outputs, strict=True)
        ]
        lost = sum(part[0] for part in parts)
        whole = sum(part[1] for part in parts)
        return lost / whole if whole > 0.0 else lost

    def _stitch(self, schemes: Mapping[str, Scheme]) -> None:
        for layer in self.calibrated.layers:
            wanted = schemes.get(layer.name, DENSE)
            if self._current[layer.name] != wanted:
                set_matrix(self._network, layer, self._matrix(layer.name, wanted))
                self._current[layer.name] = wanted

    def _matrix(self, name: str, scheme: Scheme) -> Tensor:
        if scheme.is_dense:
            layer = next(each for each in self.calibrated.layers if each.name == name)
            weight = get_tensor(self.calibrated.network.module, layer.weight_name)
            return weight_to_matrix(layer, weight)
        key = (name, str(scheme))
        if key not in self._kept:
            self._kept[key] = self.database.load(name, stored_form(scheme)).weight
        self._kept.move_to_end(key)
        while (
            len(self._kept) > 1
            and sum(t.numel() * t.element_size() for t in self._kept.values()) > KEPT_BYTES
        ):
            self._kept.popitem(last=False)
        return self._kept[key]


def _distance(dense: list[Tensor], found: list[Tensor]) -> tuple[float, float]:
    """A batch's loss, and what it is to be divided by when all batches are added up."""
    first = dense[0]
    if len(dense) == 1 and first.dim() == 2 and first.shape[1] > 1:
        target = first.double().log_softmax(1)
        given = found[0].double().log_softmax(1)
        divergence = (target.exp() * (target - given)).sum(1)
        lost = float(divergence.sum())
        return (lost if math.isfinite(lost) else math.inf), float(len(first))
    lost = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(dense, found, strict=True)
    )
    return (lost if math.isfinite(lost) else math.inf), sum(
        float(a.double().square().sum()) for a in dense
    )
