from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_models import CHANNELS, OnnxBuilder, needs_deepsparse

from obc_deploy.errors import RuntimeFailedError
from obc_deploy.runtimes.audit import Expectation, audit_artifact, count_accelerated
from obc_deploy.runtimes.onnx_graph import read_onnx_graph


def layers_of(found, *names):
    return [[getattr(layer, name) for name in names] for layer in found.layers]


def test_onnxruntime_runs_float_layers_as_float(models: OnnxBuilder) -> None:
    found = audit_artifact("onnxruntime", models.float_conv(), {"x": models.x}, threads=1)
    assert layers_of(found, "name", "operator", "int8", "native") == [
        ["conv", "Conv", False, True],
        ["fc", "Gemm", False, True],
    ]
    assert all(layer.step is not None for layer in found.layers)
    assert all(layer.ms is not None and layer.ms > 0 for layer in found.layers)
    assert not found.fallback
    assert any("sparsity makes nothing faster" in reason for reason in found.reasons)
    json.dumps(found.as_dict())


@pytest.mark.parametrize("per_channel", [False, True])
def test_onnxruntime_runs_qoperator_layers_as_int8(per_channel: bool, models: OnnxBuilder) -> None:
    path = models.qlinear_conv(per_channel=per_channel)
    found = audit_artifact("onnxruntime", path, {"x": models.x}, threads=1)
    assert layers_of(found, "outputs", "kind", "int8") == [[("c", "y"), "QLinearConv", True]]
    asked = {
        "int8": Expectation("c", sparse=False, int8=True),
        "both": Expectation("c", sparse=True, int8=True),
        "dense": Expectation("c", sparse=False, int8=False),
        "none": Expectation("nothing", sparse=False, int8=True),
    }
    counted = count_accelerated(found, asked)
    assert (counted.accelerated, counted.total, counted.sparse, counted.int8) == (1, 3, 0, 2)
    assert set(counted.reasons) == {"both", "none"}
    assert "multiplied its zeros too" in counted.reasons["both"]
    assert "'nothing'" in counted.reasons["none"]


def test_onnxruntime_leaves_a_half_quantized_layer_in_float(models: OnnxBuilder) -> None:
    found = audit_artifact("onnxruntime", models.qdq(), {"x": models.x}, threads=1)
    assert layers_of(found, "name", "int8") == [["first", True], ["second", False]]
    assert found.fallback
    assert any("'second'" in reason and "in float" in reason for reason in found.reasons)
    asked = {
        "first": Expectation("c1", sparse=False, int8=True),
        "second": Expectation("y", sparse=False, int8=True),
    }
    counted = count_accelerated(found, asked)
    assert (counted.accelerated, counted.total) == (1, 2)
    assert list(counted.reasons) == ["second"]


def test_onnxruntime_finds_the_two_branches_of_a_residual(models: OnnxBuilder) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["left"], name="a", pads=[1] * 4),
        helper.make_node("Conv", ["x", "v"], ["right"], name="b", pads=[1] * 4),
        helper.make_node("Add", ["left", "right"], ["sum"], name="add"),
        helper.make_node("Relu", ["sum"], ["y"], name="relu"),
    ]
    path = models.save("residual", nodes, {"w": models.weight, "v": 2 * models.weight})
    found = audit_artifact("onnxruntime", path, {"x": models.x}, threads=1)
    steps = [layer.step for layer in found.layers]
    assert None not in steps
    assert len(set(steps)) == 2


def test_unnamed_nodes_are_found_by_their_values(models: OnnxBuilder) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    path = models.save("unnamed", nodes, {"w": models.weight})
    found = audit_artifact("onnxruntime", path, {"x": models.x}, threads=1)
    assert layers_of(found, "name", "kind") == [["c", "Conv"]]


def test_the_walk_to_the_next_layer_ends_at_forks(models: OnnxBuilder) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Relu", ["r"], ["s"]),
        helper.make_node("Add", ["r", "s"], ["y"]),
    ]
    graph = read_onnx_graph(models.save("fork", nodes, {"w": models.weight}))
    assert graph.values_fused_after("c") == ("c", "r")
    assert graph.values_fused_after("y") == ("y",)


@needs_deepsparse
def test_deepsparse_takes_float_layers(models: OnnxBuilder) -> None:
    found = audit_artifact("deepsparse", models.float_conv(), {"x": models.x}, threads=1)
    assert found.fraction_native == 1.0
    assert not found.fallback
    assert found.reasons == ()
    assert layers_of(found, "name", "native", "int8") == [
        ["conv", True, False],
        ["fc", True, False],
    ]


@needs_deepsparse
def test_deepsparse_takes_integer_layers(models: OnnxBuilder) -> None:
    for path in (models.conv_integer(), models.qlinear_conv(per_channel=False)):
        found = audit_artifact("deepsparse", path, {"x": models.x}, threads=1)
        assert found.fraction_native == 1.0
        assert not found.fallback
        assert layers_of(found, "name", "native", "int8") == [["conv", True, True]]
        counted = count_accelerated(found, {"conv": Expectation("c", sparse=True, int8=True)})
        assert (counted.accelerated, counted.total) == (1, 1)


@needs_deepsparse
@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("qdq", "QDQ"),
        ("per_channel", "scale per output channel"),
        ("mean", "ReduceMean"),
        ("grouped", "groups of"),
    ],
)
def test_deepsparse_falls_back_and_the_audit_says_why(
    form: str, said: str, models: OnnxBuilder
) -> None:
    if form == "qdq":
        path = models.qdq()
    elif form == "per_channel":
        path = models.qlinear_conv(per_channel=True)
    elif form == "mean":
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1] * 4),
            helper.make_node("ReduceMean", ["c", "axes"], ["y"], name="mean"),
        ]
        weights = {"w": models.weight, "axes": np.array([-1, -2])}
        path = models.save("mean", nodes, weights, opset=18, output=(1, CHANNELS, 1, 1))
    else:
        node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1] * 4, group=4)
        path = models.save("grouped", [node], {"w": models.weight[:, : CHANNELS // 4]})
    found = audit_artifact("deepsparse", path, {"x": models.x}, threads=1)
    assert found.fallback
    assert found.fraction_native < 1.0
    assert not any(layer.native for layer in found.layers)
    assert any(said in reason for reason in found.reasons)
    assert all("\n" not in reason for reason in found.reasons)
    asked = {"layer": Expectation(found.layers[0].outputs[0], sparse=True, int8=True)}
    assert count_accelerated(found, asked).accelerated == 0


@needs_deepsparse
def test_deepsparse_reports_the_zeros_it_skips(models: OnnxBuilder) -> None:
    draw = np.random.default_rng(3)
    channels, nodes, weights = 64, [], {}
    shape = [1, channels, 28, 28]
    start = np.zeros((channels, CHANNELS, 1, 1), np.float32)
    start[:CHANNELS] = np.eye(CHANNELS, dtype=np.float32)[:, :, None, None]
    nodes.append(helper.make_node("Conv", ["x", "start"], ["in"], name="start", pads=[10] * 4))
    value = "in"
    for place in range(3):
        weight = draw.standard_normal((channels, channels, 3, 3)).astype(np.float32)
        weights[f"w{place}"] = weight * (draw.random(weight.shape) > 0.7)
        output = "y" if place == 2 else f"c{place}"
        nodes.append(
            helper.make_node("Conv", [value, f"w{place}"], [output], name=output, pads=[1] * 4)
        )
        value = output
    path = models.save("sparse", nodes, {"start": start, **weights}, output=tuple(shape))
    found = audit_artifact("deepsparse", path, {"x": models.x}, threads=1)
    assert not found.fallback
    assert all(layer.native for layer in found.layers)
    said = [layer for layer in found.layers if layer.kernel_sparsity]
    for layer in said:
        kept = weights[f"w{[node.output[0] for node in nodes].index(layer.outputs[0]) - 1}"]
        assert layer.kernel_sparsity == pytest.approx((kept == 0).mean(), abs=0.01)
    for layer in found.layers:
        assert (layer.kind == "pyramid") == (layer.kernel_sparsity is None)


@needs_deepsparse
def test_deepsparse_is_kept_from_an_integer_layer_it_crashes_at(models: OnnxBuilder) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("ConvInteger", ["q", "w", "z"], ["c"], name="bare", pads=[1] * 4),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = {"s": models.scale, "z": models.zero_point, "w": models.codes}
    path = models.save("bare_integer", nodes, weights)
    with pytest.raises(RuntimeFailedError, match="'bare' is a ConvInteger without a weight zero"):
        audit_artifact("deepsparse", path, {"x": models.x}, threads=1)


@needs_deepsparse
def test_deepsparse_cannot_load_grouped_conv_integer(models: OnnxBuilder) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("ConvInteger", ["q", "w", "z"], ["c"], name="dw", pads=[1] * 4, group=4),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = {"s": models.scale, "z": models.zero_point, "w": models.codes[:, : CHANNELS // 4]}
    path = models.save("grouped_integer", nodes, weights)
    with pytest.raises(RuntimeFailedError, match="'dw' is a ConvInteger in 4 groups"):
        audit_artifact("deepsparse", path, {"x": models.x}, threads=1)
