"""torchvision networks with random weights, the whole way without a special case for any."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import obc_deploy as obc

SIZE = 64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnet50"])
def test_round_to_nearest_export_and_run(name, tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    model = obc.load_model(f"torchvision:{name}", weights="none")
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).numpy()
    compressed = obc.compress(
        model, images, scheme="w8a8", method="rtn", ranges="min-max", baselines=False, batch_size=4
    )
    assert not compressed.manifest.unsupported
    assert all(layer.scheme == "w8a8" for layer in compressed.manifest.layers)
    artifact = compressed.export(tmp_path / "model.onnx", target="onnxruntime-qoperator")
    parity = artifact.manifest.parity
    assert parity["relative_error"] <= parity["tolerance"]
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images[:1]})
    assert found.shape == (1, 1000)
    assert np.isfinite(found).all()
    # Weights took four bytes each and take one now; scales, biases and the graph come on top.
    parameters = sum(p.numel() for p in model.parameters())
    assert artifact.size_bytes < 1.15 * parameters + 2_000_000
