"""Corrections after compression: batch-norm statistics measured anew on the compressed network.

Compressed layers shift the mean and variance of what follows; the running statistics of training no
longer fit. One pass over the calibration samples, without labels, mends that (OBC, arXiv
2208.11580, section 6 and its statistics correction).

Training saw augmented images, calibration does not: statistics taken from the calibration samples
alone would move even the dense network. So what is restored is what the dense network did on the
very same samples: with mean m and deviation s of a batch norm's input on them (d dense, c
compressed) and its statistics μ, σ from training,

    σ' = σ · s_c / s_d        μ' = m_c - (s_c / s_d) · (m_d - μ)

give the compressed network the dense one's normalised mean and deviation, channel by channel. Where
nothing was compressed, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from obc_deploy.capture import Network, get_tensor, set_tensor
from obc_deploy.data import Batches
from obc_deploy.folding import BATCH_NORM, BatchNorm, find_batch_norms

_LEAST_RATIO = 1e-3
"""A channel that compression made constant keeps a finite scale."""


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a batch norm's input, (channels,) float64."""

    mean: Tensor
    variance: Tensor


class MomentStream:
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

    def moments(self) -> Moments:
        """Of everything added so far."""
        return Moments(self.mean, self.squares / max(self.count - 1, 1))


class _InputStatistics(fx.Interpreter):
    """Runs a graph as it is and streams the input of each batch norm."""

    def __init__(self, module: fx.GraphModule, streams: Mapping[str, MomentStream]) -> None:
        super().__init__(module)
        self._streams = streams

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; of a batch norm, see the input first."""
        if n.target is BATCH_NORM:
            self._streams[n.name].add(self.fetch_args_kwargs_from_env(n)[0][0])
        return super().run_node(n)


class _BatchStatistics(fx.Interpreter):
    """Runs a graph whose batch norms normalise by their own batch, then aim at the reference.

    Streams are told of each batch norm's input; None where nobody wants to know.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        streams: Mapping[str, MomentStream] | None,
        reference: Mapping[str, Moments] | None,
    ) -> None:
        super().__init__(module)
        self._streams = streams
        self._reference = reference

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; a batch norm normalises with the statistics of this batch."""
        if n.target is not BATCH_NORM:
            return super().run_node(n)
        (values, gamma, beta, mean, variance, _, eps), _ = self.fetch_args_kwargs_from_env(n)
        if self._streams is not None:
            self._streams[n.name].add(values)
        if self._reference is not None:
            dense = self._reference[n.name]
            sigma = torch.sqrt(variance.double() + eps)
            spread, shift = torch.sqrt(dense.variance) / sigma, (dense.mean - mean.double()) / sigma
            if gamma is not None:
                spread, shift = spread * gamma, shift * gamma
            gamma, beta = spread.to(values), (shift if beta is None else shift + beta).to(values)
        output = torch.nn.functional.batch_norm(
            values, None, None, gamma, beta, training=True, momentum=0.0, eps=eps
        )
        return (output, None, None)


def batch_norm_moments(network: Network, batches: Batches) -> dict[str, Moments]:
    """Mean and variance of each batch norm's input on the samples, by graph node.

    Args:
        network: the dense network; left as it is.
        batches: the calibration batches.
    """
    streams = {norm.node.name: MomentStream() for norm in find_batch_norms(network.module)}
    if not streams:
        return {}
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    watcher = _InputStatistics(network.module, streams)
    with torch.no_grad():
        for batch in batches:
            watcher.run(*(tensor.to(device) for tensor in batch))
    return {name: stream.moments() for name, stream in streams.items()}


def normalised_outputs(
    network: Network, batches: Batches, reference: Mapping[str, Moments]
) -> Iterator[Any]:
    """Outputs batch by batch as they will be once batch norms are re-estimated.

    One pass where re-estimating and running would take two: each batch is normalised by its own
    statistics, toward the reference.

    Args:
        network: left as it is; its running statistics are the dense network's.
        batches: the calibration batches.
        reference: `batch_norm_moments` of the dense network on the same batches.
    """
    runner = _BatchStatistics(network.module, None, reference)
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for batch in batches:
            yield runner.run(*(tensor.to(device) for tensor in batch))


def corrected_moments(
    norm: BatchNorm, found: Moments, dense: Moments | None, mean: Tensor, variance: Tensor
) -> Moments:
    """μ' and σ'² of one batch norm, (channels,) float64.

    Args:
        norm: the batch norm.
        found: moments of its input in the compressed network.
        dense: those in the dense network; None takes `found` as they are.
        mean: the dense network's running mean.
        variance: its running variance.
    """
    if dense is None:
        return found
    old = variance.double() + norm.eps
    alive = dense.variance > 0
    ratio = torch.sqrt(found.variance / torch.where(alive, dense.variance, 1.0))
    ratio = torch.where(alive, ratio, torch.ones_like(ratio)).clamp(min=_LEAST_RATIO)
    return Moments(
        found.mean - ratio * (dense.mean - mean.double()),
        (old * ratio**2 - norm.eps).clamp(min=0.0),
    )


def reestimate_batch_norms(
    network: Network,
    batches: Batches,
    *,
    reference: Mapping[str, Moments] | None = None,
    progress: Callable[[float], None] | None = None,
) -> int:
    """Replace running means and variances, in place: the network then behaves as its reference.

    Each batch is normalised by its own statistics on the way, so one pass settles all layers; the
    batches should hold 64 samples or more.

    Args:
        network: changed in place.
        batches: the calibration batches.
        reference: `batch_norm_moments` of the dense network on the same batches; None takes the
            samples' own statistics instead.
        progress: called with the share of the work done.

    Returns:
        The number of batch norms re-estimated.
    """
    norms: list[BatchNorm] = find_batch_norms(network.module)
    if not norms:
        return 0
    streams = {norm.node.name: MomentStream() for norm in norms}
    runner = _BatchStatistics(network.module, streams, reference)
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for seen, batch in enumerate(batches, start=1):
            runner.run(*(tensor.to(device) for tensor in batch))
            if progress is not None:
                progress(seen / len(batches))
    for norm in norms:
        mean = get_tensor(network.module, norm.mean_name)
        variance = get_tensor(network.module, norm.variance_name)
        dense = None if reference is None else reference[norm.node.name]
        new = corrected_moments(norm, streams[norm.node.name].moments(), dense, mean, variance)
        set_tensor(network.module, norm.mean_name, new.mean.to(mean))
        set_tensor(network.module, norm.variance_name, new.variance.to(variance))
    return len(norms)
