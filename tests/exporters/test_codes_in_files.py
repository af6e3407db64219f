"""What is in an exported file: the solver's codes, in the form and operator set of the target."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from exported import operators, places_in
from onnx import numpy_helper
from torch import nn

import obc_deploy as obc
from obc_deploy.errors import ExportError
from obc_deploy.layers import matrix_to_weight
from obc_deploy.targets import TARGETS


class Residual(nn.Module):
    """Convolutions with batch norm, a residual add, pools and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        x = torch.relu(self.left(x) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module", params=["onnxruntime", "deepsparse"])
def compressed(request):
    """One network with a weight scale a row, and one with a weight scale a layer."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    network = Residual()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.weight[0] *= -1
    images = torch.randn(48, 4, 8, 8, generator=generator).numpy()
    return obc.compress(network, images, scheme="2:4+w8a8", target=request.param, baselines=False)


def from_blocks(stored, layer, shape):
    """The codes that an operator of ours stores in blocks of four input channels."""
    values, mask = (stored[f"{layer}.weight_codes_{part}"] for part in ("blocks", "mask"))
    outputs, channels, *kernel = shape
    blocks = np.zeros((outputs, int(np.prod(kernel)) * -(-channels // 4), 4), np.int8)
    kept = [(row, place) for row, places in enumerate(places_in(mask)) for place in places]
    for where, block in zip(kept, values, strict=True):
        blocks[where] = block
    codes = blocks.reshape(outputs, *kernel, -1)[..., :channels]
    return np.moveaxis(codes, -1, 1)


def initializers(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_weights_in_the_file_are_the_solvers_codes(compressed, tmp_path, target):
    artifact = compressed.export(tmp_path / "model.onnx", target=target, check=False)
    stored = initializers(artifact.path)
    for layer in compressed.layers:
        wanted = matrix_to_weight(layer, compressed.forms[layer.name].codes).numpy()
        if f"{layer.name}.weight_codes_blocks" in stored:
            np.testing.assert_array_equal(from_blocks(stored, layer.name, wanted.shape), wanted)
            continue
        names = [name for name in stored if name.startswith(f"{layer.name}.weight_codes")]
        assert len(names) == 1, names
        found = stored[names[0]]
        assert found.dtype == np.int8
        if names[0].endswith("_transposed"):
            found = found.T  # MatMulInteger takes its weight as (cols, rows)
        np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_file_has_the_targets_operator_set_and_form(compressed, tmp_path, target):
    artifact = compressed.export(tmp_path / "model.onnx", target=target, check=False)
    proto = onnx.load(artifact.path)
    onnx.checker.check_model(proto, full_check=True)
    (default,) = (entry.version for entry in proto.opset_import if not entry.domain)
    assert default <= TARGETS[target].opset
    assert proto.ir_version <= TARGETS[target].ir_version
    found = set(operators(artifact.path))
    if artifact.manifest.format == "qdq":
        assert "Conv" in found
        assert not {"QLinearConv", "ConvInteger"} & found
    else:
        assert "Conv" not in found
        assert {"QLinearConv", "ConvInteger", "SparseConvolution"} & found
        assert "Relu" not in found or "ConvInteger" in found


def test_zeros_of_the_pattern_are_in_the_file(compressed, tmp_path):
    artifact = compressed.export(tmp_path / "model.onnx", target="onnxruntime", check=False)
    codes = initializers(artifact.path)["left.0.weight_codes"]
    groups = codes.transpose(0, 2, 3, 1).reshape(-1, 4)
    assert ((groups != 0).sum(1) <= 2).all()


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-qoperator"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_static_and_dynamic_files_compute_what_the_module_does(
    compressed, tmp_path, target, batch_size
):
    import onnxruntime

    images = torch.from_numpy(compressed.samples.arrays(0, batch_size)[0])
    with torch.no_grad():
        wanted = compressed.module(target)(images).numpy()
    static = compressed.export(tmp_path / "s.onnx", target=target, batch_size=batch_size)
    dynamic = compressed.export(tmp_path / "d.onnx", target=target, dynamic_batch=True)
    for artifact in (static, dynamic):
        session = onnxruntime.InferenceSession(
            str(artifact.path), providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())
    assert static.manifest.parity["relative_error"] <= static.manifest.parity["tolerance"]


def test_a_file_that_differs_is_refused_and_not_left_behind(compressed, tmp_path, monkeypatch):
    from obc_deploy.exporters import onnx_file

    build = onnx_file.build_onnx

    def with_a_wrong_weight(*args, **kwargs):
        built = build(*args, **kwargs)
        for tensor in built.proto.graph.initializer:
            if tensor.name == "left.0.weight_codes":
                wrong = -numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
        return built

    monkeypatch.setattr(onnx_file, "build_onnx", with_a_wrong_weight)
    with pytest.raises(ExportError, match=r"differs from the PyTorch model.*first"):
        compressed.export(tmp_path / "model.onnx", target="onnxruntime")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.deepsparse
def test_deepsparse_runs_the_file_in_its_own_engine(compressed, tmp_path):
    from obc_deploy.runtimes.registry import runtime_info
    from obc_deploy.runtimes.session import open_session

    info = runtime_info("deepsparse")
    if not info.works:
        pytest.skip(f"{info.reason}; run: {info.install_command}")
    if compressed.manifest.settings.target != "deepsparse":
        pytest.skip("DeepSparse crashes on convolutions this small with a scale a row")
    artifact = compressed.export(tmp_path / "model.onnx", target="deepsparse")
    image = compressed.samples.arrays(0, 1)[0]
    with torch.no_grad():
        wanted = compressed.module("deepsparse")(torch.from_numpy(image)).numpy()
    with open_session("deepsparse", artifact.path, threads=1) as session:
        assert session.facts["fraction_native"] == 1.0
        (found,) = session.run({session.inputs[0].name: image}).values()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())
