"""What regions gain: the benchmark, on the smallest network."""

from __future__ import annotations

import json

import pytest

from obc_deploy.benchmarks import reference_networks, regions
from obc_deploy.errors import MeasurementError
from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.onnx_graph import read_onnx_graph

SHARED = reference_networks.shared_data()
pytestmark = [
    pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing()),
    pytest.mark.skipif(SHARED is None, reason="needs the reference networks (OBC_DEPLOY_SHARED)"),
]


def test_both_files_hold_the_same_layers(tmp_path):
    joined, apart = regions.export_both("fashion_cnn", "block4@0.8+w8a8", tmp_path)
    found, wanted = (
        sorted((node.op_type, node.outputs) for node in read_onnx_graph(file).nodes)
        for file in (joined, apart)
    )
    assert found == wanted
    assert any(kind == "SparseConvolution" for kind, _ in found)
    assert joined.stat().st_size != apart.stat().st_size


def test_a_network_without_sparse_operators_is_no_use(tmp_path):
    with pytest.raises(MeasurementError, match="no operators of 'fashion_cnn' with dense are"):
        regions.export_both("fashion_cnn", "dense", tmp_path)


def test_a_row_for_each_number_of_threads(tmp_path, capsys):
    asked = ["--network", "fashion_cnn", "--threads", "1", "--threads", "2", "--rounds", "2"]
    assert regions.main([*asked, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "regions.json").read_text())["rows"]
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        assert row["interval"][0] <= row["speedup"] <= row["interval"][1]
        assert row["apart_ms"] > 0
        assert row["joined_ms"] > 0
    assert capsys.readouterr().out.count("| fashion_cnn |") == 2


def test_an_unknown_network_is_an_error(tmp_path, capsys):
    assert regions.main(["--network", "alexnet_3000", "--output", str(tmp_path)]) != 0
    assert "no reference network is called 'alexnet_3000'" in capsys.readouterr().err
