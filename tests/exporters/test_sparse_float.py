"""Float layers with zeros as sparse operators: the same numbers, fewer weights, only if cheaper."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exported import operators, places_in, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, shape_inference
from tiny_networks import Residual, Transformer, build, samples

from obc_deploy.compression import compress
from obc_deploy.errors import ExportError
from obc_deploy.exporters import sparse_float
from obc_deploy.exporters.rewritten_file import rewrite_onnx
from obc_deploy.exporters.sparse_cost import FLOAT_TILE, Work, nanoseconds
from obc_deploy.exporters.sparse_float import stored_entries, to_sparse_floats
from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.audit import Expectation, audit_artifact, count_accelerated
from obc_deploy.schemes import Scheme
from obc_deploy.targets import FLOAT_SPARSE_FROM, ORT_SPARSE, preflight

pytestmark = pytest.mark.skipif(
    not sparse.is_available(), reason=f"sparse kernels: {sparse.why_missing() or 'there'}"
)


@pytest.fixture
def everywhere(monkeypatch):
    """Sparse operators wherever there is one, cheaper or not."""
    monkeypatch.setattr(
        sparse_float, "nanoseconds", lambda operator, _: float(not operator.startswith("Sparse"))
    )


def run(content, feeds):
    """All outputs, with our library, without ONNX Runtime's rewriting."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(sparse.library_path()))
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def saved(nodes, arrays, shape):
    """A checked model with one input x and one output y."""
    graph = helper.make_graph(
        nodes, "floats", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return shape_inference.infer_shapes(model, strict_mode=True)


def rewritten(proto):
    model = ir.from_proto(proto)
    made = to_sparse_floats(model)
    return ir.to_proto(model), made


def sparse_weight(rng, shape, zeros):
    return (rng.standard_normal(shape) * (rng.random(shape) >= zeros)).astype(np.float32)


@st.composite
def convolutions(draw):
    kernel = draw(st.sampled_from([1, 2, 3, 5]))
    return {
        "kernel": kernel, "channels": draw(st.integers(1, 9)), "outputs": draw(st.integers(1, 40)),
        "height": draw(st.integers(kernel, 19)), "width": draw(st.integers(kernel, 19)),
        "stride": draw(st.sampled_from([1, 2])), "batch": draw(st.integers(1, 3)),
        "pads": draw(st.lists(st.integers(0, kernel - 1), min_size=4, max_size=4)),
        "bias": draw(st.booleans()), "add": draw(st.sampled_from([None, "left", "right"])),
        "clip": draw(st.sampled_from([None, "Relu", "Clip", "lower"])),
        "zeros": draw(st.sampled_from([0.3, 0.7, 0.95, 1.0])), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@given(case=convolutions())
@settings(deadline=None, max_examples=80)
def test_convolutions_with_all_that_follows_are_one_operator(case):
    rng = np.random.default_rng(case["seed"])
    kernel = case["kernel"]
    weight = sparse_weight(rng, (case["outputs"], case["channels"], kernel, kernel), case["zeros"])
    if 1 - np.count_nonzero(weight) / weight.size < sparse_float.LEAST_ZEROS:
        return
    shape = (case["batch"], case["channels"], case["height"], case["width"])
    attributes = {"strides": [case["stride"]] * 2, "pads": case["pads"],
                  "kernel_shape": [kernel] * 2}  # fmt: skip
    arrays = {"w": weight}
    if case["bias"]:
        arrays["b"] = rng.standard_normal(case["outputs"]).astype(np.float32)
    value = "c"
    nodes = [helper.make_node("Conv", ["x", *arrays], [value], **attributes)]
    if case["add"]:
        # Something of the result's size that is computed: a convolution of ones beside it.
        other = np.ones_like(weight)
        arrays["o"] = other
        nodes.insert(0, helper.make_node("Conv", ["x", "o"], ["r"], **attributes))
        pair = ["r", value] if case["add"] == "left" else [value, "r"]
        nodes.append(helper.make_node("Add", pair, ["s"]))
        value = "s"
    if case["clip"] == "Relu":
        nodes.append(helper.make_node("Relu", [value], ["y"]))
    elif case["clip"]:
        arrays |= {"low": np.float32(-0.5), "high": np.float32(0.75)}
        bounds = ["low", "high"] if case["clip"] == "Clip" else ["low"]
        nodes.append(helper.make_node("Clip", [value, *bounds], ["y"]))
    else:
        nodes[-1].output[0] = "y"
    proto = saved(nodes, arrays, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_float, "nanoseconds", lambda name, _: float(name == "Conv"))
        made, layers = rewritten(proto)
    assert [node.op_type for node in made.graph.node] == (["Conv"] if case["add"] else []) + [
        "SparseConvolutionFloat"
    ]
    (layer,) = layers
    assert layer[0] == "y"
    assert layer[1] == pytest.approx(1 - np.count_nonzero(weight) / weight.size)
    feeds = {"x": rng.standard_normal(shape).astype(np.float32)}
    (wanted,), (found,) = (run(p.SerializeToString(), feeds) for p in (proto, made))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "operator", "turned", "bias"),
    [
        *(((count,), "Gemm", turned, turned) for count in (1, 3, 300) for turned in (True, False)),
        *((rows, "MatMul", False, False) for rows in ((1,), (3,), (2, 17))),
    ],
)
def test_fully_connected_layers(everywhere, rows, operator, turned, bias):
    rng = np.random.default_rng(3)
    weight = sparse_weight(rng, (21, 13), 0.8)
    arrays = {"w": weight if turned else np.ascontiguousarray(weight.T)}
    if bias:
        arrays["b"] = rng.standard_normal((1, 21)).astype(np.float32)
    attributes = {"transB": int(turned)} if operator == "Gemm" else {}
    nodes = [
        helper.make_node(operator, ["x", *arrays], ["c"], **attributes),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    proto = saved(nodes, arrays, (*rows, 13))
    made, _ = rewritten(proto)
    assert [node.op_type for node in made.graph.node] == ["SparseLinearFloat"]
    feeds = {"x": rng.standard_normal((*rows, 13)).astype(np.float32)}
    (wanted,), (found,) = (run(p.SerializeToString(), feeds) for p in (proto, made))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


UNTOUCHED = {
    "dilation": ("Conv", (8, 4, 3, 3), {"dilations": [2, 2]}, None),
    "groups": ("Conv", (8, 2, 3, 3), {"group": 2}, None),
    "unequal strides": ("Conv", (8, 4, 3, 3), {"strides": [1, 2]}, None),
    "padding as wide as the kernel": ("Conv", (8, 4, 3, 3), {"pads": [3, 0, 0, 0]}, None),
    "few zeros": ("Conv", (8, 4, 3, 3), {}, 0.1),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_has_no_sparse_form_stays(everywhere, case):
    operator, shape, attributes, zeros = UNTOUCHED[case]
    weight = sparse_weight(np.random.default_rng(0), shape, 0.9 if zeros is None else zeros)
    proto = saved([helper.make_node(operator, ["x", "w"], ["y"], **attributes)],
                  {"w": weight}, (1, 4, 12, 12))  # fmt: skip
    made, layers = rewritten(proto)
    assert not layers
    assert made.graph.node[0].op_type == operator


def test_a_result_that_others_read_is_kept(everywhere):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Sub", ["c", "r"], ["y"]),
    ]
    proto = saved(nodes, {"w": sparse_weight(rng, (6, 4, 1, 1), 0.5)}, (1, 4, 5, 5))
    made, layers = rewritten(proto)
    assert [node.op_type for node in made.graph.node] == ["SparseConvolutionFloat", "Relu", "Sub"]
    assert layers[0][0] == "c"
    feeds = {"x": rng.standard_normal((1, 4, 5, 5)).astype(np.float32)}
    (wanted,), (found,) = (run(p.SerializeToString(), feeds) for p in (proto, made))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_only_what_is_cheaper_becomes_sparse():
    rng = np.random.default_rng(0)
    made = {}
    for zeros in (0.5, 0.97):
        weight = sparse_weight(rng, (256, 256, 3, 3), zeros)
        proto = saved([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], {"w": weight},
                      (1, 256, 14, 14))  # fmt: skip
        made[zeros] = len(rewritten(proto)[1])
    assert made == {0.5: 0, 0.97: 1}


@given(entries=st.integers(1, 5000), size=st.integers(1, 40), images=st.integers(1, 4))
@settings(deadline=None)
def test_work_grows_with_what_is_computed(entries, size, images):
    def work(entries, images):
        return Work.of_float_convolution(
            images=images, in_size=(size, size), out_size=(size, size), channels=8, outputs=8,
            positions=9, entries=entries,
        )  # fmt: skip

    tiles = work(1, 1).counts["block_pixels"] / FLOAT_TILE
    assert tiles == int(tiles) >= size * size / FLOAT_TILE
    less, more = (
        nanoseconds("SparseConvolutionFloat", work(*counts))
        for counts in ((entries, images), (entries + 1, images + 1))
    )
    assert 0 < less < more


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_stored_entries_give_the_weights_back(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=2)))
    if data.draw(st.booleans()):
        shape += tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=2)))
    seed, zeros = data.draw(st.integers(0, 99)), data.draw(st.floats(0, 1))
    weight = sparse_weight(np.random.default_rng(seed), shape, zeros)
    stored = stored_entries(weight)
    again = np.zeros((shape[0], weight.size // shape[0]), np.float32)
    values = iter(stored.values)
    for row, places in enumerate(places_in(stored.mask)):
        for place in places:
            again[row, place] = next(values)
    assert next(values, None) is None
    if len(shape) == 4:
        again = again.reshape(shape[0], *shape[2:], shape[1]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(again.reshape(shape), weight)
    assert stored.zeros == pytest.approx(1 - np.count_nonzero(weight) / weight.size)


@pytest.mark.parametrize("kind", [Residual, Transformer])
def test_a_pruned_network_from_end_to_end(everywhere, tmp_path, kind):
    model = compress(
        build(kind), samples(kind), scheme="unstructured@0.9", method="magnitude", baselines=False,
        skip=(),
    )  # fmt: skip
    artifact = model.export(tmp_path, target=ORT_SPARSE)  # compares outputs with PyTorch's
    there = operators(artifact.path)
    expected = {
        layer.name: Expectation(layer.output, layer.sparse, layer.int8)
        for layer in artifact.manifest.layers
    }
    name = model.network.input_names[0]
    x = samples(kind, 1, seed=2)
    audited = audit_artifact("onnxruntime", artifact.path, {name: x}, threads=1)
    counted = count_accelerated(audited, expected)
    sparse_there = there["SparseConvolutionFloat"] + there["SparseLinearFloat"]
    assert sparse_there >= 2
    assert counted.sparse == sparse_there
    with torch.no_grad():
        wanted = model.module(ORT_SPARSE)(torch.from_numpy(x)).numpy()
    (found,) = run(str(artifact.path), {name: x})
    assert relative(found, wanted) < 1e-3


def test_an_onnx_file_of_floats(everywhere, tmp_path):
    weight = sparse_weight(np.random.default_rng(0), (16, 8, 3, 3), 0.9)
    source = tmp_path / "pruned.onnx"
    onnx.save(
        saved([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], {"w": weight},
              (1, 8, 9, 9)), source,
    )  # fmt: skip
    made = rewrite_onnx(source, tmp_path / "out", ORT_SPARSE)
    assert made.layers == (("y", pytest.approx(1 - np.count_nonzero(weight) / weight.size)),)
    assert made.size_bytes < made.dense_size_bytes
    dense = tmp_path / "dense.onnx"
    onnx.save(
        saved([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight + 1}, (1, 8, 9, 9)), dense
    )
    with pytest.raises(ExportError, match="prune its float layers to 85 % zeros"):
        rewrite_onnx(dense, tmp_path / "out", ORT_SPARSE)


def test_the_target_says_from_where_float_layers_gain():
    layers = compress(build(Residual), samples(Residual), scheme="dense", baselines=False).layers

    def said(scheme):
        schemes = {layer.name: Scheme.parse(scheme) for layer in layers}
        return preflight(ORT_SPARSE, layers, schemes)

    assert said(f"unstructured@{FLOAT_SPARSE_FROM}") == []
    (line,) = said("unstructured@0.5")
    assert "below 85% zeros" in line
    (line, *_) = said("unstructured@0.9+w4")
    assert "add 'a8'" in line
