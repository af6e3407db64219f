"""Output moments after the correction against the dense network's, seen by PyTorch's own hooks."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from tiny_networks import Plain, Residual, SharedConvolution, Upsampling, build, samples
from torch import nn
from torch.nn import functional

from obc_deploy.calibrated import calibrate
from obc_deploy.capture import capture, get_tensor, set_tensor
from obc_deploy.compression import compress
from obc_deploy.data import Samples
from obc_deploy.layers import find_layers, weight_to_matrix
from obc_deploy.solvers.contract import CompressedLayer
from obc_deploy.solvers.dispatch import solve
from obc_deploy.statistics_correction import correct_outputs


class Normed(nn.Module):
    """A residual block with layer norm over (batch, tokens, features), as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.head(self.norm(x + self.down(functional.gelu(self.up(x)))))


class Grouped(nn.Module):
    """Grouped convolutions with group norm and instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, groups=2)
        self.norm1 = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 8, 3, groups=4)
        self.norm2 = nn.InstanceNorm2d(8, affine=True)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = functional.relu(self.norm1(self.first(x)))
        return self.last(functional.relu(self.norm2(self.second(x))))


SHAPES = {Normed: (5, 8), Grouped: (4, 8, 8)}


def images(kind, count=64):
    if kind in SHAPES:
        shape = (count, *SHAPES[kind])
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return samples(kind, count)


@cache
def captured(kind):
    torch.manual_seed(0)
    model = kind().eval() if kind in SHAPES else build(kind)
    return capture(model, (torch.from_numpy(images(kind, 2)),))


def quantized(kind, scheme="w2"):
    """The dense network, a branch with every layer rounded, its layers, forms and samples."""
    dense = captured(kind)
    layers, _ = find_layers(dense)
    other = dense.branch()
    forms: dict[str, CompressedLayer[torch.Tensor]] = {}
    for layer in layers:
        matrix = weight_to_matrix(layer, get_tensor(dense.module, layer.weight_name))
        forms[layer.name] = solve(matrix, None, scheme, method="rtn", channels=layer.channels)
        put(other, layer, forms[layer.name].weight)
    return dense, other, layers, forms, Samples({"x": images(kind)})


def put(network, layer, matrix):
    from obc_deploy.layerwise import set_matrix

    set_matrix(network, layer, matrix)


def moments(network, layer, data):
    """Mean and variance of a layer's outputs over all of its calls, in float64."""
    interpreter = torch.fx.Interpreter(network.module, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(torch.from_numpy(data.inputs["x"]))
    nodes = {node.name: node for node in network.module.graph.nodes}
    channel = -1 if layer.kind.value == "linear" else 1
    values = torch.cat(
        [
            interpreter.env[nodes[site]].double().movedim(channel, 0).flatten(1)
            for site in layer.call_sites
        ],
        1,
    )
    return values.mean(1), values.var(1)


KINDS = [Normed, Grouped, Residual, Upsampling]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_get_the_dense_means_and_variances(kind):
    dense, other, layers, forms, data = quantized(kind)
    before = [moments(other, layer, data) for layer in layers]
    renewed = correct_outputs(dense, other, layers, forms, data.batches(17))
    corrected = 0
    for index, layer in enumerate(layers):
        wanted, found = moments(dense, layer, data), moments(other, layer, data)
        if layer.bias_name is None:
            continue
        spread = float(wanted[1].max().sqrt())
        assert float((before[index][0] - wanted[0]).abs().max()) > 1e-3 * spread
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4 * spread)
        ratio = (wanted[1] / before[index][1]).sqrt()
        if layer is not layers[-1] and float(ratio.min()) > 0.6 and float(ratio.max()) < 1.8:
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=0.0)
            corrected += 1
        form = renewed[layer.name]
        matrix = weight_to_matrix(layer, get_tensor(other.module, layer.weight_name))
        assert torch.equal(matrix, form.weight)
        # The codes stay; the grid is what has grown.
        assert torch.equal(form.codes, forms[layer.name].codes)
        offset = form.codes.float() - form.zero_point.float()
        assert torch.equal(form.weight, offset * form.scale)
        assert (form.scale > 0).all()
    assert corrected


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_where_nothing_was_compressed(kind):
    dense, _, layers, forms, data = quantized(kind)
    same = dense.branch()
    renewed = correct_outputs(dense, same, layers, forms, data.batches(20))
    assert all(renewed[name] is form for name, form in forms.items())
    for name, tensor in same.module.state_dict().items():
        assert torch.equal(tensor, dense.module.state_dict()[name])


def test_layers_before_the_first_change_and_dense_layers_stay():
    dense, _, layers, forms, data = quantized(Residual)
    other = dense.branch()
    third = next(layer for layer in layers if layer.name == "third")
    put(other, third, forms["third"].weight)
    correct_outputs(
        dense, other, layers, {"first": forms["first"], "third": forms["third"]}, data.batches(32)
    )
    state = dense.module.state_dict()
    changed = {
        name for name, tensor in other.module.state_dict().items()
        if not torch.equal(tensor, state[name])
    }  # fmt: skip
    assert changed == {"third.weight", "third.bias"}


def test_a_shared_grid_step_stays_shared():
    dense, other, layers, forms, data = quantized(Residual)
    one = forms["second"]
    step = one.scale.mean().expand_as(one.scale).clone()
    shared = CompressedLayer(
        one.scheme, (one.codes.float() - one.zero_point.float()) * step, one.mask, one.codes, step,
        one.zero_point, one.error, one.method,
    )  # fmt: skip
    put(other, next(layer for layer in layers if layer.name == "second"), shared.weight)
    renewed = correct_outputs(dense, other, layers, forms | {"second": shared}, data.batches(32))
    assert renewed["second"] is shared
    assert renewed["third"] is not forms["third"]


def test_zeros_stay_zeros():
    dense, other, layers, _, data = quantized(Residual)
    forms = {}
    for layer in layers[1:]:
        matrix = weight_to_matrix(layer, get_tensor(dense.module, layer.weight_name))
        forms[layer.name] = solve(matrix, None, "2:4", method="magnitude", channels=layer.channels)
        put(other, layer, forms[layer.name].weight)
    renewed = correct_outputs(dense, other, layers, forms, data.batches(32))
    for name, form in forms.items():
        assert torch.equal(renewed[name].weight != 0, form.weight != 0)


def test_a_constant_channel_keeps_finite_weights():
    dense, other, layers, forms, data = quantized(Residual)
    second = layers[1]
    matrix = torch.zeros_like(forms["second"].weight)
    pruned = CompressedLayer(
        forms["second"].scheme, matrix, forms["second"].mask, None, None, None, 1.0, "magnitude"
    )
    put(other, second, matrix)
    correct_outputs(dense, other, layers, forms | {"second": pruned}, data.batches(32))
    wanted, found = moments(dense, second, data), moments(other, second, data)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    for tensor in other.module.state_dict().values():
        assert torch.isfinite(tensor).all()


def test_layers_of_several_calls_are_left_alone():
    dense, other, layers, forms, data = quantized(SharedConvolution)
    before = get_tensor(other.module, "twice.bias").clone()
    renewed = correct_outputs(dense, other, layers, forms, data.batches(32))
    assert renewed["twice"] is forms["twice"]
    assert torch.equal(get_tensor(other.module, "twice.bias"), before)
    assert renewed["stem"] is not forms["stem"]


@pytest.mark.parametrize(
    ("scheme", "target"),
    [("w3", None), ("2:4", None), ("2:4+w8a8", None), ("2:4+w8a8", "deepsparse")],
)
def test_compress_corrects_layers_without_batch_norm(scheme, target):
    torch.manual_seed(0)
    x = images(Normed)
    calibrated = calibrate(Normed().eval(), x, batch_size=32)
    options = {"scheme": scheme, "target": target, "baselines": False}
    plain = compress(calibrated, **options, bn_reestimate=False)
    made = compress(calibrated, **options)
    # Where rows share a grid step, grids come after the correction, and round it a little.
    share = 0.1 if target else 1e-3
    for name in ("up", "down"):
        layer = next(each for each in calibrated.folded_layers if each.name == name)
        wanted, found, before = (
            moments(network, layer, Samples({"x": x}))
            for network in (calibrated.folded, made.network, plain.network)
        )
        for one in (0, 1):
            left = float((found[one] - wanted[one]).abs().max())
            assert left < share * float((before[one] - wanted[one]).abs().max())
        form = made.forms[name]
        matrix = weight_to_matrix(layer, get_tensor(made.network.module, layer.weight_name))
        assert torch.equal(matrix, form.weight)
        if target:
            assert (form.scale == form.scale[0]).all()
            # The error is that of rows scaled alike, not of the scaling.
            assert form.error < 1.1 * plain.forms[name].error + 2e-3


def test_layers_with_batch_norm_are_left_to_it():
    calibrated = calibrate(build(Plain), samples(Plain, 64), batch_size=64)
    made = compress(calibrated, scheme="2:4", baselines=False)
    network = calibrated.network
    other = network.branch()
    forms = dict(made.forms)
    for layer in calibrated.layers:
        set_tensor(
            other.module, layer.weight_name, 0.5 * get_tensor(network.module, layer.weight_name)
        )
    correct_outputs(network, other, calibrated.layers, forms, calibrated.samples.batches(64))
    state = network.module.state_dict()
    changed = {
        name for name, tensor in other.module.state_dict().items()
        if "bias" in name and not torch.equal(tensor, state[name])
    }  # fmt: skip
    assert changed == {"fc.bias"}
