"""What is in an exported file: the solver's codes, the target's operators, nothing unchecked."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from exported import constants, operators, relative, run
from onnx import numpy_helper
from tiny_networks import Depthwise, FixedBatch, Plain, Residual, Twins, build, samples

from obc_deploy import exporters
from obc_deploy.artifacts import load_artifact
from obc_deploy.compression import compress
from obc_deploy.errors import ArtifactError, ExportError
from obc_deploy.exporters import onnx_file, parity
from obc_deploy.layers import matrix_to_weight
from obc_deploy.targets import TARGETS

QDQ, QOPERATOR = "onnxruntime", "onnxruntime-qoperator"


def codes_of(model, layer):
    return matrix_to_weight(layer, model.forms[layer.name].codes).numpy()


@pytest.mark.parametrize(
    ("target", "scheme", "steps"),
    [
        (QDQ, "2:4+w8a8", None),
        (QOPERATOR, "2:4+w8a8", None),
        (QDQ, "w4", None),
        ("deepsparse", "2:4+w8a8", "shared"),
        ("deepsparse", "2:4+w8a8", "rows"),
    ],
)
def test_the_codes_in_the_file_are_the_solvers(compressed, tmp_path, target, scheme, steps):
    model = compressed(Plain, scheme, steps=steps)
    artifact = model.export(tmp_path, target=target, check=False)
    stored = constants(artifact.path)
    for layer in model.layers:
        codes = codes_of(model, layer)
        names = [name for name in stored if name.startswith(f"{layer.name}.weight_codes")]
        assert len(names) == 1
        found = stored[names[0]]
        assert found.dtype == np.int8
        if names[0].endswith("_transposed"):
            found = found.T
        np.testing.assert_array_equal(found.reshape(codes.shape), codes)
        if "2:4" in scheme:
            mask = matrix_to_weight(layer, model.forms[layer.name].mask).numpy()
            assert not found.reshape(codes.shape)[~mask].any()
            assert mask.mean() == 0.5
    record = {layer.name: layer for layer in artifact.manifest.layers}
    graph = onnx.load(artifact.path).graph
    outputs = {output for node in graph.node for output in node.output}
    assert set(record) == {layer.name for layer in model.layers}
    assert {layer.output for layer in record.values()} <= outputs
    assert all(layer.codes in stored for layer in record.values())


def test_float_files_hold_the_zeros(compressed, tmp_path):
    model = compressed(Plain, "2:4")
    artifact = model.export(tmp_path, target="deepsparse", check=False)
    stored = constants(artifact.path)
    for layer in model.layers:
        weight = stored[layer.weight_name]
        assert (weight == 0).mean() == 0.5
        np.testing.assert_array_equal(
            weight, matrix_to_weight(layer, model.forms[layer.name].weight).numpy()
        )
    assert artifact.manifest.format == "float"


def test_equal_layers_keep_constants_of_their_own(tmp_path):
    model = compress(build(Twins), samples(Twins), scheme="w8a8", method="rtn", baselines=False)
    for target in (QDQ, QOPERATOR):
        artifact = model.export(tmp_path / target, target=target)
        stored = constants(artifact.path)
        for name in ("one", "two"):
            assert f"{name}.weight_codes" in stored
        assert [layer.name for layer in artifact.manifest.layers] == ["one", "two"]


@pytest.mark.parametrize("target", list(TARGETS))
def test_versions_and_checker(compressed, tmp_path, target):
    artifact = compressed(Depthwise).export(tmp_path / "deeper" / "net.onnx", target=target)
    proto = onnx.load(artifact.path)
    onnx.checker.check_model(proto, full_check=True)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    assert opsets[""] == TARGETS[target].opset == artifact.manifest.opset
    assert proto.ir_version == TARGETS[target].ir_version == artifact.manifest.ir_version
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]
    again = load_artifact(artifact.path)
    assert again == artifact
    assert (again.target, again.scheme) == (target, "w8a8")
    assert again.size_bytes == artifact.path.stat().st_size


def test_operators_of_each_form(compressed, tmp_path):
    found = {
        target: operators(
            compressed(Depthwise).export(tmp_path / target, target=target, check=False).path
        )
        for target in (QDQ, QOPERATOR)
    }
    assert found[QDQ]["Conv"] == 3
    assert found[QDQ]["QLinearConv"] == 0
    wanted = {"QLinearConv": 3, "QGemm": 1, "QLinearGlobalAveragePool": 1}
    assert {name: found[QOPERATOR][name] for name in wanted} == wanted
    assert not {"Conv", "Relu", "Clip", "DequantizeLinear"} & set(found[QOPERATOR])
    added = compressed(Residual).export(tmp_path / "a", target=QOPERATOR, check=False)
    assert operators(added.path)["QLinearAdd"] == 1
    assert not {"Conv", "Relu", "ReduceMean"} & set(operators(added.path))
    shared = compressed(Residual, steps="shared").export(
        tmp_path / "s", target="deepsparse", check=False
    )
    assert operators(shared.path)["QLinearConv"] == 4  # the head is a 1x1 convolution
    rows = compressed(Residual, steps="rows").export(
        tmp_path / "r", target="deepsparse", check=False
    )
    assert operators(rows.path)["ConvInteger"] == 3
    assert operators(rows.path)["MatMulInteger"] == 1


def test_a_relu_goes_only_where_saturation_replaces_it(compressed, tmp_path, monkeypatch):
    model = compressed(Residual)
    # relu_1 gets a grid with negative codes: its ReLU must stay.
    from dataclasses import replace

    from obc_deploy.activations import ActivationRange

    ranges = {**model.ranges, "relu_1": ActivationRange(-1.0, 2.0)}
    changed = replace(model, ranges=ranges)
    artifact = changed.export(tmp_path, target=QOPERATOR, batch_size=8)
    assert operators(artifact.path)["Relu"] == 1
    assert operators(artifact.path)["QLinearConv"] == 2
    x = samples(Residual, 8, seed=3)
    with torch.no_grad():
        wanted = changed.module()(torch.from_numpy(x)).numpy()
    assert relative(run(artifact.path, x), wanted) < 1e-2


@pytest.mark.parametrize(
    ("target", "steps"),
    [(QDQ, None), (QOPERATOR, None), ("deepsparse", "shared"), ("deepsparse", "rows")],
)
def test_a_dynamic_batch_takes_any_number_of_samples(compressed, tmp_path, target, steps):
    model = compressed(Residual, steps=steps)
    artifact = model.export(tmp_path, target=target, dynamic_batch=True)
    assert artifact.manifest.batch_size is None
    for count in (1, 3, 8):
        x = samples(Residual, count, seed=9)
        with torch.no_grad():
            wanted = model.module(target)(torch.from_numpy(x)).numpy()
        assert relative(run(artifact.path, x), wanted) < 1e-2


def damaged(monkeypatch, name, change):
    """Exports whose file differs in one constant from what was built."""
    build_onnx = onnx_file.build_onnx

    def broken(*args, **options):
        built = build_onnx(*args, **options)
        (found,) = [c for c in built.proto.graph.initializer if c.name == name]
        found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found)), name))
        return built

    monkeypatch.setattr(onnx_file, "build_onnx", broken)


@pytest.mark.parametrize(
    ("kind", "scheme", "target", "constant", "layer"),
    [
        (Residual, "w8a8", QDQ, "second.weight_codes", "second"),
        (Residual, "w8a8", QOPERATOR, "third.weight_codes", "third"),
        (Residual, "w8a8", QOPERATOR, "head.weight_codes", "head"),
        (Residual, "w4", QDQ, "second.weight_codes", "second"),
        (Residual, "dense", QDQ, "second.weight", "second"),
    ],
)
def test_a_damaged_weight_is_found_and_its_layer_named(
    compressed, tmp_path, monkeypatch, kind, scheme, target, constant, layer
):
    damaged(monkeypatch, constant, lambda array: np.ascontiguousarray(array[::-1]))
    with pytest.raises(ExportError) as error:
        compressed(kind, scheme).export(tmp_path / "out", target=target)
    assert "differs from the PyTorch model by" in str(error.value)
    named = f"layer that differs is '{layer}'"
    # The head computes the output itself.
    assert named in str(error.value) or (layer == "head" and "the output" in str(error.value))
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_activation_scale_is_found(compressed, tmp_path, monkeypatch):
    damaged(monkeypatch, "activations.relu_1_scale", lambda array: array * np.float32(0.1))
    with pytest.raises(ExportError, match="layer that differs is 'second'"):
        compressed(Residual).export(tmp_path, target=QOPERATOR)


def test_rounding_alone_passes_layer_by_layer(compressed, tmp_path, monkeypatch):
    # No error at all is allowed end to end, so that every layer is looked at.
    monkeypatch.setattr(parity, "QUANTIZED_TOLERANCE", -1.0)
    for target, steps in ((QDQ, None), (QOPERATOR, None)):
        artifact = compressed(Depthwise, steps=steps).export(tmp_path / target, target=target)
        assert artifact.manifest.parity["layerwise"] is True


def test_another_runtimes_wrong_outputs_are_not_rounding(compressed, tmp_path):
    model = compressed(Residual)
    artifact = model.export(tmp_path, target=QOPERATOR)
    quantized = model.quantized()
    batch = (torch.from_numpy(samples(Residual, 1)),)
    built = onnx_file.build_onnx(model, quantized, TARGETS[QOPERATOR], batch, dynamic_batch=False)

    def wrong(arrays):
        return [run(artifact.path, arrays[0])[:, ::-1]]

    with pytest.raises(ExportError, match="ONNX Runtime finds no layer that does: elsewhere"):
        parity.check_parity(
            wrong, built.reference, [batch], tolerance=0.05, runtime="elsewhere",
            path=artifact.path, codes=built.codes,
        )  # fmt: skip


def test_batch_sizes_that_cannot_be(compressed, tmp_path):
    with pytest.raises(ExportError, match="batch size 0: give 1 or more"):
        compressed(Residual).export(tmp_path, batch_size=0)
    x = samples(FixedBatch, 4)
    fixed = compress(build(FixedBatch), x, scheme="w8a8", method="rtn", baselines=False)
    with pytest.raises(
        ExportError, match="captured with batch size 1 and cannot be exported with 2"
    ):
        fixed.export(tmp_path, batch_size=2)
    with pytest.raises(ExportError, match="fixed batch size; export without --dynamic-batch"):
        fixed.export(tmp_path, dynamic_batch=True)
    assert list(tmp_path.iterdir()) == []
    artifact = fixed.export(tmp_path)
    assert run(artifact.path, x[:1]).shape == (1, 4)


def test_a_place_that_cannot_be_written(compressed, tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(ExportError, match=r"cannot write .*choose a writable place"):
        compressed(Residual).export(tmp_path / "file" / "net.onnx")


def test_a_graph_onnx_runtime_refuses(compressed, tmp_path, monkeypatch):
    build_onnx = onnx_file.build_onnx

    def broken(*args, **options):
        built = build_onnx(*args, **options)
        built.proto.graph.node[0].op_type = "NoSuchOperator"
        return built

    monkeypatch.setattr(onnx_file, "build_onnx", broken)
    with pytest.raises(ExportError, match=r"the ONNX graph of .* is malformed") as error:
        compressed(Residual).export(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_artifacts_that_were_changed(compressed, tmp_path):
    with pytest.raises(ArtifactError, match=r"no artifact .*'obc-deploy export'"):
        load_artifact(tmp_path / "model.onnx")
    artifact = compressed(Residual).export(tmp_path, check=False)
    whole = artifact.path.read_bytes()
    artifact.path.write_bytes(whole[:-1] + b"?")
    with pytest.raises(ArtifactError, match="is not the file its manifest describes"):
        load_artifact(artifact.path)
    artifact.path.write_bytes(whole)
    beside = artifact.path.with_name("model.manifest.json")
    content = json.loads(beside.read_text())
    for text in ("{}", "not json", json.dumps({**content, "more": 1})):
        beside.write_text(text)
        with pytest.raises(ArtifactError, match=r"cannot be read .*export the model again"):
            load_artifact(artifact.path)
    beside.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_artifact(artifact.path)
    beside.unlink()
    with pytest.raises(ArtifactError, match=r"has no manifest 'model\.manifest\.json' beside it"):
        load_artifact(artifact.path)


def test_a_model_without_an_onnx_form(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

        def forward(self, x):
            return torch.linalg.eigvals(self.fc(x).reshape(-1, 2, 2)).real

    model = compress(
        Odd(), np.random.default_rng(0).standard_normal((4, 4), dtype=np.float32),
        scheme="w8", method="rtn", baselines=False,
    )  # fmt: skip
    with pytest.raises(ExportError, match="the model has no ONNX form") as error:
        model.export(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert exporters.MODEL_FILE == "model.onnx"
