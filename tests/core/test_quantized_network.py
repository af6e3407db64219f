"""The simulated network: its arithmetic is ONNX's, and quantizers stand where they should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import Concatenation, Depthwise, Residual, SharedConvolution, build, samples
from torch import nn

from obc_deploy.activations import ActivationRange
from obc_deploy.capture import get_tensor
from obc_deploy.compression import compress
from obc_deploy.errors import ExportError
from obc_deploy.quantized_network import (
    DEQUANTIZE,
    QUANTIZE_DEQUANTIZE,
    dequantize,
    quantize_dequantize,
    quantized_network,
)
from obc_deploy.targets import Placement


def onnx_quantize_dequantize(values, scale, zero_point):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape)],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero_point, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": values})[0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20),
    st.integers(1, 400),
    st.integers(0, 255),
    st.booleans(),
)
def test_the_quantizer_is_onnx_runtimes(numbers, hundredths, zero_point, signed):
    scale = np.array(hundredths / 100, np.float32)
    # Halves of a step, so that rounding to even shows.
    values = np.array([*numbers, *(float(scale) * (k + 0.5) for k in range(-4, 5))], np.float32)
    zero = np.array(zero_point - 128 if signed else zero_point, np.int8 if signed else np.uint8)
    limits = (-128, 127) if signed else (0, 255)
    found = quantize_dequantize(
        torch.from_numpy(values), torch.from_numpy(scale), torch.from_numpy(zero), *limits
    )
    np.testing.assert_array_equal(found.numpy(), onnx_quantize_dequantize(values, scale, zero))


@pytest.mark.parametrize("axis", [0, 1])
def test_dequantize_along_an_axis(axis):
    codes = torch.randint(-128, 128, (3, 3, 2), dtype=torch.int8)
    scale, zero = torch.rand(3), torch.tensor([0, -3, 7], dtype=torch.int8)
    found = dequantize(codes, scale, zero, axis)
    for index in range(3):
        part = codes.select(axis, index).float() - zero[index]
        torch.testing.assert_close(found.select(axis, index), part * scale[index], rtol=0, atol=0)


def compressed(kind, scheme="w8a8", **options):
    return compress(
        build(kind), samples(kind), scheme=scheme, method="rtn", baselines=False, **options
    )


def quantizers(quantized):
    return {
        node.args[0].name: sorted(user.name for user in node.users)
        for node in quantized.module.graph.nodes
        if node.target is QUANTIZE_DEQUANTIZE
    }


def test_quantizers_of_a_residual_network():
    quantized = compressed(Residual).quantized()
    assert set(quantized.int8_layers) == {"first", "second", "third", "head"}
    assert quantized.float_layers == {}
    found = quantizers(quantized)
    # The rectified values, not the sums before them; the pooled ones on the grid they came from.
    assert set(found) == {"x", "relu", "max_pool2d", "relu_1", "conv2d_2", "relu_2", "mean"}
    assert quantized.grids["max_pool2d"] == quantized.grids["relu"]
    for name in ("relu", "relu_1", "relu_2"):
        assert quantized.grids[name].zero_point == 0
    assert quantized.grids["x"].zero_point > 0


def test_operators_left_in_float_by_the_placement():
    model = compressed(Concatenation)
    everything = quantizers(model.quantized())
    assert {"cat", "avg_pool2d"} <= set(everything)
    little = quantizers(model.quantized(Placement(concat=False, average_pool=False)))
    assert "cat" in little  # a layer reads it
    assert everything["cat"] == little["cat"]
    assert "avg_pool2d" not in little
    assert "view" in little  # the head reads it


def test_signed_grids():
    quantized = compressed(Residual).quantized(Placement(signed=True))
    assert all(grid.signed and grid.zero_point == 0 for grid in quantized.grids.values())


def test_no_quantizers_without_activation_bits():
    quantized = compressed(Residual, "w4").quantized()
    assert quantizers(quantized) == {}
    assert quantized.int8_layers == ()
    assert set(quantized.float_layers) == {"first", "second", "third", "head"}
    assert "activations stay float" in quantized.float_layers["first"]


@pytest.mark.parametrize(
    ("scheme", "reason"), [("w8a8-asym", "symmetric weight grids"), ("w4g4a8", "one scale")]
)
def test_layers_that_integer_kernels_cannot_take(scheme, reason):
    options = {"fallback": "w8a8"} if "g" in scheme else {}
    model = compressed(Residual, scheme, **options)
    quantized = model.quantized()
    for name, said in quantized.float_layers.items():
        assert reason in said
        form = model.forms[name]
        weight = next(
            node for node in quantized.module.graph.nodes if node.name == layer_of(model, name)
        ).args[1]
        if form.scale.shape[1] > 1:
            assert weight.op == "get_attr"
            found = get_tensor(quantized.module, weight.target)
            assert torch.equal(found.flatten().sort()[0], form.weight.flatten().sort()[0])
        else:
            assert weight.target is DEQUANTIZE
    assert set(quantized.float_layers) | set(quantized.int8_layers) == set(model.forms)
    assert quantized.float_layers


def layer_of(model, name):
    return next(layer for layer in model.layers if layer.name == name).call_sites[0]


def test_weights_and_biases_are_codes_on_the_scales_kernels_want():
    model = compressed(Depthwise)
    quantized = model.quantized()
    for layer in model.layers:
        form = model.forms[layer.name]
        codes = get_tensor(quantized.module, f"{layer.name}.weight_codes")
        assert codes.dtype == torch.int8
        assert torch.equal(codes.flatten().sort()[0], form.codes.flatten().sort()[0])
        site = next(n for n in quantized.module.graph.nodes if n.name == layer.call_sites[0])
        grid = quantized.grids[site.args[0].args[0].name]
        bias_scale = get_tensor(quantized.module, f"{layer.name}.bias_scale")
        torch.testing.assert_close(
            bias_scale, form.scale[:, 0] * torch.tensor(grid.scale), rtol=0, atol=0
        )
        bias = get_tensor(model.network.module, layer.bias_name)
        found = get_tensor(quantized.module, f"{layer.name}.bias_codes").double() * bias_scale
        assert bool(((found - bias).abs() <= 0.5001 * bias_scale).all())


def test_each_use_of_a_shared_weight_has_its_own_bias_scale():
    model = compressed(SharedConvolution)
    quantized = model.quantized()
    first = get_tensor(quantized.module, "twice.bias_scale")
    second = get_tensor(quantized.module, "twice.bias1_scale")
    assert bool((second > 5 * first).all())
    x = torch.from_numpy(samples(SharedConvolution))
    with torch.no_grad():
        wanted = model.network.module(x)
        error = (quantized.module(x) - wanted).norm() / wanted.norm()
    assert error < 0.05


class TwoBiases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.other = nn.Parameter(torch.tensor([5.0, -5.0, 3.0, 0.0]))

    def forward(self, x):
        first = nn.functional.linear(x, self.fc.weight, self.other)
        return self.fc(x) + first - nn.functional.linear(x, self.fc.weight)


def test_a_shared_weight_with_several_biases_or_none():
    model = compress(
        TwoBiases(),
        np.random.default_rng(0).standard_normal((64, 4), dtype=np.float32),
        method="rtn",
        baselines=False,
    )
    x = torch.from_numpy(model.samples.inputs["x"])
    with torch.no_grad():
        wanted = model.network.module(x)
        error = (model.module()(x) - wanted).norm() / wanted.norm()
    assert error < 0.05


def test_channels_too_small_for_their_bias_get_a_scale_that_fits():
    network = build(Residual)
    with torch.no_grad():
        network.second.weight[2] = 0.0
        network.second.weight[5] *= 1e-12
        network.second.bias[2] = 3.0
        network.second.bias[5] = -2.0
    model = compress(network, samples(Residual), method="rtn", baselines=False)
    quantized = model.quantized()
    codes = get_tensor(quantized.module, "second.bias_codes").double()
    scale = get_tensor(quantized.module, "second.bias_scale").double()
    assert bool((codes.abs() < 2**30).all())
    assert codes[2] * scale[2] == pytest.approx(3.0, rel=1e-5)
    assert codes[5] * scale[5] == pytest.approx(-2.0, rel=1e-5)
    assert not get_tensor(quantized.module, "second.weight_codes")[[2, 5]].any()


def test_readers_decide_the_bits_of_a_value():
    model = compressed(Residual, "w8a4", layer_schemes={"first": "w8a8", "head": "w8a6"})
    bits = {name: grid.bits for name, grid in model.quantized().grids.items()}
    assert bits["x"] == 8
    assert bits["relu_1"] == 4
    # What goes into the residual sum also gets there: the most bits that any reader wants.
    assert {bits[name] for name in ("relu", "max_pool2d", "conv2d_2", "relu_2", "mean")} == {6}


def test_a_missing_range_is_an_error():
    model = compressed(Residual)
    ranges = {name: found for name, found in model.ranges.items() if name != "relu_1"}
    with pytest.raises(ExportError, match="no activation range was calibrated for 'relu_1'"):
        replace(model, ranges=ranges).quantized()


def test_the_network_is_left_as_it_is():
    model = compressed(Residual)
    x = torch.from_numpy(samples(Residual, 4))
    with torch.no_grad():
        before = model.network.module(x)
        model.quantized()
        assert torch.equal(model.network.module(x), before)


def test_wide_ranges_quantize_to_nothing_and_narrow_ones_saturate():
    model = compressed(Residual)
    x = torch.from_numpy(samples(Residual, 4))
    narrow = {name: ActivationRange(0.0, 1e-6) for name in model.ranges}
    quantized = quantized_network(model.network, model.layers, model.forms, narrow, Placement())
    with torch.no_grad():
        small = quantized.module(x)
        # With all activations next to zero the last bias is all that is left.
        torch.testing.assert_close(
            small,
            model.network.module.get_parameter("head.bias").expand_as(small),
            atol=1e-2,
            rtol=0,
        )


def test_attention_weights_without_a_module_are_put_on_their_grids():
    torch.manual_seed(0)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = torch.nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=False)[0]

    samples = np.random.default_rng(0).standard_normal((8, 5, 16)).astype(np.float32)
    made = compress(Attention(), samples, scheme="w8a8", method="rtn", baselines=False)
    assert "attend.in_proj_weight" in made.forms
    x = torch.from_numpy(samples)
    with torch.no_grad():
        found, wanted = made.module()(x), made.network.module(x)
    assert not torch.equal(found, wanted)
    assert float((found - wanted).square().mean() / wanted.square().mean()) < 1e-3
