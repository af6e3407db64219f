"""Batch-norm folding: y = gamma · (W x + b - mean) / sqrt(var + eps) + beta becomes one layer.

    g  = gamma / sqrt(var + eps)
    W' = g W        b' = g (b - mean) + beta        scale' = |g| scale

Rows of W are multiplied by one number each, so a row's codes stay what the solver made them and
only its scale changes; where g is negative the codes are mirrored, so that scales stay positive.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from obc_deploy.capture import Network, get_tensor, parameter_name, set_tensor
from obc_deploy.layers import Layer, LayerKind, matrix_to_weight, weight_to_matrix
from obc_deploy.solvers.contract import CompressedLayer

BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True)
class BatchNorm:
    """One batch normalisation of the graph, with the names of its parameters and statistics."""

    node: fx.Node
    weight_name: str | None
    bias_name: str | None
    mean_name: str
    variance_name: str
    eps: float

    def parameters(self, module: fx.GraphModule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(gamma, beta, mean, variance), each (channels,)."""
        mean = get_tensor(module, self.mean_name)
        variance = get_tensor(module, self.variance_name)
        gamma = get_tensor(module, self.weight_name) if self.weight_name else torch.ones_like(mean)
        beta = get_tensor(module, self.bias_name) if self.bias_name else torch.zeros_like(mean)
        return gamma, beta, mean, variance


def find_batch_norms(module: fx.GraphModule) -> list[BatchNorm]:
    """Every batch normalisation with running statistics, in execution order."""
    found = []
    for node in module.graph.nodes:
        if node.target is not BATCH_NORM:
            continue
        names = [parameter_name(argument) for argument in node.args[1:5]]
        if names[2] is None or names[3] is None:
            continue
        found.append(BatchNorm(node, names[0], names[1], names[2], names[3], float(node.args[6])))
    return found


def _folds(norm: BatchNorm, sites: Mapping[str, Layer]) -> Layer | None:
    """The layer a batch norm folds into: the only producer of its input, used nowhere else."""
    source = norm.node.args[0]
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return None
    layer = sites.get(source.name)
    if layer is None or len(layer.call_sites) != 1 or layer.kind is LayerKind.LINEAR:
        return None
    return layer


def _fold_codes(compressed: CompressedLayer[Tensor], factor: Tensor) -> CompressedLayer[Tensor]:
    gain = factor.abs().unsqueeze(1)
    weight = compressed.weight * factor.unsqueeze(1)
    if compressed.codes is None or compressed.scale is None or compressed.zero_point is None:
        return replace(compressed, weight=weight)
    quantization = compressed.scheme.quantization
    if quantization is None:
        return replace(compressed, weight=weight)
    mirror = quantization.code_min + quantization.code_max
    negative = (factor < 0).unsqueeze(1)
    codes = torch.where(
        negative, (mirror - compressed.codes.int()).to(torch.int8), compressed.codes
    )
    zero = torch.where(
        negative, (mirror - compressed.zero_point.int()).to(torch.int8), compressed.zero_point
    )
    scale = compressed.scale * gain
    # A channel that batch norm switches off keeps a usable grid: all its codes are exact zero.
    off = factor == 0
    scale[off] = 1.0
    step = codes.shape[1] // scale.shape[1]
    codes[off] = zero[off].repeat_interleave(step, 1)
    dequantized = (
        codes.float() - zero.repeat_interleave(step, 1).float()
    ) * scale.repeat_interleave(step, 1)
    return replace(compressed, weight=dequantized, codes=codes, zero_point=zero, scale=scale)


def fold_batch_norms(
    network: Network,
    layers: list[Layer],
    compressed: Mapping[str, CompressedLayer[Tensor]] | None = None,
) -> tuple[Network, list[Layer], dict[str, CompressedLayer[Tensor]]]:
    """Fold every batch norm that directly follows a convolution into it.

    Args:
        network: left as it is.
        layers: the network's layers.
        compressed: the layers' compressed forms, by name; their weights and grids are folded too.

    Returns:
        The folded network, its layers (those folded into have a bias now), and the folded forms.
    """
    folded = network.branch()
    module = folded.module
    sites = {site: layer for layer in layers for site in layer.call_sites}
    forms = dict(compressed or {})
    renewed = {layer.name: layer for layer in layers}
    for norm in find_batch_norms(module):
        layer = _folds(norm, sites)
        if layer is None:
            continue
        gamma, beta, mean, variance = norm.parameters(module)
        # float64: sqrt and division of small variances should not cost digits twice.
        factor = (gamma.double() / torch.sqrt(variance.double() + norm.eps)).float()
        bias = get_tensor(module, layer.bias_name) if layer.bias_name else torch.zeros_like(mean)
        new_bias = (factor.double() * (bias.double() - mean.double()) + beta.double()).float()
        matrix = weight_to_matrix(layer, get_tensor(module, layer.weight_name))
        if layer.name in forms:
            forms[layer.name] = _fold_codes(forms[layer.name], factor.to(matrix.device))
            matrix = forms[layer.name].weight
        else:
            matrix = matrix * factor.unsqueeze(1)
        set_tensor(module, layer.weight_name, matrix_to_weight(layer, matrix))
        site = norm.node.args[0]
        assert isinstance(site, fx.Node)
        bias_name = layer.bias_name or f"{layer.name}.bias"
        set_tensor(module, bias_name, new_bias)
        if layer.bias_name is None:
            with module.graph.inserting_before(site):
                bias_node = module.graph.get_attr(bias_name)
            bias_node.meta["val"] = new_bias
            site.args = (*site.args[:2], bias_node, *site.args[3:])
        for user in list(norm.node.users):
            if user.target is operator.getitem and user.args[1] == 0:
                user.replace_all_uses_with(site)
            module.graph.erase_node(user)
        module.graph.erase_node(norm.node)
        renewed[layer.name] = replace(layer, bias_name=bias_name)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return folded, [renewed[layer.name] for layer in layers], forms
