"""Streaming Hessians against 2/n · Σ x xᵀ over all unfolded inputs at once, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_networks import Plain, Residual, Sequence1d, Upsampling, build, samples
from torch import nn
from torch.nn import functional

from obc_deploy import calibration
from obc_deploy.calibration import collect_hessians
from obc_deploy.capture import capture
from obc_deploy.data import Samples
from obc_deploy.errors import CalibrationError
from obc_deploy.layers import find_layers


def hessians(network, layers, data, size, **options):
    found = {}
    collect_hessians(
        network,
        layers,
        data.batches(size),
        visit=lambda layer, statistics: found.__setitem__(layer.name, statistics),
        **options,
    )
    return found


def captured(kind, count=12):
    model = build(kind)
    x = samples(kind, count)
    network = capture(model, (torch.from_numpy(x[:2]),))
    return model, network, find_layers(network)[0], Samples({"x": x})


def layer_inputs(model, data):
    """What each module was called with, from PyTorch's own hooks."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(torch.from_numpy(data.inputs["x"]))
    for handle in handles:
        handle.remove()
    return seen


def brute_force(module, x):
    """2/n · Σ x xᵀ, the vectors gathered one output pixel at a time."""
    if isinstance(module, nn.Linear):
        vectors = x.reshape(-1, x.shape[-1]).double().numpy()
    else:
        (top, left), (height, width) = module.padding, module.kernel_size
        stride, dilation = module.stride, module.dilation
        padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (top, top), (left, left)))
        vectors = []
        for sample in padded:
            for i in range((sample.shape[1] - dilation[0] * (height - 1) - 1) // stride[0] + 1):
                for j in range((sample.shape[2] - dilation[1] * (width - 1) - 1) // stride[1] + 1):
                    vectors.append(
                        np.concatenate(
                            [
                                sample[
                                    :,
                                    i * stride[0] + u * dilation[0],
                                    j * stride[1] + v * dilation[1],
                                ]
                                for u in range(height)
                                for v in range(width)
                            ]
                        )
                    )
        vectors = np.array(vectors)
    return 2.0 / len(vectors) * vectors.T @ vectors, len(vectors)


@pytest.mark.parametrize("kind", [Plain, Residual])
def test_hessian_is_the_mean_outer_product(kind):
    model, network, layers, data = captured(kind)
    found = hessians(network, layers, data, 5)
    seen = layer_inputs(model, data)
    for layer in layers:
        wanted, count = brute_force(model.get_submodule(layer.name), seen[layer.name])
        assert found[layer.name].vectors == count
        np.testing.assert_allclose(
            found[layer.name].hessian.numpy(), wanted, rtol=2e-5, atol=1e-6 * np.abs(wanted).max()
        )


@pytest.mark.parametrize("kind", [Plain, Sequence1d, Upsampling])
def test_batch_size_and_memory_limit_change_nothing(kind):
    _, network, layers, data = captured(kind)
    whole = hessians(network, layers, data, 12)
    for size, options in ((1, {}), (7, {}), (5, {"memory": 1}), (12, {"memory": 50_000})):
        pieces = hessians(network, layers, data, size, **options)
        assert list(pieces) == list(whole)
        for name, statistics in pieces.items():
            assert statistics.vectors == whole[name].vectors
            torch.testing.assert_close(
                statistics.hessian, whole[name].hessian, rtol=1e-5, atol=1e-6
            )


def test_little_memory_means_more_passes():
    _, network, layers, data = captured(Plain)
    assert len(calibration._passes(layers, 8 * 36**2, 8)) == len(layers)
    assert len(calibration._passes(layers, 1 << 30, 8)) == 1
    shares = []
    hessians(network, layers, data, 6, memory=1, progress=shares.append)
    assert len(shares) == 2 * len(layers)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_precisions_agree():
    _, network, layers, data = captured(Residual)
    double = hessians(network, layers, data, 4)
    single = hessians(network, layers, data, 4, dtype=torch.float32)
    for name, statistics in single.items():
        assert statistics.hessian.dtype == torch.float32
        torch.testing.assert_close(
            statistics.hessian.double(), double[name].hessian, rtol=1e-4, atol=1e-5
        )


def test_float32_keeps_its_digits_over_many_vectors_of_a_narrow_layer():
    # Positive inputs: a running float32 sum of them all is off by more than what damping adds.
    generator = torch.Generator().manual_seed(0)
    vectors = (torch.rand(1, 400_000, 9, generator=generator) + 1.0).transpose(1, 2)
    layer = next(one for one in captured(Plain)[2] if one.groups == 1)
    products = calibration.VectorProducts(
        replace(layer, cols=9), torch.float64, torch.device("cpu")
    )
    products.add(vectors, vectors)
    found, exact = products.total(), vectors.double() @ vectors.double().mT
    assert float(((found - exact) / exact).abs().max()) < 5e-6
    assert float((found - found.mT).abs().max() / exact.max()) < 5e-6


def test_groups_have_a_hessian_each():
    module = nn.Conv2d(6, 4, 3, groups=2)
    x = np.random.default_rng(0).standard_normal((7, 6, 5, 5), dtype=np.float32)
    network = capture(module, (torch.from_numpy(x[:2]),))
    layers, _ = find_layers(network)
    found = hessians(network, layers, Samples({"x": x}), 3)["weight"]
    assert found.hessian.shape == (2, 27, 27)
    for group in range(2):
        alone = nn.Conv2d(3, 2, 3)
        wanted, count = brute_force(alone, torch.from_numpy(x[:, 3 * group : 3 * group + 3]))
        assert found.vectors == count
        np.testing.assert_allclose(found.hessian[group].numpy(), wanted, rtol=2e-5, atol=1e-6)


def test_shared_weights_see_the_inputs_of_all_their_uses():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.fc(functional.relu(self.fc(x)))

    model = Twice()
    x = np.random.default_rng(0).standard_normal((9, 3), dtype=np.float32)
    network = capture(model, (torch.from_numpy(x[:2]),))
    layers, _ = find_layers(network)
    found = hessians(network, layers, Samples({"x": x}), 4)["fc"]
    with torch.no_grad():
        both = torch.cat([torch.from_numpy(x), functional.relu(model.fc(torch.from_numpy(x)))])
    both = both.double()
    torch.testing.assert_close(found.hessian, 2 / 18 * both.T @ both, rtol=1e-5, atol=1e-7)
    assert found.vectors == 18


def test_dead_inputs_are_counted():
    module = nn.Linear(5, 2)
    x = np.random.default_rng(0).standard_normal((9, 5), dtype=np.float32)
    x[:, [1, 3]] = 0.0
    network = capture(module, (torch.from_numpy(x[:2]),))
    layers, _ = find_layers(network)
    found = hessians(network, layers, Samples({"x": x}), 4)["weight"]
    assert found.dead == 2
    assert not found.hessian[[1, 3]].any()


def test_inputs_that_overflow_are_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    x = np.full((4, 3), 10.0, np.float32)
    network = capture(model, (torch.from_numpy(x[:2]),))
    layers, _ = find_layers(network)
    with pytest.raises(CalibrationError, match=r"inputs of layer '1' are not finite") as error:
        hessians(network, layers, Samples({"x": x}), 2)
    assert "\n" not in str(error.value)


def test_a_layer_that_never_ran_is_an_error():
    _, network, layers, data = captured(Plain, 4)
    with pytest.raises(CalibrationError, match="layer 'conv1' never ran"):
        collect_hessians(
            network, layers, data.batches(8, exact=True), visit=lambda layer, statistics: None
        )
