"""What the pre-flight says of a target before any work."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from obc_deploy.schemes import Scheme
from obc_deploy.targets import TARGETS, preflight


@dataclass(frozen=True)
class Named:
    """As much of a layer as the pre-flight reads of one without quantization."""

    name: str


SPARSE, DENSE = "block4@0.9", "dense"


def said(target, schemes):
    layers = [Named(f"layer{i}") for i in range(len(schemes))]
    chosen = {layer.name: Scheme.parse(s) for layer, s in zip(layers, schemes, strict=True)}
    lines = preflight(TARGETS[target], layers, chosen)
    return [line for line in lines if "take turns" in line]


@pytest.mark.parametrize(
    ("schemes", "changes"),
    [
        ([DENSE, SPARSE, SPARSE, DENSE], None),
        ([DENSE, SPARSE, DENSE, SPARSE], None),
        ([DENSE, SPARSE, DENSE, SPARSE, DENSE], 4),
        ([SPARSE, DENSE] * 3, 5),
        ([DENSE, "2:4"] * 3, None),
    ],
)
def test_sparse_layers_among_dense_ones_are_told_of_where_they_cost(schemes, changes):
    lines = said("deepsparse", schemes)
    assert len(lines) == (changes is not None)
    if changes is not None:
        assert f"({changes} changes in network order)" in lines[0]
    assert said("ort-sparse", schemes) == []
    assert said("onnxruntime", schemes) == []
