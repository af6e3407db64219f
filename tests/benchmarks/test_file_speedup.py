"""One ONNX file's time beside another's, in real worker processes."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obc_deploy.benchmarks.file_speedup import file_speedup
from obc_deploy.errors import MeasurementError


def products(path, count, batch=2):
    """The input times one matrix, `count` times over."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array((rng.standard_normal((256, 256)) / 16).astype(np.float32), "w")
    names = ["x", *(f"h{i}" for i in range(1, count)), "y"]
    nodes = [
        helper.make_node("MatMul", [before, "w"], [after])
        for before, after in itertools.pairwise(names)
    ]
    sizes = [batch, 256]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path)
    return path


def test_a_file_with_less_to_do_is_faster(tmp_path):
    """Sixteen products beside one: no machine is so busy as to hide that."""
    before, after = products(tmp_path / "many.onnx", 16), products(tmp_path / "one.onnx", 1)
    x = np.ones((2, 256), np.float32)
    shares = []
    found = file_speedup(
        before, after, {"x": x}, threads=1, rounds=3, processes=1, progress=shares.append
    )
    assert found.speedup > 1.0
    assert found.interval[0] <= found.speedup <= found.interval[1]
    assert 0.0 < found.after_ms < found.before_ms
    assert (found.threads, found.batch_size) == (1, 2)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_a_file_that_does_not_run_is_named(tmp_path):
    before, after = products(tmp_path / "good.onnx", 1), tmp_path / "bad.onnx"
    after.write_bytes(b"no model")
    with pytest.raises(MeasurementError, match=r"bad\.onnx' could not be timed"):
        file_speedup(
            before, after, {"x": np.ones((2, 256), np.float32)}, threads=1, rounds=1, processes=1
        )
