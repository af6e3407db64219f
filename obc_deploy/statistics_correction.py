"""Statistics correction where no batch norm is measured anew: output moments, in the layer itself.

Compressed layers shift their outputs and, as least-squares fits do, shrink them. With mean m and
deviation s of an output channel on the calibration samples (d dense, c compressed), the map

    y' = r · (y - m_c) + m_d        r = s_d / s_c

gives the channel the dense network's statistics (OBC, arXiv 2208.11580, its statistics correction
for networks with layer norms). y = W x + b, so it is W' = r W and b' = r (b - m_c) + m_d: nothing
to compute at run time, zeros stay zeros, and a row's codes stay while its grid step grows by r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from obc_deploy.capture import Network, get_tensor, set_tensor
from obc_deploy.data import Batches
from obc_deploy.folding import BATCH_NORM
from obc_deploy.layers import Layer, LayerKind, matrix_to_weight
from obc_deploy.paired_networks import ACTIVATION_MEMORY, PairedNetworks
from obc_deploy.solvers.contract import CompressedLayer

LARGEST_RATIO = 2.0
"""Rows grow or shrink by this at most: a channel that compression made constant stays finite."""


def correct_outputs(
    dense: Network,
    compressed: Network,
    layers: Sequence[Layer],
    forms: Mapping[str, CompressedLayer[Tensor]],
    batches: Batches,
    *,
    memory: int = ACTIVATION_MEMORY,
    progress: Callable[[float], None] | None = None,
) -> dict[str, CompressedLayer[Tensor]]:
    """Give compressed layers the dense ones' output means and variances, in network order.

    Each layer is measured on what the layers before it give once they are corrected. Left alone are
    layers without a bias, layers whose output only batch norms read, layers whose rows share one
    grid step, layers that are called more than once (where one call feeds another, one shift cannot
    do), and all layers before the first difference between the networks. A network's last layer
    gets its means alone: nothing after it needs the dense network's confidence.

    Means without variances would do harm elsewhere: outputs that shrank around a mean below zero
    would all be lost in a ReLU.

    Args:
        dense: the dense network.
        compressed: a branch of it; its biases and weights change in place.
        layers: layers to correct, of this graph.
        forms: the compressed layers by name; only layers that have one are corrected.
        batches: the calibration batches.
        memory: bytes of activations to keep, as in `PairedNetworks`.
        progress: called with the share of the layers done.

    Returns:
        The forms, those of scaled layers anew.
    """
    module = compressed.module
    nodes = {node.name: node for node in module.graph.nodes}
    chosen = [
        layer
        for layer in layers
        if layer.name in forms
        and layer.bias_name is not None
        and len(layer.call_sites) == 1
        and not _shares_a_step(forms[layer.name])
        and any(user.target is not BATCH_NORM for user in nodes[layer.call_sites[0]].users)
    ]
    renewed = dict(forms)
    pair = PairedNetworks(dense, compressed, batches, memory=memory)
    for done, layer in enumerate(chosen, start=1):
        channel = -1 if layer.kind is LayerKind.LINEAR else 1
        both = pair.output_moments(layer, channel)
        if both.differ:
            wanted, found = both.moments()
            ratio = torch.ones_like(found.mean)
            ends = any(user.op == "output" for user in nodes[layer.call_sites[0]].users)
            if not ends:
                ratio = _ratio(wanted.variance, found.variance)
                renewed[layer.name] = _scaled(forms[layer.name], ratio.cpu())
                weight = get_tensor(module, layer.weight_name)
                new = matrix_to_weight(layer, renewed[layer.name].weight)
                set_tensor(module, layer.weight_name, new.to(weight))
            assert layer.bias_name is not None
            bias = get_tensor(module, layer.bias_name)
            moved = ratio * (bias.double() - found.mean) + wanted.mean
            set_tensor(module, layer.bias_name, moved.to(bias))
        if progress is not None:
            progress(done / len(chosen))
    return renewed


def _ratio(wanted: Tensor, found: Tensor) -> Tensor:
    """s_d / s_c of each channel; 1 where a channel is constant in one of the networks."""
    alive = (wanted > 0) & (found > 0)
    ratio = torch.sqrt(wanted / torch.where(alive, found, 1.0))
    return torch.where(alive, ratio.clamp(1 / LARGEST_RATIO, LARGEST_RATIO), 1.0)


def _shares_a_step(form: CompressedLayer[Tensor]) -> bool:
    scale = form.scale
    return scale is not None and scale.shape[0] > 1 and bool((scale == scale[0]).all())


def _scaled(form: CompressedLayer[Tensor], ratio: Tensor) -> CompressedLayer[Tensor]:
    factor = ratio.to(form.weight)[:, None]
    if form.codes is None or form.scale is None or form.zero_point is None:
        return replace(form, weight=form.weight * factor)
    scale = form.scale * factor
    group = form.codes.shape[1] // scale.shape[1]
    offset = form.codes.float() - form.zero_point.float().repeat_interleave(group, 1)
    return replace(form, weight=offset * scale.repeat_interleave(group, 1), scale=scale)
