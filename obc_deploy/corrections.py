"""Corrections after compression: batch-norm statistics measured anew on the compressed network.

Compressed layers shift the mean and variance of what follows; the running statistics of training no
longer fit. Re-estimating them from the calibration samples costs one pass and no labels (OBC,
arXiv 2208.11580, section 6 and appendix; originally Hubara et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from obc_deploy.capture import Network, get_tensor, set_tensor
from obc_deploy.data import Batches
from obc_deploy.folding import BATCH_NORM, BatchNorm, find_batch_norms


class _Moments:
    """Mean and variance of a stream of activations, a channel at a time, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Merge a batch (Chan's parallel update, which does not cancel)."""
        flat = values.detach().double().movedim(1, 0).flatten(1)
        count = flat.shape[1]
        mean = flat.mean(1)
        squares = ((flat - mean[:, None]) ** 2).sum(1)
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        delta = mean - self.mean
        total = self.count + count
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta**2 * (self.count * count / total)
        self.count = total


class _BatchStatistics(fx.Interpreter):
    """Runs a graph with every batch norm normalising by its own batch, as in training."""

    def __init__(self, module: fx.GraphModule, moments: dict[str, _Moments]) -> None:
        super().__init__(module)
        self._moments = moments

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; a batch norm normalises with the statistics of this batch."""
        moments = self._moments.get(n.name)
        if moments is None or n.target is not BATCH_NORM:
            return super().run_node(n)
        (values, gamma, beta, _, _, _, eps), _ = self.fetch_args_kwargs_from_env(n)
        moments.add(values)
        output = torch.nn.functional.batch_norm(
            values, None, None, gamma, beta, training=True, momentum=0.0, eps=eps
        )
        return (output, None, None)


def reestimate_batch_norms(
    network: Network, batches: Batches, *, progress: Callable[[float], None] | None = None
) -> int:
    """Replace running means and variances by those of the calibration samples, in place.

    Each batch is normalised by its own statistics on the way, so one pass settles all layers; the
    batches should hold 64 samples or more.

    Args:
        network: changed in place.
        batches: the calibration batches.
        progress: called with the share of the work done.

    Returns:
        The number of batch norms re-estimated.
    """
    norms: list[BatchNorm] = find_batch_norms(network.module)
    if not norms:
        return 0
    moments = {norm.node.name: _Moments() for norm in norms}
    runner = _BatchStatistics(network.module, moments)
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for seen, batch in enumerate(batches, start=1):
            runner.run(*(tensor.to(device) for tensor in batch))
            if progress is not None:
                progress(seen / len(batches))
    for norm in norms:
        found = moments[norm.node.name]
        old = get_tensor(network.module, norm.mean_name)
        variance = found.squares / max(found.count - 1, 1)
        set_tensor(network.module, norm.mean_name, found.mean.to(old))
        set_tensor(network.module, norm.variance_name, variance.to(old))
    return len(norms)
