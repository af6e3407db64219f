"""Operation counts against torch's own counter, brute force and the paper's ratios."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from obc_deploy.costs import (
    LayerCost,
    conv_macs,
    conv_transpose_macs,
    layer_cost,
    linear_macs,
    module_costs,
    total,
)
from obc_deploy.errors import LayerError, SchemeError


class _Mixture(nn.Module):
    """Every kind of layer that is counted, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, (3, 1), groups=4, dilation=2, padding=(2, 0))
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, groups=3)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.line_up = nn.ConvTranspose1d(5, 4, 4, stride=2)
        self.tokens = nn.Linear(4, 7)
        self.again = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.grouped(self.first(x)))
        x = self.line_up(self.line(x.flatten(2)))
        return self.again(self.again(self.tokens(x.transpose(1, 2))))


@pytest.mark.parametrize(
    ("build", "size"),
    [
        pytest.param(torchvision.models.resnet18, 64, id="resnet18"),
        pytest.param(torchvision.models.mobilenet_v2, 64, id="mobilenet_v2"),
        pytest.param(_Mixture, 10, id="mixture"),
    ],
)
def test_macs_agree_with_torch_layer_by_layer(build, size):
    model = build().eval()
    batch = 2
    images = torch.zeros(batch, 3, size, size)
    costs = module_costs(model, images)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    for name, cost in costs.items():
        assert 2 * batch * cost.macs == sum(counts[f"{root}.{name}"].values()), name
    assert 2 * batch * total(costs.values()).dense_macs == counter.get_total_flops()
    counted = [m for m in model.modules() if hasattr(m, "weight") and m.weight.dim() > 1]
    assert sum(cost.weights for cost in costs.values()) == sum(m.weight.numel() for m in counted)


def test_resnet18_has_the_published_count():
    costs = module_costs(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
    assert total(costs.values()).macs == pytest.approx(1.814e9, rel=1e-3)


def test_shapes_against_counting_every_product():
    out, inside, kernel, spatial = 2, 3, (2, 3), (4, 5)
    taps = itertools.product(range(out), range(inside), *map(range, kernel), *map(range, spatial))
    assert conv_macs(out, inside, kernel, spatial) == sum(1 for _ in taps)
    taps = itertools.product(range(inside), range(out), *map(range, kernel), *map(range, spatial))
    assert conv_transpose_macs(inside, out, kernel, spatial) == sum(1 for _ in taps)
    assert linear_macs(out, inside, 5) == sum(
        1 for _ in itertools.product(range(out), range(inside), range(5))
    )


@pytest.mark.parametrize(
    ("scheme", "macs", "bops", "bit_operations"),
    [
        ("dense", 1, 1, 1),
        ("w8a8", 1, 4, 16),
        ("w4a4", 1, 8, 64),
        ("w4a8", 1, 4, 32),
        ("w4", 1, 1, 8),
        ("2:4", 2, 2, 2),
        ("2:4+w8a8", 2, 8, 32),
        ("2:4+w4a4", 2, 16, 128),
        ("block4@0.9+w8a8", 10, 40, 160),
    ],
)
def test_ratios_are_the_papers(scheme, macs, bops, bit_operations):
    costs = total([layer_cost("layer", 64_000, scheme, weights=640)])
    assert costs.dense_macs / costs.macs == pytest.approx(macs)
    assert costs.dense_bops / costs.bops == pytest.approx(bops)
    assert costs.dense_bit_operations / costs.bit_operations == pytest.approx(bit_operations)
    predicted = costs.predicted_speedup
    assert predicted is not None
    assert predicted.macs == pytest.approx(macs)
    assert predicted.bops == pytest.approx(bops)


@given(
    positions=st.integers(1, 10_000),
    weights=st.integers(1, 5_000),
    left=st.floats(0, 1),
    bits=st.tuples(st.integers(2, 32), st.integers(2, 32)),
)
def test_counts_of_a_real_mask_are_exact(positions, weights, left, bits):
    """With the density of a mask, what is left is nonzeros x positions, without rounding."""
    nonzeros = round(left * weights)
    cost = LayerCost("layer", weights * positions, nonzeros / weights, *bits, weights)
    assert cost.macs_left == nonzeros * positions
    assert cost.weights_left == nonzeros
    assert cost.bops == nonzeros * positions * max(bits)
    assert cost.bit_operations == nonzeros * positions * bits[0] * bits[1]
    assert 8 * cost.weight_bytes >= nonzeros * bits[0] > 8 * (cost.weight_bytes - 1)
    assert cost.bit_operations <= cost.bops * max(bits)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**6)), max_size=5))
def test_total_adds_up(layers):
    costs = [layer_cost(str(i), macs, "2:4+w8a8", weights=w) for i, (macs, w) in enumerate(layers)]
    sums = total(costs)
    assert sums.macs == sum(cost.macs_left for cost in costs)
    assert sums.bytes == sum(cost.weight_bytes for cost in costs)
    assert sums.dense_bytes == 4 * sum(weights for _, weights in layers)
    assert (sums.predicted_speedup is None) == (sums.macs == 0)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    stride=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_costs_are_for_one_sample_whatever_the_batch(batch, groups, stride, kernel):
    model = nn.Sequential(nn.Conv2d(2 * groups, 3 * groups, kernel, stride, groups=groups))
    costs = module_costs(model, torch.zeros(batch, 2 * groups, 7, 8))
    height, width = ((size - k) // stride + 1 for size, k in zip((7, 8), kernel, strict=True))
    assert costs["0"].macs == 3 * groups * 2 * kernel[0] * kernel[1] * height * width


def test_schemes_and_densities_reach_their_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    costs = module_costs(
        model, torch.zeros(1, 8), {"0": "2:4+w8a8", "2": "w4a4"}, densities={"0": 0.25}
    )
    assert (costs["0"].macs_left, costs["0"].bops) == (16, 128)
    assert (costs["2"].macs_left, costs["2"].bops) == (32, 128)
    with pytest.raises(LayerError, match=r"'1'.*0, 2"):
        module_costs(model, torch.zeros(1, 8), {"1": "w8a8"})


def test_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module_costs(model, torch.randn(2, 1, 5, 5))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert not model[0]._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"density": 1.5}, "density 1.5 of layer 'conv'"),
        ({"density": float("nan")}, "density nan of layer 'conv'"),
        ({"weights": -1}, "-1 weights"),
        ({"weight_bits": 0}, "0-bit weights"),
    ],
)
def test_impossible_costs_are_refused(arguments, says):
    with pytest.raises(LayerError, match=says):
        LayerCost("conv", 10, **arguments)


def test_unreadable_scheme_is_refused():
    with pytest.raises(SchemeError, match="w99"):
        layer_cost("conv", 10, "w99")


def test_import_loads_no_torch():
    code = "import sys, obc_deploy.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
