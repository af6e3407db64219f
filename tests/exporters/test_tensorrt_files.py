"""Files for TensorRT: what is in them, against the rules and against the simulated network."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import constants, tensorrt
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import Depthwise, Residual, Transformer, Upsampling, build, samples
from torch import nn

from obc_deploy.activations import FLOAT8_MAX
from obc_deploy.artifacts import file_sha256
from obc_deploy.compression import compress
from obc_deploy.errors import ExportError, RuntimeFailedError, RuntimeMissingError
from obc_deploy.exporters import onnx_file, parity, sample_batches
from obc_deploy.exporters.engine import (
    AHEAD_OF_TIME,
    EngineOptions,
    build_engine,
    find_library,
    load_engine,
)
from obc_deploy.exporters.engine_parity import compare_outputs, device_latency
from obc_deploy.exporters.precision import in_float32
from obc_deploy.exporters.tensorrt_refusals import refusals
from obc_deploy.layers import matrix_to_weight
from obc_deploy.runtimes.session import open_session
from obc_deploy.runtimes.two_of_four import check_two_of_four
from obc_deploy.targets import EightBit, Precision

FP16, BF16, FP32 = Precision.FLOAT16, Precision.BFLOAT16, Precision.FLOAT32
STORED = {
    FP32: TensorProto.FLOAT, FP16: TensorProto.FLOAT16, BF16: TensorProto.BFLOAT16,
}  # fmt: skip


INT8, FP8 = EightBit.INT8, EightBit.FP8
FORMS = [
    (kind, scheme, eight_bit)
    for kind in (Residual, Transformer)
    for scheme, eight_bit in (
        ("dense", INT8),
        ("2:4", INT8),
        ("w8a8", INT8),
        ("2:4+w8a8", INT8),
        ("w8a8", FP8),
        ("2:4+w8a8", FP8),
        ("w4g32", INT8),
        ("2:4+w4g32", INT8),
    )
    if kind is Transformer or "g32" not in scheme  # convolutions have no blocks of INT4
]
OTHER_PRECISIONS = [
    (Residual, "2:4+w8a8", INT8, FP32),
    (Residual, "2:4+w8a8", INT8, BF16),
    (Residual, "2:4+w8a8", FP8, FP32),
    (Transformer, "2:4+w8a8", INT8, FP32),
    (Transformer, "2:4+w8a8", FP8, BF16),
]
EVERY_FORM = [*((*form, FP16) for form in FORMS), *OTHER_PRECISIONS]

try:
    find_library("tensorrt_rtx")
    MISSING = None
except RuntimeMissingError as error:
    MISSING = str(error)


def run(path, x):
    """The first output of ONNX Runtime, which takes the file as it stands."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def nodes_of(path):
    return {name: node for node in onnx.load(path).graph.node for name in node.output}


def simulated(model, goal, x):
    with torch.no_grad():
        return model.quantized(goal.placement).module(torch.from_numpy(x)).numpy()


def distance(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("kind", "scheme", "eight_bit", "precision"), EVERY_FORM)
def test_files_compute_what_the_network_simulates(
    for_tensorrt, tmp_path, kind, scheme, eight_bit, precision
):
    artifact = for_tensorrt.file(kind, scheme, eight_bit, precision)
    proto = onnx.load(artifact.path)
    onnx.checker.check_model(proto, full_check=True)
    assert refusals(proto) == ()
    assert artifact.manifest.precision == precision.value
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
    stored = {c.data_type for c in proto.graph.initializer} & floats
    assert stored == {STORED[precision]}
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    path = artifact.path
    if precision is BF16:
        path = tmp_path / "wide.onnx"
        onnx.save(in_float32(proto), path)
    x = samples(kind, 4, seed=5)
    bound = {FP32: 1e-5, FP16: 3e-2, BF16: 6e-2}[precision]
    wanted = simulated(for_tensorrt.model(kind, scheme), tensorrt(precision, eight_bit), x)
    assert distance(run(path, x), wanted) < bound


@pytest.mark.tensorrt_rtx
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize(("kind", "scheme", "eight_bit", "precision"), EVERY_FORM)
def test_tensorrt_rtx_parses_and_builds_every_form(
    for_tensorrt, tmp_path, kind, scheme, eight_bit, precision
):
    source = for_tensorrt.file(kind, scheme, eight_bit, precision).path
    for sparse in (True, False):
        engine = build_engine(
            source, tmp_path / "net.engine", EngineOptions(sparse=sparse), library="tensorrt_rtx"
        )
        made = engine.manifest
        assert engine.path.stat().st_size == made.size_bytes > 10_000
        assert made.file_sha256 == file_sha256(engine.path)
        assert made.onnx_sha256 == file_sha256(source)
        assert (made.library, made.gpu, made.sparse) == ("tensorrt_rtx", AHEAD_OF_TIME, sparse)
        assert made.version == find_library("tensorrt_rtx")[1].__version__
        # This library's log has no word about sparse kernels, so nothing may be said of them.
        assert engine.tactics.chosen is None
        assert engine.tactics.picked("node_conv2d") is None
        assert (tmp_path / "net.engine.log").read_text().count("\n") > 10
        assert load_engine(engine.path) == engine


@pytest.mark.parametrize("precision", [FP32, FP16])
def test_int8_files_follow_the_rules(for_tensorrt, precision):
    model = for_tensorrt.model(Residual, "2:4+w8a8")
    path = for_tensorrt.file(Residual, "2:4+w8a8", INT8, precision).path
    stored = constants(path)
    for layer in model.layers:
        codes = stored[f"{layer.name}.weight_codes"]
        assert codes.dtype == np.int8
        wanted = matrix_to_weight(layer, model.forms[layer.name].codes).numpy()
        np.testing.assert_array_equal(codes, wanted)
        assert stored[f"{layer.name}.bias"].dtype.kind == "f"
    for node in nodes_of(path).values():
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        zero, scale = stored[node.input[2]], stored[node.input[1]]
        assert zero.dtype == np.int8
        assert not zero.any()
        weight = node.input[0] in stored
        assert scale.shape == ((stored[node.input[0]].shape[0],) if weight else ())


def test_the_shortcut_alone_is_quantized_before_a_residual_add(for_tensorrt):
    path = for_tensorrt.file(Residual, "2:4+w8a8", INT8, FP32).path
    makers = nodes_of(path)
    (add,) = (node for node in makers.values() if node.op_type == "Add")
    sources = [makers[name].op_type for name in add.input]
    assert sorted(sources) == ["Conv", "DequantizeLinear"]
    # What follows the add's ReLU is quantized: the convolution, the add and it are one kernel.
    readers = [n for n in makers.values() if set(n.input) & set(add.output)]
    assert [n.op_type for n in readers] == ["Relu"]
    after = [n.op_type for n in makers.values() if set(n.input) & set(readers[0].output)]
    assert after == ["QuantizeLinear"]


class Downsampling(nn.Module):
    """A residual block whose shortcut is a convolution too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2)
        self.branch = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.relu(self.shortcut(x) + self.branch(x))


def test_of_two_convolutions_the_later_one_ends_in_the_add(tmp_path):
    x = np.random.default_rng(0).standard_normal((16, 4, 8, 8)).astype(np.float32)
    torch.manual_seed(0)
    model = compress(Downsampling(), x, scheme="w8a8", method="rtn", baselines=False)
    path = model.export(tmp_path, tensorrt(FP32)).path
    makers = nodes_of(path)
    (add,) = (node for node in makers.values() if node.op_type == "Add")
    conv, quantized = sorted((makers[n] for n in add.input), key=lambda node: node.op_type)
    assert (conv.op_type, quantized.op_type) == ("Conv", "DequantizeLinear")
    assert makers[conv.input[1]].input[0] == "branch.weight_codes"
    quantizer = makers[quantized.input[0]]
    assert makers[makers[quantizer.input[0]].input[1]].input[0] == "shortcut.weight_codes"


def quantized_outputs(path):
    """Layers whose output (after its bias) goes to a QuantizeLinear."""
    makers, found = nodes_of(path), set()
    for node in makers.values():
        if node.op_type != "QuantizeLinear" or node.input[0] not in makers:
            continue
        source = makers[node.input[0]]
        if source.op_type == "Add":
            inner = [makers[n] for n in source.input if n in makers]
            source = inner[0] if len(inner) == 1 else source
        if source.op_type in {"MatMul", "Gemm"} and source.input[1] in makers:
            weight = makers[source.input[1]]
            while weight.op_type != "DequantizeLinear":
                weight = makers[weight.input[0]]
            found.add(weight.input[0].removesuffix(".weight_codes"))
    return found


def test_outputs_of_sparse_linears_are_quantized_and_no_others(for_tensorrt):
    sparse = for_tensorrt.file(Transformer, "2:4+w8a8").path
    assert quantized_outputs(sparse) == {"qkv", "out", "up", "down"}  # the head is the output
    assert quantized_outputs(for_tensorrt.file(Transformer, "w8a8").path) == set()


@pytest.mark.parametrize(
    ("kind", "scheme", "eight_bit", "storage"),
    [
        (Residual, "2:4", EightBit.INT8, "float16"),
        (Residual, "2:4+w8a8", EightBit.INT8, "int8"),
        (Residual, "2:4+w8a8", EightBit.FP8, "float8e4m3fn"),
        (Transformer, "2:4", EightBit.INT8, "float16"),
        (Transformer, "2:4+w8a8", EightBit.INT8, "int8"),
        (Transformer, "2:4+w8a8", EightBit.FP8, "float8e4m3fn"),
        (Transformer, "2:4+w4g32", EightBit.INT8, "int4"),
    ],
)
def test_two_of_four_survives_every_form(for_tensorrt, kind, scheme, eight_bit, storage):
    path = for_tensorrt.file(kind, scheme, eight_bit).path
    layers = [layer for layer in check_two_of_four(path) if layer.inputs % 4 == 0]
    assert len(layers) == (5 if kind is Transformer else 3)
    assert all(layer.valid for layer in layers)
    assert {layer.storage for layer in layers} == {storage}


def test_layers_keep_their_names(for_tensorrt):
    for scheme in ("2:4", "2:4+w8a8", "2:4+w4g32"):
        artifact = for_tensorrt.file(Transformer, scheme)
        names = [layer.name for layer in artifact.manifest.layers]
        assert sorted(names) == ["down", "head", "out", "qkv", "up"]
        outputs = {layer.output for layer in check_two_of_four(artifact.path)}
        assert {layer.output for layer in artifact.manifest.layers} == outputs


def test_int4_blocks_are_the_solvers_codes(for_tensorrt):
    model = for_tensorrt.model(Transformer, "2:4+w4g32")
    artifact = for_tensorrt.file(Transformer, "2:4+w4g32")
    stored = constants(artifact.path)
    for layer in model.layers:
        codes = stored[f"{layer.name}.weight_codes_int4"]
        assert codes.dtype == ml_dtypes.int4
        wanted = model.forms[layer.name].codes.numpy().T
        np.testing.assert_array_equal(codes.astype(np.int8), wanted)
    blocks = [n for n in nodes_of(artifact.path).values() if n.op_type == "DequantizeLinear"]
    for node in blocks:
        given = {a.name: a.i for a in node.attribute}
        assert given == {"axis": 0, "block_size": 32}
        inputs, outputs = stored[node.input[0]].shape
        assert stored[node.input[1]].shape == (inputs // 32, outputs)
    assert artifact.manifest.opset == 21


def test_float8_weights_are_the_nearest_e4m3_floats(for_tensorrt):
    model = for_tensorrt.model(Residual, "2:4+w8a8")
    stored = constants(for_tensorrt.file(Residual, "2:4+w8a8", FP8, FP32).path)
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.sort(values[np.isfinite(values)])
    for layer in model.layers:
        codes = stored[f"{layer.name}.weight_codes"].astype(np.float32)
        scale = stored[f"{layer.name}.weight_scale"].reshape(-1, *[1] * (codes.ndim - 1))
        steps = matrix_to_weight(layer, model.forms[layer.name].weight).numpy() / scale
        assert np.abs(steps).max() <= FLOAT8_MAX * (1 + 1e-6)
        nearest = np.abs(steps.reshape(-1, 1) - grid).min(1).reshape(codes.shape)
        assert (np.abs(codes - steps) <= nearest + 1e-4).all()


def test_a_batch_may_stay_open(for_tensorrt):
    model, goal = for_tensorrt.model(Transformer, "2:4+w8a8"), tensorrt()
    path = for_tensorrt.file(Transformer, "2:4+w8a8", dynamic_batch=True).path
    for count in (1, 3):
        x = samples(Transformer, count, seed=7)
        assert distance(run(path, x), simulated(model, goal, x)) < 3e-2


def test_weight_only_schemes_without_blocks_are_stored_as_floats(for_tensorrt):
    for kind, scheme, reason in (
        (Residual, "w4", "INT4 blocks are made of"),
        (Transformer, "w3g32-asym", "no zero points"),
    ):
        artifact = for_tensorrt.file(kind, scheme)
        assert any(reason in note for note in artifact.manifest.notes)
        stored = constants(artifact.path)
        assert not [name for name in stored if name.startswith(("second.weight_c", "up.weight_c"))]


def test_activations_of_fewer_bits_are_refused(for_tensorrt, tmp_path):
    model = for_tensorrt.model(Residual, "w8a4")
    with pytest.raises(ExportError, match=r"'first' has 4-bit activations .* compress with 'a8'"):
        model.export(tmp_path, "tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_scales_that_a_precision_cannot_hold_are_refused(for_tensorrt, tmp_path):
    model = for_tensorrt.model(Residual, "2:4+w8a8")
    form = model.forms["second"]
    tiny = {**model.forms, "second": replace(form, scale=form.scale * 1e-5)}
    with pytest.raises(ExportError, match=r"'second\.weight_scale'\) does not fit float16"):
        replace(model, forms=tiny).export(tmp_path, tensorrt(), check=False)
    replace(model, forms=tiny).export(tmp_path, tensorrt(BF16), check=False)


def test_scales_of_channels_without_weights_do_not_matter(for_tensorrt, tmp_path):
    model = for_tensorrt.model(Residual, "2:4+w8a8")
    form = model.forms["second"]
    codes, scale, weight = form.codes.clone(), form.scale.clone(), form.weight.clone()
    codes[3], scale[3], weight[3] = 0, 1e-30, 0.0
    forms = {**model.forms, "second": replace(form, codes=codes, scale=scale, weight=weight)}
    artifact = replace(model, forms=forms).export(tmp_path, tensorrt())
    assert artifact.manifest.parity["relative_error"] < 3e-2


def test_constants_beyond_float16_are_clipped_and_said(tmp_path):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("mask", torch.tensor([0.0] * 6 + [-3e38] * 2))

        def forward(self, x):
            return torch.softmax(self.fc(x) + self.mask, -1)

    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    model = compress(Masked(), x, scheme="w8a8", method="rtn", baselines=False)
    artifact = model.export(tmp_path, tensorrt())
    assert any("1 constants were clipped" in note for note in artifact.manifest.notes)
    assert np.isfinite(run(artifact.path, x[:1])).all()


@pytest.mark.parametrize(
    ("constant", "place", "eight_bit"),
    [
        ("second.weight_codes", "layer that differs is 'second'", FP8),
        ("activations.x_scale", "value that differs is 'quantize_dequantize", INT8),
    ],
)
def test_damage_is_found_in_float16_too(
    for_tensorrt, tmp_path, monkeypatch, constant, place, eight_bit
):
    build_onnx = onnx_file.build_onnx

    def broken(*args, **options):
        built = build_onnx(*args, **options)
        (found,) = [c for c in built.proto.graph.initializer if c.name == constant]
        array = numpy_helper.to_array(found)
        array = array[::-1] if array.ndim else array * np.float16(0.1)
        found.CopyFrom(numpy_helper.from_array(np.asarray(array, order="C"), constant))
        return built

    monkeypatch.setattr(onnx_file, "build_onnx", broken)
    with pytest.raises(ExportError, match=f"differs from the PyTorch model.*{place}"):
        for_tensorrt.model(Residual, "2:4+w8a8").export(tmp_path / "out", tensorrt(FP16, eight_bit))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "precision", "eight_bit"),
    [(Residual, FP16, INT8), (Residual, FP32, FP8), (Transformer, BF16, INT8)],
)
def test_rounding_alone_passes_layer_by_layer(
    for_tensorrt, tmp_path, monkeypatch, kind, precision, eight_bit
):
    # No error at all is allowed end to end, so that every layer is looked at.
    monkeypatch.setattr(parity, "QUANTIZED_TOLERANCE", -1.0)
    goal = tensorrt(precision, eight_bit)
    artifact = for_tensorrt.model(kind, "2:4+w8a8").export(tmp_path, goal)
    assert artifact.manifest.parity["layerwise"] is True


def test_a_session_is_compared_with_the_simulated_network(for_tensorrt):
    # The same function compares engines; here ONNX Runtime stands in place of the GPU.
    model, artifact = (
        made(Residual, "2:4+w8a8") for made in (for_tensorrt.model, for_tensorrt.file)
    )
    batches = sample_batches(model, 4)[:3]
    with open_session("onnxruntime", artifact.path, threads=1) as session:
        found = compare_outputs(session, model, tensorrt(), batches)
        other = compare_outputs(session, for_tensorrt.model(Residual, "dense"), tensorrt(), batches)
        with pytest.raises(RuntimeFailedError, match="computes on the CPU"):
            device_latency(session, batches[0])
    assert (found.samples, found.runtime) == (12, "onnxruntime")
    assert 0 < found.relative_error < found.tolerance
    assert found.agreement > 0.9
    assert other.relative_error > found.relative_error


@pytest.mark.parametrize("kind", [Depthwise, Upsampling])
def test_other_networks(tmp_path, kind):
    model = compress(build(kind), samples(kind), scheme="w8a8", method="rtn", baselines=False)
    artifact = model.export(tmp_path, "tensorrt")
    assert artifact.manifest.precision == "float16"
    assert refusals(onnx.load(artifact.path)) == ()


def model_of(nodes, arrays):
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


STEP = np.float32(0.1)


@pytest.mark.parametrize(
    ("operator", "inputs", "arrays", "reason"),
    [
        ("QuantizeLinear", "x s z", {"s": STEP, "z": np.uint8(0)}, "uint8 codes"),
        ("QuantizeLinear", "x s", {"s": STEP}, "uint8 codes"),
        ("QuantizeLinear", "x s z", {"s": STEP, "z": np.int8(3)}, "zero point that is not zero"),
        ("QuantizeLinear", "x s z", {"s": np.float32(0), "z": np.int8(0)}, "scale that is zero"),
        (
            "QuantizeLinear", "x s z", {"s": np.float32("nan"), "z": np.int8(0)}, "not finite",
        ),
        ("QuantizeLinear", "x x z", {"z": np.int8(0)}, "scale that is computed"),
        ("DequantizeLinear", "b s", {"b": np.zeros(4, np.int32), "s": STEP}, "int32 codes"),
        ("DequantizeLinear", "b s", {"b": np.zeros(4, np.uint8), "s": STEP}, "uint8 codes"),
        ("MatMulInteger", "x w", {"w": np.zeros((8, 8), np.int8)}, "computes on integers"),
        ("MatMulNBits", "x w", {"w": np.zeros((8, 8), np.uint8)}, "computes on integers"),
        ("QLinearConv", "x w", {"w": np.zeros((8, 8), np.int8)}, "computes on integers"),
    ],
)  # fmt: skip
def test_what_tensorrt_would_refuse_or_misread_is_named(operator, inputs, arrays, reason):
    node = helper.make_node(operator, inputs.split(), ["y"], name="odd")
    (found,) = refusals(model_of([node], arrays))
    assert found.startswith(f"'odd' ({operator})")
    assert reason in found


def test_symmetric_quantizers_are_not_refused():
    pair = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    assert refusals(model_of(pair, {"s": STEP, "z": np.int8(0)})) == ()
