"""Files with our sparse operators: what they compute, what they store, and where they convert."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exported import constants, operators, places_in, relative
from exported import run as run_plain
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import Concatenation, Depthwise, Plain, Residual, Sequence1d, samples
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from obc_deploy.artifacts import load_artifact, manifest_path
from obc_deploy.cli import app
from obc_deploy.commands.export import _smaller
from obc_deploy.compiled_library import missing
from obc_deploy.compression import compress
from obc_deploy.errors import ExportError, RuntimeFailedError, RuntimeMissingError
from obc_deploy.exporters import (
    blocked_layout,
    frames,
    operator_costs,
    parity,
    sparse_linear,
)
from obc_deploy.exporters.cheapest_forms import Choice, Passing, cheapest_forms
from obc_deploy.exporters.exporter_checksum import exporter_checksum
from obc_deploy.exporters.operator_costs import COSTS, costs_of, deciding_costs, processor_here
from obc_deploy.exporters.rewritten_file import rewrite_onnx
from obc_deploy.exporters.sparse_blocks import stored_blocks
from obc_deploy.exporters.sparse_cost import COUNTS, Work, nanoseconds
from obc_deploy.exporters.sparse_onnxruntime import zero_blocks
from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.audit import (
    Expectation,
    audit_artifact,
    count_accelerated,
    random_inputs,
)
from obc_deploy.runtimes.regions import REGION, separated
from obc_deploy.runtimes.session import open_session
from obc_deploy.targets import ORT_SPARSE, TARGETS, Processor

QOPERATOR, SPARSE = "onnxruntime-qoperator", "ort-sparse"
pytestmark = pytest.mark.skipif(
    not sparse.is_available(), reason=f"sparse kernels: {sparse.why_missing() or 'there'}"
)
COUNT = 4


class Shortcut(nn.Module):
    """A residual block whose shortcut takes every second pixel and adds channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = functional.relu(self.first(x))
        aside = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = functional.relu(self.third(functional.relu(self.second(x))) + aside)
        x = functional.relu(self.last(x))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Bottlenecks(nn.Module):
    """Convolutions of planes of 14x14 and 7x7 pixels, which end within a cache line."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 24, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(24, 8, 1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 24, 1)
        self.narrow_again = nn.Conv2d(24, 12, 1)
        self.halved = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.aside = nn.Conv2d(24, 12, 1)
        self.beside = nn.Conv2d(24, 16, 1, stride=2)
        self.last = nn.Conv2d(28, 20, 1)
        self.head = nn.Linear(20, 10)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        y = functional.relu(self.middle(functional.relu(self.narrow(x))))
        x = functional.relu(self.wide(y) + x)
        y = functional.relu(self.halved(functional.relu(self.narrow_again(x))))
        y = functional.relu(y + self.beside(x))
        pooled = functional.max_pool2d(functional.relu(self.aside(x)), 2)
        y = functional.relu(self.last(torch.cat([y, pooled], dim=1)))
        return self.head(functional.adaptive_avg_pool2d(y, 1).flatten(1))


def run(path, x):
    """The first output, with our library."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(sparse.library_path()))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def force(patch):
    patch.setattr(blocked_layout, "cheapest_forms", lambda choices, _: [True] * len(choices))
    patch.setattr(sparse_linear, "_cheaper", lambda *_: True)


@pytest.fixture
def everywhere(monkeypatch):
    """Sparse kernels wherever there is one: tiny layers gain nothing from them."""
    force(monkeypatch)


@pytest.fixture(scope="session")
def exported(compressed, tmp_path_factory):
    """`exported(kind, level)`: a model and its file with sparse kernels everywhere."""
    made = {}

    def export(kind, level=0.5):
        if (kind, level) not in made:
            model = blocks(compressed, kind, level)
            with pytest.MonkeyPatch.context() as patch:
                force(patch)
                folder = tmp_path_factory.mktemp(kind.__name__)
                made[kind, level] = model, model.export(folder, target=SPARSE, dynamic_batch=True)
        return made[kind, level]

    return export


def blocks(compressed, kind, level=0.5, bits="w8a8", **options):
    return compressed(kind, f"block4@{level}+{bits}", fallback=bits, **options)


def shortcut(level=0.5):
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((32, 4, 8, 8), dtype=np.float32)
    model = compress(
        Shortcut().eval(), x, scheme=f"block4@{level}+w8a8", method="rtn", baselines=False
    )
    return model, x


@pytest.mark.parametrize(
    ("kind", "level"),
    [(Residual, 0.5), (Residual, 0.9), (Depthwise, 0.5), (Concatenation, 0.5), (Plain, 0.9)],
)
def test_outputs_are_the_simulations(exported, kind, level):
    model, artifact = exported(kind, level)
    assert operators(artifact.path)["SparseConvolution"] >= 2
    assert not {"QLinearConv", "QGemm", "QLinearAdd"} & set(operators(artifact.path))
    x = samples(kind, COUNT, seed=5)
    with torch.no_grad():
        wanted = model.module(SPARSE)(torch.from_numpy(x)).numpy()
    errors = [relative(a, b) for a, b in zip(run(artifact.path, x), wanted, strict=True)]
    # A sum on a rounding boundary may land a step apart, as in every integer file.
    assert max(errors) < 3e-2
    assert min(errors) < 1e-5


@pytest.mark.parametrize(("level", "bits"), [(0.5, "w8a8"), (0.9, "w4a8"), (0.5, "w8a4")])
def test_convolutions_are_onnx_runtimes_bit_for_bit(
    compressed, tmp_path, everywhere, monkeypatch, level, bits
):
    monkeypatch.setattr(sparse_linear, "_cheaper", lambda *_: False)
    model = blocks(compressed, Plain, level, bits)
    plain = model.export(tmp_path / "a", target=QOPERATOR, batch_size=COUNT, check=False)
    ours = model.export(tmp_path / "b", target=SPARSE, batch_size=COUNT, check=False)
    assert operators(ours.path)["SparseConvolution"] == 2
    x = samples(Plain, COUNT, seed=7)
    np.testing.assert_array_equal(run(ours.path, x), run_plain(plain.path, x))


def test_a_residual_is_the_separate_operators_bit_for_bit(exported, tmp_path):
    # With the addition in float, as ONNX defines it: QLinearAdd rounds otherwise.
    model, ours = exported(Residual)
    apart = replace(
        TARGETS[QOPERATOR], integer_operators=TARGETS[QOPERATOR].integer_operators - {"Add"}
    )
    plain = model.export(tmp_path, target=apart, batch_size=COUNT, check=False)
    assert operators(plain.path)["Add"] == 1
    assert not {"Add", "QLinearAdd"} & set(operators(ours.path))
    fused = [
        node
        for node in separated(onnx.load(ours.path)).graph.node
        if node.op_type == "SparseConvolution" and len(node.input) == 6
    ]
    assert len(fused) == 1
    x = samples(Residual, COUNT, seed=3)
    found, wanted = run(ours.path, x), run_plain(plain.path, x)
    # All but the logits, which our kernel scales in another order, are integers.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_shortcut_of_slices_and_pads_stays_blocked(tmp_path, everywhere):
    model, x = shortcut()
    artifact = model.export(tmp_path / "a", target=SPARSE, batch_size=COUNT)
    found = operators(artifact.path)
    assert found["SparseConvolution"] == 5  # with that of ones
    assert not {"Slice", "Pad", "Add", "Relu", "DequantizeLinear", "ToBlocks"} & set(found)
    plain = model.export(tmp_path / "b", target=QOPERATOR, batch_size=COUNT, check=False)
    np.testing.assert_allclose(
        run(artifact.path, x[:COUNT]), run_plain(plain.path, x[:COUNT]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", [Residual, Depthwise, Concatenation])
def test_conversions_are_at_the_edges(exported, kind):
    path = exported(kind)[1].path
    found = operators(path)
    back_from = {"FromBlocks", "DequantizeFromBlocks"}
    assert (found["QuantizeToBlocks"], found["ToBlocks"]) == (1, 0)
    assert sum(found[name] for name in back_from) == 1
    nodes = list(separated(onnx.load(path)).graph.node)
    assert nodes[0].op_type == "QuantizeToBlocks"
    back = next(place for place, node in enumerate(nodes) if node.op_type in back_from)
    assert all(node.domain == sparse.DOMAIN for node in nodes[:back])


def attribute(node, name, default=0):
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


@pytest.mark.parametrize("kind", [Residual, Depthwise, Concatenation, Plain])
def test_borders_are_the_widest_padding_of_the_readers(exported, kind):
    nodes = separated(onnx.load(exported(kind)[1].path)).graph.node
    made = {node.output[0]: node for node in nodes if node.domain == sparse.DOMAIN}
    needed = Counter()
    for node in made.values():
        if node.op_type in {"SparseConvolution", "DepthwiseConvolution"}:
            source = node.input[0]
            needed[source] = max(needed[source], max(attribute(node, "pads")))
            assert attribute(node, "input_border") == attribute(made[source], "border")
    assert needed
    for node in made.values():
        if node.output[0].endswith("_blocked"):
            assert attribute(node, "border") == needed[node.output[0]]


def frames_read(node):
    """Border and margin of each blocked input, by its name."""
    if node.op_type in {"Add", "Concat"}:
        count = len(node.input)
        borders = attribute(node, "input_borders", [0] * count)
        margins = attribute(node, "input_margins", [0] * count)
        return dict(zip(node.input, zip(borders, margins, strict=True), strict=True))
    if not attribute(node, "channels"):
        return {}  # reads no blocked tensor
    found = {node.input[0]: (attribute(node, "input_border"), attribute(node, "input_margin"))}
    if len(node.input) > 5:
        frame = attribute(node, "residual_border"), attribute(node, "residual_margin")
        found[node.input[5]] = frame
    return found


def test_planes_that_end_within_a_line_get_a_margin(everywhere, monkeypatch, tmp_path):
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((16, 4, 28, 28), dtype=np.float32)
    model = compress(
        Bottlenecks().eval(), x, scheme="block4@0.5+w8a8", method="rtn", baselines=False
    )
    path = model.export(tmp_path / "with", target=SPARSE, dynamic_batch=True).path
    nodes = [node for node in separated(onnx.load(path)).graph.node if node.domain == sparse.DOMAIN]
    made = {
        node.output[0]: (attribute(node, "border"), attribute(node, "margin")) for node in nodes
    }
    read = [pair for node in nodes for pair in frames_read(node).items()]
    assert read
    for name, frame in read:
        assert frame == made[name]
    read_in_place = {
        node.input[0]
        for node in nodes
        if node.op_type == "SparseConvolution"
        and attribute(node, "kernel_shape") == attribute(node, "strides", [1, 1]) == [1, 1]
    }
    margins = Counter(made[name][1] for name in read_in_place if made[name][0] == 0)
    assert set(margins) == {2, 9}  # 16 rows of 14 pixels, 16 rows of 7
    assert all(margin == 0 for name, (_, margin) in made.items() if name not in read_in_place)
    with monkeypatch.context() as patch:
        patch.setattr(frames, "margin_of", lambda *_: 0)
        plain = model.export(tmp_path / "without", target=SPARSE, dynamic_batch=True).path
    assert not any(attribute(node, "margin") for node in separated(onnx.load(plain)).graph.node)
    with torch.no_grad():
        wanted = model.module(SPARSE)(torch.from_numpy(x)).numpy()
    for images in (1, 3, 16):
        outputs = run(path, x[:images])
        np.testing.assert_array_equal(outputs, run(plain, x[:images]))
        assert relative(outputs, wanted[:images]) < 3e-2


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_only_blocks_with_weights_are_stored(exported, level):
    model, artifact = exported(Plain, level)
    stored = constants(artifact.path)
    for layer in model.layers:
        values = stored[f"{layer.name}.weight_codes_blocks"]
        mask = model.forms[layer.name].mask
        assert values.dtype == np.int8
        assert values.any(axis=1).all()
        assert len(values) <= int(mask.sum()) // 4
        assert f"{layer.name}.weight_codes" not in stored
    sizes = [exported(Plain, each)[1].size_bytes for each in (0.5, 0.9)]
    assert sizes[1] < sizes[0]
    dense = exported(Plain, level)[1].manifest.dense_size_bytes
    assert dense == artifact.manifest.dense_size_bytes > 0


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [(Plain, "2:4+w8a8"), *((kind, "w8a8") for kind in (Plain, Residual, Concatenation))],
)
def test_layers_without_zero_blocks_compute_the_same(
    compressed, tmp_path, everywhere, kind, scheme
):
    model = compressed(kind, scheme)
    ours = model.export(tmp_path / "a", target=SPARSE)
    plain = model.export(tmp_path / "b", target=QOPERATOR, check=False)
    assert operators(ours.path)["SparseConvolution"] >= 2
    assert "QLinearConv" not in operators(ours.path)
    x = samples(kind, COUNT, seed=5)
    np.testing.assert_array_equal(run(ours.path, x[:1]), run_plain(plain.path, x[:1]))
    assert not any(layer.sparse for layer in ours.manifest.layers) or scheme == "2:4+w8a8"


@pytest.mark.parametrize("scheme", ["w8a8", "dense", "2:4+w8a8"])
def test_networks_that_gain_nothing_are_onnx_runtimes(compressed, tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(blocked_layout, "cheapest_forms", lambda choices, _: [False] * len(choices))
    model = compressed(Plain, scheme)
    ours = model.export(tmp_path / "a", target=SPARSE, check=False)
    plain = model.export(tmp_path / "b", target=QOPERATOR, check=False)
    assert ours.path.read_bytes() == plain.path.read_bytes()
    assert ours.manifest.dense_size_bytes is None


def test_what_has_no_sparse_kernel_stays_dense(compressed, tmp_path, everywhere):
    # One-dimensional convolutions have no blocked form; the head does.
    model = blocks(compressed, Sequence1d, 0.5)
    found = operators(model.export(tmp_path / "a", target=SPARSE).path)
    assert found["QLinearConv"] == 2
    assert found["SparseLinearDequantize"] == 1
    assert not {"SparseConvolution", "ToBlocks"} & set(found)


def test_tiny_layers_stay_where_they_are_faster(compressed, tmp_path):
    # Unforced: a layer of ten outputs is not worth its conversion.
    model = blocks(compressed, Concatenation, 0.5)
    x = samples(Concatenation, COUNT, seed=5)
    artifact = model.export(tmp_path, target=SPARSE, batch_size=COUNT)
    with torch.no_grad():
        wanted = model.module(SPARSE)(torch.from_numpy(x)).numpy()
    assert relative(run(artifact.path, x), wanted) < 3e-2


def test_a_dynamic_batch(exported):
    model, artifact = exported(Residual)
    for count in (1, 3, 8):
        x = samples(Residual, count, seed=9)
        with torch.no_grad():
            wanted = model.module(SPARSE)(torch.from_numpy(x)).numpy()
        assert relative(run(artifact.path, x), wanted) < 1e-2


def test_parity_looks_into_blocked_values(compressed, tmp_path, everywhere, monkeypatch):
    monkeypatch.setattr(parity, "QUANTIZED_TOLERANCE", -1.0)
    model = blocks(compressed, Residual, 0.5)
    artifact = model.export(tmp_path / "a", target=SPARSE)
    assert artifact.manifest.parity["layerwise"] is True


def test_a_damaged_block_is_found_and_its_layer_named(
    compressed, tmp_path, everywhere, monkeypatch
):
    from obc_deploy.exporters import onnx_file

    build_onnx = onnx_file.build_onnx

    def broken(*args, **options):
        built = build_onnx(*args, **options)
        name = "second.weight_codes_blocks"
        (found,) = [c for c in built.proto.graph.initializer if c.name == name]
        array = np.ascontiguousarray(numpy_helper.to_array(found)[::-1])
        found.CopyFrom(numpy_helper.from_array(array, name))
        return built

    monkeypatch.setattr(onnx_file, "build_onnx", broken)
    with pytest.raises(ExportError, match="layer that differs is 'second'"):
        blocks(compressed, Residual, 0.5).export(tmp_path, target=SPARSE)
    assert list(tmp_path.iterdir()) == []


def test_sessions_load_the_library_and_the_audit_counts_the_zeros(exported):
    model, artifact = exported(Residual, 0.9)
    x = samples(Residual, 1, seed=2)
    name = model.network.input_names[0]
    with open_session("onnxruntime", artifact.path, threads=1) as session:
        (found,) = session.run({name: x}).values()
    np.testing.assert_array_equal(found, run(artifact.path, x))
    audited = audit_artifact("onnxruntime", artifact.path, {name: x}, threads=1)
    expected = {
        layer.name: Expectation(layer.output, layer.sparse, layer.int8)
        for layer in artifact.manifest.layers
    }
    counted = count_accelerated(audited, expected)
    assert (counted.accelerated, counted.total) == (4, 4)
    assert (counted.sparse, counted.int8) == (3, 4)  # the first has three input channels
    skipped = {layer.outputs[0]: layer.kernel_sparsity for layer in audited.layers}
    for layer in artifact.manifest.layers:
        if layer.sparse:
            blocks_there = model.forms[layer.name].mask.reshape(-1, 4).any(1)
            assert skipped[layer.output] >= 1 - float(blocks_there.float().mean()) - 1e-6
    assert not audited.fallback
    assert not audited.reasons
    nodes = onnx.load(artifact.path).graph.node
    (region,) = (node.name for node in nodes if node.op_type == "Region")
    for layer in audited.layers:
        assert layer.region == (region if layer.operator == "SparseConvolution" else None)


def test_without_the_library(exported, tmp_path, everywhere, monkeypatch):
    model, artifact = exported(Residual)
    found = missing("not built: install a C++17 compiler")
    monkeypatch.setattr(sparse, "_find", lambda: found)
    with pytest.raises(RuntimeFailedError, match=r"sparse kernels.*install a C\+\+17 compiler"):
        open_session("onnxruntime", artifact.path, threads=1)
    with pytest.raises(RuntimeMissingError, match=r"sparse kernels.*install a C\+\+17 compiler"):
        model.export(tmp_path / "b", target=SPARSE)
    assert not (tmp_path / "b").exists() or list((tmp_path / "b").iterdir()) == []
    with pytest.raises(RuntimeMissingError, match="target onnxruntime"):
        rewrite_onnx(artifact.path, tmp_path / "c.onnx", ORT_SPARSE)
    from obc_deploy.benchmarks.comparison import working_targets

    assert SPARSE not in working_targets()


HOST = """
import sys
import numpy
import onnxruntime

model, library, x, y = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
numpy.save(y, session.run(None, {session.get_inputs()[0].name: numpy.load(x)})[0])
assert not any(name.startswith("obc_deploy") for name in sys.modules)
"""


def test_file_and_library_are_all_that_another_host_needs(compressed, tmp_path):
    """A process without this package, in a folder that holds the two files and nothing else."""
    model = blocks(compressed, Residual, 0.8)
    plain = model.export(tmp_path / "plain.onnx", target=QOPERATOR, check=False).path
    file = tmp_path / "shipped" / "model.onnx"
    answer = CliRunner().invoke(
        app, ["export", str(plain), "-o", str(file), "--no-timing", "--json", "-"]
    )
    assert answer.exit_code == 0, answer.output
    library = file.with_name("libobc_sparse.so")
    assert json.loads(answer.stdout)["library"] == str(library)
    assert sorted(file.parent.iterdir()) == [library, file]
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    with open_session("onnxruntime", plain, threads=1) as session:
        inputs = random_inputs(session.inputs, 1)
        (expected,) = session.run(inputs).values()
    np.save(x, next(iter(inputs.values())))
    moved = file.parent.rename(tmp_path / "elsewhere")
    subprocess.run(
        [sys.executable, "-I", "-c", HOST, moved / file.name, moved / library.name, x, y],
        check=True,
        cwd=moved,
        env={},
    )
    np.testing.assert_allclose(np.load(y), expected, rtol=1e-6)


def test_a_library_that_cannot_be_put_there_is_an_error(compressed, tmp_path):
    model = blocks(compressed, Residual, 0.8)
    plain = model.export(tmp_path / "plain.onnx", target=QOPERATOR, check=False).path
    (tmp_path / "libobc_sparse.so").mkdir()
    answer = CliRunner().invoke(
        app, ["export", str(plain), "-o", str(tmp_path / "new.onnx"), "--no-timing"]
    )
    assert isinstance(answer.exception, ExportError)
    assert "cannot put the sparse operators beside" in str(answer.exception)
    assert "new.onnx" in str(answer.exception)


def test_the_processor_that_is_named_decides(compressed, tmp_path, monkeypatch):
    """Were dense operators slow on one of them, and sparse ones on the other."""

    def slower(costs, sparse):
        return {
            name: {
                count: cost * (1000 if name.startswith("Sparse") == sparse else 1)
                for count, cost in counts.items()
            }
            for name, counts in costs.items()
        }

    costs = {
        Processor.CASCADE_LAKE: slower(operator_costs.CASCADE_LAKE, sparse=False),
        Processor.ZEN_4: slower(operator_costs.ZEN_4, sparse=True),
    }
    monkeypatch.setattr(operator_costs, "COSTS", costs)
    model = blocks(compressed, Residual, 0.8)
    plain = model.export(tmp_path, target=QOPERATOR, check=False).path
    answers = {
        name: CliRunner().invoke(
            app,
            [
                "export",
                str(plain),
                "-o",
                str(tmp_path / f"{name}.onnx"),
                "--processor",
                name,
                "--no-timing",
            ],
        )
        for name in ("cascade-lake", "zen-4")
    }
    assert answers["cascade-lake"].exit_code == 0, answers["cascade-lake"].output
    assert operators(tmp_path / "cascade-lake.onnx")["SparseConvolution"]
    assert isinstance(answers["zen-4"].exception, ExportError)
    assert "gets faster on our operators" in str(answers["zen-4"].exception)
    refused = CliRunner().invoke(
        app, ["export", str(plain), "-t", "onnxruntime", "--processor", "zen-4"]
    )
    assert isinstance(refused.exception, ExportError)
    assert "--processor zen-4 is for --target ort-sparse" in str(refused.exception)


def test_a_file_says_whose_costs_decided_and_is_made_anew_for_another_processor(
    compressed, tmp_path
):
    """A run that was measured on one machine, and then on one of another kind."""
    from obc_deploy.benchmarks.comparison import _artifact

    model = blocks(compressed, Residual, 0.8)
    here = processor_here()
    (elsewhere,) = set(Processor) - {here}
    target = TARGETS[SPARSE]
    file = tmp_path / "model.onnx"
    made = _artifact(model, file, replace(target, processor=elsewhere), 1)
    assert made.manifest.processor == elsewhere.value
    again = _artifact(model, file, target, 1)
    assert again.manifest.processor == here.value
    stamp = file.stat().st_mtime_ns
    assert _artifact(model, file, target, 1) == again
    assert file.stat().st_mtime_ns == stamp
    plain = _artifact(model, tmp_path / "plain.onnx", TARGETS["onnxruntime"], 1)
    assert plain.manifest.processor is None


@pytest.mark.parametrize("target", ["onnxruntime", SPARSE])
def test_a_file_of_another_exporter_is_made_anew(compressed, tmp_path, target):
    """A run that was measured, and then again with a newer version of the package."""
    from obc_deploy.benchmarks.comparison import _artifact

    model, file = blocks(compressed, Plain, 0.8), tmp_path / "model.onnx"
    made = _artifact(model, file, TARGETS[target], 1)
    assert made.manifest.exporter == exporter_checksum(TARGETS[target])
    older = made.manifest.model_copy(update={"exporter": "0" * 64})
    manifest_path(file).write_text(older.model_dump_json())
    assert load_artifact(file).manifest == older
    assert _artifact(model, file, TARGETS[target], 1).manifest == made.manifest
    assert load_artifact(file).manifest == made.manifest


def test_a_file_without_regions_of_the_version_before_them_runs(compressed, tmp_path, everywhere):
    model, file = blocks(compressed, Plain, 0.8), tmp_path / "model.onnx"
    model.export(file, target=TARGETS[SPARSE])
    x = samples(Plain, 1, seed=8)
    wanted = run(file, x)
    whole = onnx.load(file)
    assert REGION in {node.op_type for node in whole.graph.node}
    proto = separated(whole)
    for each in proto.opset_import:
        if each.domain == sparse.DOMAIN:
            each.version = sparse.OLDEST_DOMAIN_VERSION
    onnx.save(proto, file)
    np.testing.assert_array_equal(run(file, x), wanted)
    with open_session("onnxruntime", file, threads=1) as session:
        (found,) = session.run({session.inputs[0].name: x}).values()
    np.testing.assert_array_equal(found, wanted)


def test_a_file_of_another_version_of_the_operators_is_refused(compressed, tmp_path, everywhere):
    model, file = blocks(compressed, Plain, 0.8), tmp_path / "model.onnx"
    model.export(file, target=TARGETS[SPARSE])
    proto = onnx.load(file)
    assert {each.domain: each.version for each in proto.opset_import}[sparse.DOMAIN] == (
        sparse.DOMAIN_VERSION
    )
    before = sparse.OLDEST_DOMAIN_VERSION - 1
    for each in proto.opset_import:
        if each.domain == sparse.DOMAIN:
            each.version = before
    onnx.save(proto, file)
    with pytest.raises(
        RuntimeFailedError,
        match=f"version {before} of our sparse operators.*version {sparse.DOMAIN_VERSION} here.*"
        "export it again",
    ):
        open_session("onnxruntime", file, threads=1)


@pytest.mark.parametrize(("channels", "group", "counts"), [(1, 1, True), (8, 8, False)])
def test_a_layer_of_one_input_channel_is_no_depthwise_one(channels, group, counts):
    codes = numpy_helper.from_array(np.ones((8, 1, 3, 3), np.int8), "w")
    scale, zero = np.float32(1.0), np.uint8(0)
    names = ["x", "s", "z", "w", "s", "wz", "s", "z"]
    constants = {"s": scale, "z": zero, "wz": np.int8(0)}
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", names, ["y"], group=group)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, channels, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 8, 6, 6])],
        [codes, *(numpy_helper.from_array(np.array(v), k) for k, v in constants.items())],
    )
    found = zero_blocks(ir.from_proto(helper.make_model(graph)))
    assert found == ({"y": 0.0} if counts else {})


@pytest.mark.parametrize(("source", "dynamic"), [(QOPERATOR, False), ("onnxruntime", True)])
def test_an_onnx_file_from_elsewhere(compressed, tmp_path, everywhere, source, dynamic):
    model = blocks(compressed, Residual, 0.8)
    given = model.export(tmp_path, target=source, dynamic_batch=dynamic, check=False)
    made = tmp_path / "made.onnx"
    answer = CliRunner().invoke(
        app,
        ["export", str(given.path), "-t", SPARSE, "-o", str(made), "--json", str(made) + ".json",
         "--threads", "1"],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert "as fast as the original here" in answer.output
    told = json.loads((tmp_path / "made.onnx.json").read_text())
    assert len(told["layers"]) == told["integer_layers"] == 4
    assert told["size_bytes"] == made.stat().st_size
    assert told["relative_error"] < 1e-2
    assert told["processor"] == processor_here().value
    timing = told["timing"]
    assert timing["threads"] == timing["batch_size"] == 1
    assert timing["interval"][0] <= timing["speedup"] <= timing["interval"][1]
    assert timing["after_ms"] > 0
    assert timing["before_ms"] > 0
    proto = onnx.load(made)
    onnx.checker.check_model(proto, full_check=True)
    assert operators(made)["SparseConvolution"] == 3
    for count in (1, 3) if dynamic else (1,):
        x = samples(Residual, count, seed=8)
        assert relative(run(made, x), run_plain(given.path, x)) < 1e-2
    with pytest.raises(ExportError, match=r"'made\.onnx' is on sparse operators already"):
        rewrite_onnx(made, tmp_path / "twice.onnx", TARGETS[SPARSE])


def quantized_by_onnx_runtime(tmp_path, activations):
    """A convolution with zero blocks in ONNX Runtime's own QDQ form."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 2, 4, 3, 3)) * (rng.random((8, 2, 1, 3, 3)) > 0.6)
    weight = weight.reshape(8, 8, 3, 3).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4, kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "float",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 6, 6])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.zeros(8, np.float32), "b"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "f.onnx")

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = [rng.standard_normal((1, 8, 6, 6)).astype(np.float32) for _ in range(4)]

        def get_next(self):
            return {"x": self.left.pop()} if self.left else None

    quantize_static(
        tmp_path / "f.onnx", tmp_path / "q.onnx", Reader(), quant_format=QuantFormat.QDQ,
        activation_type=getattr(QuantType, activations), weight_type=QuantType.QInt8,
        per_channel=True,
    )  # fmt: skip
    return tmp_path / "q.onnx"


def test_a_dense_file_from_elsewhere_is_not_said_to_be_sparse(compressed, tmp_path, everywhere):
    given = compressed(Residual).export(tmp_path, target=QOPERATOR, check=False)
    made = tmp_path / "made.onnx"
    answer = CliRunner().invoke(
        app, ["export", str(given.path), "-t", SPARSE, "-o", str(made), "--no-timing"]
    )
    assert answer.exit_code == 0, answer.output
    said = " ".join(answer.output.split())
    assert " of 4 layers on our kernels" in said
    assert "without their zeros" not in said
    assert operators(made)["SparseConvolution"] == 3


@pytest.mark.parametrize(
    ("found", "said"), [(500, "2.00x smaller than"), (1000, "no smaller"), (1003, "no smaller")]
)
def test_how_much_smaller_a_file_is(found, said):
    assert _smaller(found, 1000).startswith(said)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_files_that_onnx_runtime_quantized(tmp_path, everywhere, activations):
    given = quantized_by_onnx_runtime(tmp_path, activations)
    made = rewrite_onnx(given, tmp_path / "out", ORT_SPARSE)
    assert made.path == tmp_path / "out" / "q.onnx"
    assert operators(made.path)["SparseConvolution"] == 1
    assert made.layers[0][1] > 0.4
    x = np.random.default_rng(1).standard_normal((1, 8, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(made.path, x), run_plain(given, x), atol=1e-6)


def test_files_that_gain_nothing(compressed, tmp_path):
    # One-dimensional convolutions have no blocked form.
    dense = compressed(Sequence1d).export(tmp_path / "a", target=QOPERATOR, check=False)
    with pytest.raises(ExportError, match=r"no layer of 'model\.onnx' gets faster.*block4@0\.5"):
        rewrite_onnx(dense.path, tmp_path / "b.onnx", ORT_SPARSE)
    floats = compressed(Plain, "dense").export(tmp_path / "c", target=QOPERATOR, check=False)
    with pytest.raises(ExportError, match=r"no integer layer.*QOperator form"):
        rewrite_onnx(floats.path, tmp_path / "d.onnx", ORT_SPARSE)
    with pytest.raises(ExportError, match="--target ort-sparse"):
        rewrite_onnx(dense.path, tmp_path / "e.onnx", TARGETS["deepsparse"])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "c"]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_stored_blocks_give_the_weights_back(data):
    shape = [data.draw(st.integers(1, 6)) for _ in range(4)]
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    codes = (rng.integers(-127, 128, shape) * (rng.random(shape) < 0.3)).astype(np.int8)
    stored = stored_blocks(codes)
    outputs, channels, height, width = shape
    many = -(-channels // 4)
    again = np.zeros((outputs, height, width, many * 4), np.int8)
    values = iter(stored.values)
    for output, places in enumerate(places_in(stored.mask)):
        for place in places:
            position, block = divmod(place, many)
            y, x = divmod(position, width)
            again[output, y, x, 4 * block : 4 * block + 4] = next(values)
    assert next(values, None) is None
    np.testing.assert_array_equal(again[..., :channels].transpose(0, 3, 1, 2), codes)
    assert not again[..., channels:].any()
    assert stored.places == outputs * many * height * width
    assert 0.0 <= stored.zeros <= 1.0


def total(choices, passed, blocked):
    """The cost of one assignment, by definition."""
    form = [*blocked]
    found = sum(c.blocked if b else c.plain for c, b in zip(choices, form, strict=True))
    for value in passed:
        made = value.maker is not None and form[value.maker]
        read = [reader is not None and form[reader] for reader in value.readers]
        found += value.to_blocks if not made and any(read) else 0
        found += value.from_blocks if made and not all(read) else 0
    return found


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_the_cheapest_forms_are_the_cheapest(data):
    count = data.draw(st.integers(1, 6))
    cost = st.integers(0, 80).map(lambda each: each * 10.0)
    choices = [Choice(data.draw(cost), data.draw(cost)) for _ in range(count)]
    place = st.one_of(st.none(), st.integers(0, count - 1))
    passed = [
        Passing(
            data.draw(place), tuple(data.draw(st.lists(place, min_size=1, max_size=3))),
            data.draw(cost), data.draw(cost),
        )
        for _ in range(data.draw(st.integers(0, 6)))
    ]  # fmt: skip
    least = min(
        total(choices, passed, each) for each in itertools.product([False, True], repeat=count)
    )
    assert total(choices, passed, cheapest_forms(choices, passed)) == least


@pytest.mark.parametrize("processor", Processor)
def test_costs_grow_with_what_is_stored(processor):
    costs = COSTS[processor]
    assert set(costs) == set(COUNTS)
    assert all(set(counts) <= set(COUNTS[name]) for name, counts in costs.items())

    def cost(zeros):
        work = Work.of_convolution(
            pixels=196, in_pixels=196, channels=256, outputs=256, positions=9,
            blocks=int(256 * 64 * 9 * (1 - zeros)),
        )  # fmt: skip
        assert set().union(*COUNTS.values()) - set(work.counts) <= {
            "elements", "taps", "lanes", "lines", "lane_taps", "line_taps",
        }  # fmt: skip
        return nanoseconds("SparseConvolution", work), nanoseconds("QLinearConv", work)

    with costs_of(processor):
        levels = [cost(zeros) for zeros in (0.0, 0.5, 0.8, 0.9)]
    assert all(a[0] > b[0] and a[1] == b[1] for a, b in itertools.pairwise(levels))
    assert levels[-1][0] < levels[-1][1]


def test_costs_are_this_machines_where_no_other_is_named():
    assert deciding_costs() is COSTS[processor_here()]
    with costs_of(Processor.CASCADE_LAKE):
        assert deciding_costs() is COSTS[Processor.CASCADE_LAKE]
        with costs_of(Processor.ZEN_4):
            assert deciding_costs() is COSTS[Processor.ZEN_4]
        with costs_of(None):
            assert deciding_costs() is COSTS[processor_here()]
        assert deciding_costs() is COSTS[Processor.CASCADE_LAKE]


@pytest.mark.parametrize("kind", [Residual, Concatenation])
def test_versions_and_checker(exported, kind):
    path = exported(kind)[1].path
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert ir.load(path).graph.opset_imports[sparse.DOMAIN] == sparse.DOMAIN_VERSION
