"""What the pre-flight says of a target before any work."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from obc_deploy.layers import LayerKind
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


VNNI, NEWER_AVX2, DOT = ("avx2", "avx512f", "avx512_vnni"), ("avx2", "avx_vnni"), ("asimddp",)


@pytest.mark.parametrize(
    ("target", "scheme", "features", "told"),
    [
        ("ort-sparse", "block4x2@0.9", ("avx2",), "no AVX-512 VNNI"),
        ("ort-sparse", "block4x2@0.9", NEWER_AVX2, "no AVX-512 VNNI"),
        ("ort-sparse", "block4x2@0.9", VNNI, None),
        ("ort-sparse", "block4x2@0.9", None, None),
        ("ort-sparse", "block4@0.9", ("avx2",), None),
        ("deepsparse", "block4x2@0.9", VNNI, "deepsparse has no kernels"),
        ("onnxruntime", "block4x2@0.9", ("avx2",), None),
    ],
)
def test_blocks_that_channels_share_are_told_of_where_nothing_reads_them_so(
    target, scheme, features, told
):
    chosen = {"layer": Scheme.parse(scheme)}
    lines = preflight(TARGETS[target], [Named("layer")], chosen, cpu_features=features)
    found = [line for line in lines if "use 'block4@0.9', which loses less (layer)" in line]
    assert len(found) == (told is not None)
    if told is not None:
        assert told in found[0]


@pytest.mark.parametrize(
    ("features", "told"),
    [(("avx2",), True), (("asimd",), True), (VNNI, False), (NEWER_AVX2, False), (DOT, False),
     (None, False)],
)  # fmt: skip
def test_int8_without_dot_products_is_told_of(features, told):
    @dataclass(frozen=True)
    class Int8(Named):
        kind: LayerKind = LayerKind.LINEAR

    chosen = {"layer": Scheme.parse("w8a8")}
    lines = preflight(TARGETS["onnxruntime"], [Int8("layer")], chosen, cpu_features=features)
    assert any("no 8-bit dot products" in line for line in lines) == told
