"""Calibration: streaming Hessians of every layer's quadratic problem.

    H = 2/n · Σ x xᵀ        over all input vectors x a layer sees on the calibration samples

(OBC, arXiv 2208.11580, section 4.1.) The unfolded inputs of a layer never exist all at once, and
layers whose Hessians do not fit the memory limit together are visited in several passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from obc_deploy.capture import Network
from obc_deploy.data import Batches
from obc_deploy.errors import CalibrationError, DeviceMemoryError
from obc_deploy.layers import Layer, input_vectors

HESSIAN_MEMORY = 4 * 2**30
"""Bytes of Hessians held at a time, unless told otherwise."""
_WAITING_BYTES = 16 * 2**20
_MOST_SUMMED = 4096
"""Vectors of one product: what its dtype adds up with hardly a digit lost."""
_MANY_VECTORS = 256
"""Vectors from which a product of its own precision is as good as the sum's."""


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration learnt about one layer's inputs.

    Attributes:
        hessian: (cols, cols), or (groups, cols, cols) where the layer is grouped; undamped.
        vectors: input vectors that it was averaged over (per group).
        dead: input columns that were zero in every sample (all groups together).
    """

    hessian: Tensor
    vectors: int
    dead: int

    def on_cpu(self) -> LayerStatistics:
        """The same in main memory: a device holds the Hessians of one pass, not of all layers."""
        return LayerStatistics(self.hessian.cpu(), self.vectors, self.dead)


class VectorProducts:
    """Adds up Σ a bᵀ over vectors of a layer: products in the vectors' dtype, sums in `dtype`.

    Vectors wait until there are enough of them: adding a product to the sum costs as much as some
    hundred vectors do. What is left of a small calibration set is multiplied in `dtype`.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        """Zeros, (groups, cols, cols)."""
        self._cols = layer.cols
        self._sum = torch.zeros(layer.groups, layer.cols, layer.cols, dtype=dtype, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_bytes = 0

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add a bᵀ of each pair of vectors: (groups, cols, n) both, or one tensor twice."""
        self._waiting.append((left, right))
        self._waiting_bytes += right.numel() * right.element_size()
        if self._waiting_bytes >= max(_WAITING_BYTES, 2 * self._cols**2):
            self._multiply()

    def _multiply(self) -> None:
        if not self._waiting:
            return
        # Vectors are contiguous, so they are joined (and multiplied) as rows.
        same = all(left is right for left, right in self._waiting)
        joined = self._joined([right for _, right in self._waiting])
        others = joined if same else self._joined([left for left, _ in self._waiting])
        self._waiting.clear()
        self._waiting_bytes = 0
        # Float32 sums of hundreds of thousands of vectors, which narrow layers have, lose digits.
        for start in range(0, joined.shape[1], _MOST_SUMMED):
            part = slice(start, start + _MOST_SUMMED)
            self._sum += others[:, part].transpose(1, 2) @ joined[:, part]

    def _joined(self, vectors: Sequence[Tensor]) -> Tensor:
        rows = [each.transpose(1, 2) for each in vectors]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        if joined.shape[1] < min(self._cols, _MANY_VECTORS):
            joined = joined.to(self._sum.dtype)
        return joined

    def total(self) -> Tensor:
        """The sum of everything added so far, (groups, cols, cols)."""
        self._multiply()
        return self._sum


class HessianAccumulator:
    """Adds up Σ x xᵀ of one layer."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        self._layer = layer
        self._products = VectorProducts(layer, dtype, device)
        self._vectors = 0

    def add(self, inputs: Tensor) -> None:
        """Add the input vectors of one call of the layer."""
        for vectors in input_vectors(self._layer, inputs):
            self.add_vectors(vectors)

    def add_vectors(self, vectors: Tensor) -> None:
        """Add input vectors, (groups, cols, n)."""
        self._vectors += vectors.shape[-1]
        self._products.add(vectors, vectors)

    def statistics(self) -> LayerStatistics:
        """The Hessian of everything added so far.

        Raises:
            CalibrationError: nothing was added, or what was added is not finite.
        """
        name = self._layer.name
        if self._vectors == 0:
            raise CalibrationError(f"layer '{name}' never ran on the calibration samples")
        hessian = self._products.total() * (2.0 / self._vectors)
        if not bool(torch.isfinite(hessian.sum())):
            raise CalibrationError(
                f"the inputs of layer '{name}' are not finite on the calibration samples: the "
                "samples or the weights before it overflow; check the pre-processing (scale, mean, "
                "std)"
            )
        dead = int((hessian.diagonal(dim1=1, dim2=2) == 0).sum())
        return LayerStatistics(
            hessian if self._layer.groups > 1 else hessian[0], self._vectors, dead
        )


def _passes(layers: Sequence[Layer], limit: int, item: int) -> list[list[Layer]]:
    passes: list[list[Layer]] = [[]]
    used = 0
    for layer in layers:
        size = item * layer.groups * layer.cols**2
        if passes[-1] and used + size > limit:
            passes.append([])
            used = 0
        passes[-1].append(layer)
        used += size
    return passes


def collect_hessians(
    network: Network,
    layers: Sequence[Layer],
    batches: Batches,
    *,
    dtype: torch.dtype = torch.float64,
    memory: int = HESSIAN_MEMORY,
    visit: Callable[[Layer, LayerStatistics], None],
    progress: Callable[[float], None] | None = None,
) -> None:
    """Run the calibration batches and hand each layer's statistics to `visit`.

    Args:
        network: the captured network; runs on the device its parameters are on.
        layers: layers to collect for.
        batches: the calibration batches; iterated once a pass.
        dtype: of the sums, float32 or float64.
        memory: bytes of Hessians to hold at a time; more layers than fit means more passes.
        visit: receives each layer and its statistics; they are dropped afterwards.
        progress: called with the share of the work done.

    Raises:
        CalibrationError: a layer never ran, or its inputs are not finite.
        DeviceMemoryError: a batch does not fit the device.
    """
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    groups = _passes(layers, memory, torch.empty((), dtype=dtype).element_size())
    for index, group in enumerate(groups):
        accumulators = {layer.name: HessianAccumulator(layer, dtype, device) for layer in group}
        sites = {site: accumulators[layer.name] for layer in group for site in layer.call_sites}
        watcher = _InputWatcher(network.module, sites)
        with torch.no_grad():
            for seen, batch in enumerate(batches, start=1):
                try:
                    watcher.run(*(tensor.to(device) for tensor in batch))
                except torch.OutOfMemoryError as error:
                    raise DeviceMemoryError(
                        f"calibration does not fit the memory of '{device}' with batches of "
                        f"{len(batch[0])} samples; give a smaller batch size, or more memory"
                    ) from error
                if progress is not None:
                    progress((index + seen / len(batches)) / len(groups))
        for layer in group:
            visit(layer, accumulators[layer.name].statistics())


class _InputWatcher(fx.Interpreter):
    """Runs a graph and gives each call site's input to its accumulator."""

    def __init__(self, module: fx.GraphModule, sites: dict[str, HessianAccumulator]) -> None:
        super().__init__(module)
        self._sites = sites

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; before a watched layer runs, take its input."""
        accumulator = self._sites.get(n.name)
        if accumulator is not None:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            accumulator.add(arguments[0].detach().float())
        return super().run_node(n)
