"""Pools over whole images are written in the form that each runtime has working kernels for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import operators, relative, run
from torch import nn

from obc_deploy.compression import compress


class WholePool(nn.Module):
    """A pool that leaves an image, then one over all that is left of it."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.MaxPool2d(last)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.one(x)), 2)
        return self.fc(self.last(torch.relu(self.two(x))).flatten(1))


def compressed(scheme, last=4):
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((16, 4, 8, 8), dtype=np.float32)
    model = WholePool(last).eval()
    return images, compress(model, images, scheme=scheme, method="rtn", baselines=False)


@pytest.mark.parametrize(("scheme", "maxima"), [("w8a8", 0), ("block4@0.5", 1)])
def test_deepsparse_gets_a_maximum_in_place_of_a_sparse_networks_whole_pool(
    tmp_path, scheme, maxima
):
    images, model = compressed(scheme)
    artifact = model.export(tmp_path, target="deepsparse", check=False)
    found = operators(artifact.path)
    assert (found["ReduceMax"], found["MaxPool"]) == (maxima, 2 - maxima)
    with torch.no_grad():
        expected = model.module("deepsparse")(torch.from_numpy(images[:1])).numpy()
    assert relative(run(artifact.path, images[:1]), expected) < 3e-2


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-qoperator"])
def test_others_keep_their_pools(tmp_path, target):
    _, model = compressed("w8a8")
    found = operators(model.export(tmp_path, target=target).path)
    assert (found["ReduceMax"], found["MaxPool"]) == (0, 2)
