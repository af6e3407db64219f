"""Names and shapes of results that scripts rely on."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import obc_deploy as obc
from obc_deploy.benchmarks.measurement import read_measurements, write_measurements
from obc_deploy.errors import MeasurementError, ObcDeployError

FIELDS = {
    "variant", "scheme", "runtime", "threads", "accuracy", "agreement", "macs", "bops",
    "bit_operations", "size_bytes", "latency_ms", "end_to_end_ms", "speedup_vs_dense_fp32",
    "speedup_vs_dense_int8", "predicted_speedup", "layers_accelerated", "layers_total", "warnings",
}  # fmt: skip


def test_import_is_light():
    code = (
        "import sys, obc_deploy; "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'matplotlib', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves():
    for name in obc.__all__:
        assert getattr(obc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = obc.nothing


@pytest.mark.parametrize(
    ("verb", "first", "keywords"),
    [
        ("compress", ["model", "calibration"], ["scheme", "target", "budget", "device"]),
        ("solve", ["weight", "hessian", "scheme"], ["method", "dtype", "device"]),
    ],
)
def test_signatures(verb, first, keywords):
    parameters = inspect.signature(getattr(obc, verb)).parameters
    assert list(parameters)[: len(first)] == first
    for name in keywords:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    if verb == "compress":
        assert parameters["device"].default == "auto"


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_solve_gives_back_the_kind_it_got(kind):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 8)).astype(np.float32)
    inputs = rng.standard_normal((8, 64))
    hessian = 2 / 64 * inputs @ inputs.T
    if kind == "torch":
        weight, hessian = torch.from_numpy(weight), torch.from_numpy(hessian)
    solved = obc.solve(weight, hessian, "2:4+w4")
    expected = np.ndarray if kind == "numpy" else torch.Tensor
    for part in (solved.weight, solved.mask, solved.codes, solved.scale, solved.zero_point):
        assert isinstance(part, expected)
    assert 0.0 < solved.error < 1.0
    assert ((solved.weight != 0).reshape(6, 2, 4).sum(2) <= 2).all()


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
    )


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 255, (40, 4, 6, 6), dtype=np.uint8)
    labels = rng.integers(0, 3, 40)
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressed = obc.compress(model, (images, labels), scheme="block4@0.5+w8a8")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    rows = obc.benchmark(
        [compressed], runtimes=["onnxruntime"], data=(images, labels), threads=1, rounds=2,
        samples_per_round=3, processes=1, time_budget_s=5,
    )  # fmt: skip
    return compressed, rows


def test_benchmark_measures_the_variant_and_both_baselines(measured, tmp_path):
    _, rows = measured
    assert [row.role for row in rows] == ["dense-fp32", "dense-int8", "compressed"]
    stored = json.loads(write_measurements(tmp_path / "m.json", rows).read_text())
    assert read_measurements(tmp_path / "m.json") == rows
    for row in stored:
        assert set(row) >= FIELDS
        assert set(row["latency_ms"]) == {"p50", "p90", "p99", "samples"}
        assert set(row["predicted_speedup"]) == {"macs", "bops"}
        assert row["error"] is None
        assert row["end_to_end_ms"] > 0
        assert 0 <= row["accuracy"] <= 1
        assert row["agreement"] >= 0.95
        assert row["threads"] == 1
        assert len(row["latency_ms"]["samples"]) >= 6
        assert row["warmup_ms"]


def test_operation_counts_are_those_of_the_network(measured):
    _, (dense, int8, compressed) = measured
    macs = 8 * 4 * 9 * 36 + 8 * 36 * 3
    assert dense.macs == int8.macs == macs
    assert dense.bops == 32 * macs
    assert int8.bops == 8 * macs
    assert int8.bit_operations == 64 * macs
    assert compressed.macs == pytest.approx(macs / 2, rel=0.02)
    assert compressed.predicted_speedup.bops == pytest.approx(8, rel=0.02)
    assert (int8.layers_accelerated, int8.layers_total) == (2, 2)
    assert dense.speedup_vs_dense_fp32 == int8.speedup_vs_dense_int8 == 1.0


def test_a_run_directory_is_loaded_as_it_was_saved(measured, tmp_path):
    compressed, _ = measured
    loaded = obc.load(compressed.save(tmp_path / "run"))
    assert loaded.manifest == compressed.manifest
    assert [b.role for b in loaded.baselines] == ["dense-fp32", "dense-int8"]
    images = torch.from_numpy(compressed.samples.arrays(0, 4)[0])
    with torch.no_grad():
        assert torch.equal(loaded.module()(images), compressed.module()(images))


def test_what_cannot_be_done_says_so():
    with pytest.raises(ObcDeployError, match="latency budget needs a target"):
        obc.compress(network(), np.zeros((2, 4, 6, 6), np.float32), budget="latency:4x")
    with pytest.raises(MeasurementError, match="nothing to measure"):
        obc.benchmark([])
