"""Pools are written in the form that each runtime has working kernels for."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from exported import DEEPSPARSE_MARKS, operators, relative, run
from torch import nn

from obc_deploy.compression import compress
from obc_deploy.runtimes.audit import audit
from obc_deploy.runtimes.session import open_session

SCHEMES = ["w8a8", "block4@0.8+w8a8"]
STEPS = [None, "deepsparse"]
"""No target gives each row a weight step of its own, DeepSparse one to a layer."""


class Pooled(nn.Module):
    """A pool whose windows overlap, then two of width and step 2, the second in ceil mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 32, 3, padding=1)
        self.two = nn.Conv2d(32, 32, 3, padding=1)
        self.three = nn.Conv2d(32, 32, 3, padding=1)
        self.overlapping = nn.MaxPool2d(3, stride=2, padding=1)
        self.halving = nn.MaxPool2d(2)
        self.halving_up = nn.MaxPool2d(2, ceil_mode=True)
        self.fc = nn.Linear(32 * 2 * 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.overlapping(torch.relu(self.one(x)))
        x = self.halving(torch.relu(self.two(x)))
        x = self.halving_up(torch.relu(self.three(x)))
        return self.fc(x.flatten(1))


@cache
def compressed(scheme, target=None):
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((16, 4, 16, 16), dtype=np.float32)
    return images, compress(
        Pooled().eval(), images, scheme=scheme, method="rtn", target=target, baselines=False
    )


def readers(path, op_type):
    """The operators that read the outputs of one type of operator."""
    nodes = onnx.load(path).graph.node
    made = {name for node in nodes if node.op_type == op_type for name in node.output}
    return {node.op_type for node in nodes if made & set(node.input)}


@pytest.fixture(scope="module", params=[(a, b) for a in SCHEMES for b in STEPS], ids=str)
def for_deepsparse(request, tmp_path_factory):
    """An image, the outputs wanted for it, and the file."""
    images, model = compressed(*request.param)
    artifact = model.export(tmp_path_factory.mktemp("file"), target="deepsparse", check=False)
    with torch.no_grad():
        wanted = model.module("deepsparse")(torch.from_numpy(images[:1])).numpy()
    return images[:1], wanted, artifact.path


def test_a_maximum_parts_deepsparses_pools_from_the_quantizers_after_them(for_deepsparse):
    image, wanted, path = for_deepsparse
    assert readers(path, "MaxPool") == {"Max"}
    assert operators(path)["Max"] == operators(path)["MaxPool"] == 3
    assert relative(run(path, image), wanted) < 3e-2


@pytest.mark.parametrize("runtime", [pytest.param("deepsparse", marks=DEEPSPARSE_MARKS)])
def test_deepsparses_engine_takes_the_pools(for_deepsparse, runtime):
    image, _, path = for_deepsparse
    with open_session(runtime, path, threads=1) as session:
        feeds = {session.inputs[0].name: image}
        outputs = next(iter(session.run(feeds).values()))
        found = audit(session, feeds)
    np.testing.assert_array_equal(outputs, run(path, image))
    assert (found.fraction_native, found.fallback) == (1.0, False)


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        ("block4@0.8", "deepsparse"),
        ("block4@0.8+w8a8", "onnxruntime"),
        ("block4@0.8+w8a8", "onnxruntime-qoperator"),
    ],
)
def test_float_networks_and_other_targets_keep_their_pools(tmp_path, scheme, target):
    _, model = compressed(scheme)
    found = operators(model.export(tmp_path, target=target, check=False).path)
    assert (found["Max"], found["MaxPool"]) == (0, 3)
