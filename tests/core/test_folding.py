"""Batch-norm folding: the same function with fewer operators, and the same codes on new scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import Depthwise, Plain, build, samples
from torch import nn

from obc_deploy.capture import capture, get_tensor
from obc_deploy.folding import _fold_codes, find_batch_norms, fold_batch_norms
from obc_deploy.layers import find_layers, weight_to_matrix
from obc_deploy.schemes import Scheme
from obc_deploy.solvers import solve
from obc_deploy.solvers.contract import CompressedLayer


def folded(model, x):
    network = capture(model, (x,))
    layers, _ = find_layers(network)
    return network, layers, fold_batch_norms(network, layers)


class Normed(nn.Module):
    def __init__(self, layer, channels, affine=True) -> None:
        super().__init__()
        self.layer = layer
        kind = nn.BatchNorm1d if isinstance(layer, nn.Conv1d) else nn.BatchNorm2d
        self.norm = kind(channels, affine=affine)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.1, 3.0)
        if affine:
            with torch.no_grad():
                self.norm.weight.normal_()
                self.norm.weight[0] = 0.0
                self.norm.weight[1] = -1.5
                self.norm.bias.normal_()

    def forward(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize(
    ("layer", "channels", "shape"),
    [
        (lambda: nn.Conv2d(3, 6, 3, padding=1), 6, (3, 7, 7)),
        (lambda: nn.Conv2d(3, 6, 3, bias=False, stride=2), 6, (3, 7, 7)),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), 8, (4, 7, 7)),
        (lambda: nn.Conv1d(3, 5, 3), 5, (3, 9)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 6, (4, 5, 5)),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_folded_network_is_the_network(layer, channels, shape, affine):
    model = Normed(layer(), channels, affine).eval()
    x = torch.randn(4, *shape)
    network, _, (plain, plain_layers, _) = folded(model, x)
    assert len(find_batch_norms(network.module)) == 1
    assert find_batch_norms(plain.module) == []
    assert (plain_layers[0].name, plain_layers[0].bias_name) == ("layer", "layer.bias")
    with torch.no_grad():
        wanted = model.double()(x.double())
        found = plain.module.double()(x.double())
    # Folded weights are float32, so their rounding is all there is between the two.
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-7 * float(wanted.abs().max()))


def test_networks_with_several_norms_and_untouched_originals():
    for kind in (Plain, Depthwise):
        model = build(kind)
        x = torch.from_numpy(samples(kind))
        network, layers, (plain, _, _) = folded(model, x)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert find_batch_norms(plain.module) == []
        with torch.no_grad():
            torch.testing.assert_close(plain.module(x), model(x), rtol=1e-4, atol=1e-5)
        for name in before:
            if "num_batches" not in name:
                assert torch.equal(get_tensor(network.module, name), before[name])
        for layer, again in zip(layers, find_layers(plain)[0], strict=True):
            assert layer.name == again.name


class NotFoldable(nn.Module):
    """A norm before any convolution, one after a ReLU, one after a convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.third, self.fourth = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.shared, self.branched = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.shared(self.first(x))
        x = self.second(self.shared(torch.relu(x)))
        x = self.third(torch.relu(x))
        x = self.branched(x)
        return self.fourth(x) + x


def test_what_cannot_be_folded_stays():
    model = NotFoldable()
    for norm in (model.first, model.second, model.third, model.fourth):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 5, 5)
    _, _, (plain, _, _) = folded(model.eval(), x)
    assert len(find_batch_norms(plain.module)) == 4
    with torch.no_grad():
        torch.testing.assert_close(plain.module(x), model(x))


def dequantized(form):
    step = form.codes.shape[1] // form.scale.shape[1]
    centred = form.codes.double() - form.zero_point.double().repeat_interleave(step, 1)
    return centred * form.scale.double().repeat_interleave(step, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["w8", "w4", "w3-asym", "w8-asym", "w4g4", "w5g4-asym", "2:4+w8"]),
    st.integers(0, 2**32 - 1),
)
def test_folded_codes_are_the_fold_of_the_weight(text, seed):
    scheme = Scheme.parse(text)
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((6, 8), dtype=np.float32) + rng.normal()
    factor = rng.standard_normal(6, dtype=np.float32)
    factor[rng.integers(6)] = 0.0
    solved = solve(torch.from_numpy(weight), None, scheme, method="magnitude")
    form = _fold_codes(solved, torch.from_numpy(factor))
    wanted = dequantized(solved) * torch.from_numpy(factor).double()[:, None]
    torch.testing.assert_close(dequantized(form), wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(form.weight.double(), wanted, rtol=1e-6, atol=1e-9)
    low, high = scheme.quantization.code_min, scheme.quantization.code_max
    assert low <= int(form.codes.min()) <= int(form.codes.max()) <= high
    assert low <= int(form.zero_point.min()) <= int(form.zero_point.max()) <= high
    assert bool((form.scale > 0).all())
    assert torch.equal(form.mask, solved.mask)
    assert not form.weight[~form.mask].any()


def test_forms_are_folded_with_their_network():
    model = build(Plain)
    x = torch.from_numpy(samples(Plain))
    network = capture(model, (x,))
    layers, _ = find_layers(network)
    forms: dict[str, CompressedLayer] = {}
    for layer in layers:
        matrix = weight_to_matrix(layer, get_tensor(network.module, layer.weight_name))
        forms[layer.name] = solve(matrix, None, "w4", method="rtn")
    before = {name: form.codes.clone() for name, form in forms.items()}
    plain, plain_layers, plain_forms = fold_batch_norms(network, layers, forms)
    for layer in plain_layers[:2]:
        matrix = weight_to_matrix(layer, get_tensor(plain.module, layer.weight_name))
        torch.testing.assert_close(matrix.double(), dequantized(plain_forms[layer.name]))
        assert torch.equal(forms[layer.name].codes, before[layer.name])
    gain = model.bn1.weight.detach()
    codes = plain_forms["conv1"].codes
    assert torch.equal(codes[gain > 0], before["conv1"][gain > 0])
    assert torch.equal(codes[gain < 0], -before["conv1"][gain < 0])
    assert plain_forms["fc"] is forms["fc"]
