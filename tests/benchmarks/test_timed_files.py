"""ONNX files timed beside the first of them, in real worker processes."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obc_deploy.benchmarks.timed_files import FileInRuntime, time_files
from obc_deploy.errors import MeasurementError

QUICK = {"threads": 1, "rounds": 3, "processes": 1}


def products(path, count, *, scale=1.0, sizes=(2, 256)):
    """The input times one orthogonal matrix, `count` times over, the last time scaled."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((256, 256)))
    weights = [
        numpy_helper.from_array(q.astype(np.float32), "q"),
        numpy_helper.from_array((scale * q).astype(np.float32), "last"),
    ]
    names = ["x", *(f"h{i}" for i in range(1, count)), "y"]
    nodes = [
        helper.make_node("MatMul", [before, "last" if after == "y" else "q"], [after])
        for before, after in itertools.pairwise(names)
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 256])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path)
    return FileInRuntime(path, "onnxruntime")


def test_a_file_with_less_to_do_is_faster(tmp_path):
    """Sixteen products beside one: no machine is so busy as to hide that."""
    many, one = products(tmp_path / "many.onnx", 16), products(tmp_path / "one.onnx", 1)
    shares = []
    first, second = time_files([many, one], **QUICK, progress=shares.append)
    assert (first.speedup, first.interval, first.difference) == (1.0, (1.0, 1.0), 0.0)
    assert second.speedup > 1.0
    assert second.interval[0] <= second.speedup <= second.interval[1]
    assert second.difference > 0.5
    assert second.latency_ms.p50 < first.latency_ms.p50
    assert len(first.latency_ms.samples) >= 30
    for row, file in ((first, many), (second, one)):
        assert (row.path, row.runtime, row.threads, row.batch_size) == (
            file.path, "onnxruntime", 1, 2
        )  # fmt: skip
        assert row.size_bytes == file.path.stat().st_size
        assert row.error is None
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_outputs_differ_by_what_they_are_made_to_differ(tmp_path):
    files = [products(tmp_path / "a.onnx", 2), products(tmp_path / "b.onnx", 2, scale=1.25)]
    inputs = {"x": np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)}
    for given in (None, inputs):
        _, other = time_files(files, inputs=given, **QUICK)
        assert other.difference == pytest.approx(0.25, rel=1e-5)


def test_an_open_batch_size_is_the_one_asked_for(tmp_path):
    (row,) = time_files([products(tmp_path / "x.onnx", 1, sizes=("N", 256))], batch_size=3, **QUICK)
    assert row.batch_size == 3
    assert row.speedup == 1.0


def test_what_cannot_be_timed_says_why_and_the_others_go_on(tmp_path):
    good, broken = products(tmp_path / "good.onnx", 1), tmp_path / "bad.onnx"
    broken.write_bytes(b"no model")
    wider = products(tmp_path / "wider.onnx", 1, sizes=(4, 256))
    bad, none = (FileInRuntime(p, "onnxruntime") for p in (broken, tmp_path / "none.onnx"))
    rows = time_files([good, bad, wider, none, products(tmp_path / "last.onnx", 1)], **QUICK)
    assert [row.error is None for row in rows] == [True, False, False, False, True]
    assert "bad.onnx" in rows[1].error
    assert "takes 'x' [4, 256], and not 'x' [2, 256]" in rows[2].error
    assert "none.onnx" in rows[3].error
    assert rows[3].size_bytes is None
    assert all(row.latency_ms is None and row.speedup is None for row in rows if row.error)
    assert rows[4].speedup is not None


def test_without_the_first_there_are_times_and_no_speedups(tmp_path):
    missing = FileInRuntime(tmp_path / "none.onnx", "onnxruntime")
    _, other = time_files([missing, products(tmp_path / "x.onnx", 1)], **QUICK)
    assert other.latency_ms is not None
    assert other.speedup is other.interval is other.difference is None


def test_nothing_to_time():
    with pytest.raises(MeasurementError, match="give at least one ONNX file"):
        time_files([])
