"""Layers as matrix problems: W · (unfolded inputs) is the layer's output, whatever the geometry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import Concatenation, Plain, build, samples
from torch import fx, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from obc_deploy import layers as layers_module
from obc_deploy.capture import Network, capture
from obc_deploy.errors import LayerError
from obc_deploy.layers import (
    LayerKind,
    find_layers,
    input_vectors,
    matrix_to_weight,
    select_layers,
    weight_to_matrix,
)

aten = torch.ops.aten


def network_of(module, x):
    """What capture makes of a single layer, without the half second that it takes."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    weight = graph.get_attr("weight")
    bias = None if module.bias is None else graph.get_attr("bias")
    if isinstance(module, nn.Linear):
        node = graph.call_function(aten.linear.default, (source, weight, bias))
    elif isinstance(module, nn.ConvTranspose2d):
        node = graph.call_function(
            aten.conv_transpose2d.input,
            (source, weight, bias, module.stride, module.padding, module.output_padding,
             module.groups, module.dilation),
        )  # fmt: skip
    else:
        packet = aten.conv1d if isinstance(module, nn.Conv1d) else aten.conv2d
        node = graph.call_function(
            packet.padding if isinstance(module.padding, str) else packet.default,
            (source, weight, bias, module.stride, module.padding, module.dilation, module.groups),
        )
    graph.output(node)
    return Network(fx.GraphModule(module, graph), (x,), True)


def check_layer(module, x):
    """W_mat @ vectors is the output without bias; the matrix goes back to the same weight."""
    module = module.double()
    network = network_of(module, x)
    with torch.no_grad():
        assert torch.equal(network.module(x), module(x))
    (layer,), _ = find_layers(network)
    matrix = weight_to_matrix(layer, module.weight.detach())
    assert matrix.shape == (layer.rows, layer.cols)
    weight = matrix_to_weight(layer, matrix)
    assert torch.equal(weight, module.weight)
    assert weight.stride() == torch.empty(weight.shape).stride()
    codes = torch.arange(matrix.numel(), dtype=torch.int32).reshape(matrix.shape)
    assert torch.equal(weight_to_matrix(layer, matrix_to_weight(layer, codes)), codes)

    with torch.no_grad():
        bias, module.bias = module.bias, None
        wanted = module(x)
        module.bias = bias
    vectors = torch.cat(list(input_vectors(layer, x)), dim=2)
    products = matrix.reshape(layer.groups, -1, layer.cols) @ vectors
    products = products.reshape(layer.rows, -1)
    if layer.kind is LayerKind.LINEAR:
        found = products.T.reshape(wanted.shape)
    else:
        found = products.reshape(layer.rows, wanted.shape[0], -1).movedim(0, 1)
        found = found.reshape(wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert layer.cols == layer.channels * math.prod(layer.weight_shape[2:])
    return layer


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(1, 4), max_size=2), st.booleans())
def test_linear(inputs, outputs, middle, bias):
    x = torch.randn(2, *middle, inputs, dtype=torch.float64)
    layer = check_layer(nn.Linear(inputs, outputs, bias=bias), x)
    assert layer.kind is LayerKind.LINEAR
    assert layer.macs == inputs * outputs * math.prod(middle)


@st.composite
def convolutions(draw, dims):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    if draw(st.booleans()):
        groups = inputs
        outputs = inputs * draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    padding = draw(
        st.sampled_from(["same", "valid"]) | st.tuples(*[st.integers(0, 2) for _ in range(dims)])
    )
    stride = (1,) * dims
    if padding != "same":
        stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    module = kind(
        inputs, outputs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans())
    )
    sizes = [draw(st.integers(d * (k - 1) + 1, 9)) for k, d in zip(kernel, dilation, strict=True)]
    return module, torch.randn(2, inputs, *sizes, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=40, deadline=None)
@given(convolutions(1))
def test_convolution_1d(case):
    check_layer(*case)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=40, deadline=None)
@given(convolutions(2))
def test_convolution_2d(case):
    check_layer(*case)


@st.composite
def transposed_convolutions(draw):
    groups = draw(st.sampled_from([1, 2]))
    pairs = {
        "kernel_size": (1, 4),
        "stride": (1, 3),
        "dilation": (1, 2),
    }
    given_sizes = {
        name: (draw(st.integers(*bounds)), draw(st.integers(*bounds)))
        for name, bounds in pairs.items()
    }
    reach = [
        d * (k - 1)
        for k, d in zip(given_sizes["kernel_size"], given_sizes["dilation"], strict=True)
    ]
    module = nn.ConvTranspose2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        **given_sizes,
        # At least one pixel is left of an input of three.
        padding=tuple(
            draw(st.integers(0, min(r, s + r // 2)))
            for r, s in zip(reach, given_sizes["stride"], strict=True)
        ),
        output_padding=tuple(
            draw(st.integers(0, max(s, d) - 1))
            for s, d in zip(given_sizes["stride"], given_sizes["dilation"], strict=True)
        ),
        groups=groups,
        bias=draw(st.booleans()),
    )
    sizes = [draw(st.integers(3, 5)) for _ in range(2)]
    return module, torch.randn(2, module.in_channels, *sizes, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(transposed_convolutions())
def test_transposed_convolution(case):
    layer = check_layer(*case)
    assert layer.kind is LayerKind.CONV_TRANSPOSE2D


def test_columns_run_over_channels_within_a_kernel_position():
    module = nn.Conv2d(2, 1, (1, 3), bias=False)
    # weight[0, channel, 0, position] = 10 * position + channel
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[[[0.0, 10, 20]], [[1.0, 11, 21]]]]))
    (layer,), _ = find_layers(capture(module, (torch.randn(2, 2, 1, 3),)))
    assert weight_to_matrix(layer, module.weight).tolist() == [[0, 1, 10, 11, 20, 21]]
    (vectors,) = input_vectors(layer, torch.tensor([[[[0.0, 10, 20]], [[1.0, 11, 21]]]]))
    assert vectors[0, :, 0].tolist() == [0, 1, 10, 11, 20, 21]
    assert layer.channels == 2


def test_columns_of_a_transposed_convolution():
    # Output pixel p of a stride-1 transposed convolution reads input p - k with weight k, so the
    # matrix holds the kernel mirrored.
    module = nn.ConvTranspose2d(2, 1, (1, 2), bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[[[0.0, 10]]], [[[1.0, 11]]]]))
    (layer,), _ = find_layers(capture(module, (torch.randn(2, 2, 1, 3),)))
    assert weight_to_matrix(layer, module.weight).tolist() == [[10, 11, 0, 1]]


def test_unfolding_in_pieces_changes_nothing(monkeypatch):
    module = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    x = torch.randn(5, 4, 6, 6)
    (layer,), _ = find_layers(capture(module, (x,)))
    whole = list(input_vectors(layer, x))
    linear = find_layers(capture(nn.Linear(8, 2), (torch.randn(2, 8),)))[0][0]
    rows = torch.randn(50, 8)
    monkeypatch.setattr(layers_module, "UNFOLD_BYTES", 4 * layer.cols * 2 * 36)
    pieces = list(input_vectors(layer, x))
    assert (len(whole), len(pieces)) == (1, 5)
    assert torch.equal(torch.cat(pieces, 2), whole[0])
    monkeypatch.setattr(layers_module, "UNFOLD_BYTES", 4 * 8 * 7)
    pieces = list(input_vectors(linear, rows))
    assert len(pieces) == 8
    assert torch.equal(torch.cat(pieces, 2)[0].T, rows)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.line = nn.Conv1d(6, 4, 5, padding="same")
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = self.up(self.depthwise(torch.relu(self.stem(x))))
        return self.head(self.line(x.flatten(2)).transpose(1, 2))


def test_macs_are_half_the_flops_torch_counts():
    model = Mixed().eval()
    x = torch.randn(1, 3, 8, 8)
    found, _ = find_layers(capture(model, (x,)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    counts = {
        name.removeprefix("Mixed."): sum(flops.values())
        for name, flops in counter.get_flop_counts().items()
    }
    for layer in found:
        assert 2 * layer.macs == counts[layer.name], layer.name
    assert 2 * sum(layer.macs for layer in found) == counter.get_total_flops()


def test_macs_of_resnet18_are_what_torch_counts():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    found, unsupported = find_layers(capture(model, (x,)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert 2 * sum(layer.macs for layer in found) == counter.get_total_flops()
    assert (len(found), unsupported) == (21, [])


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.volume = nn.Conv3d(1, 2, 2)
        self.twisted = nn.Bilinear(4, 4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, words, volume):
        x = self.words(words).mean(1)
        x = x + self.volume(volume).mean((1, 2, 3, 4), keepdim=False)[:, None]
        return self.head(self.twisted(x, x))


def test_what_is_not_supported_is_reported():
    inputs = (torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 1, 3, 3, 3))
    found, unsupported = find_layers(capture(Unsupported(), inputs))
    assert [layer.name for layer in found] == ["head"]
    reasons = {layer.name: layer.reason for layer in unsupported}
    assert set(reasons) == {"words", "volume", "twisted"}
    assert "embedding" in reasons["words"]
    assert "conv3d" in reasons["volume"]
    assert all("left dense" in reason for reason in reasons.values())


class TwoDilations(nn.Module):
    """One weight under two dilations: no single matrix problem has its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        wide = functional.conv2d(x, self.conv.weight, self.conv.bias, padding=2, dilation=2)
        return self.conv(x) + wide


class TwoKinds(nn.Module):
    """One weight of a linear layer and of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.fc(x) + x @ self.fc.weight


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (TwoDilations(), torch.randn(2, 3, 8, 8)),
        (TwoKinds(), torch.randn(2, 4)),
    ],
)
def test_weights_with_several_uses_that_differ_stay_dense(model, x):
    found, unsupported = find_layers(capture(model, (x,)))
    assert found == []
    assert len(unsupported) == 1


def test_selecting_layers():
    found, _ = find_layers(
        capture(build(Concatenation), (torch.from_numpy(samples(Concatenation)),))
    )
    assert [layer.name for layer in select_layers(found, "*e*")] == [
        "stem",
        "left",
        "merge",
        "head",
    ]
    assert [layer.name for layer in select_layers(found, "left")] == ["left"]
    with pytest.raises(LayerError, match=r"^no layer matches 'lefty'; the layers are stem, left"):
        select_layers(found, "lefty")


def test_batch_norms_are_no_unsupported_layers():
    _, unsupported = find_layers(capture(build(Plain), (torch.from_numpy(samples(Plain)),)))
    assert unsupported == []
