"""With sparse kernels against without: what is told from two profiles, and the trial itself."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obc_deploy.benchmarks.sparsity_trial import (
    LayerTrial,
    SparsityTrial,
    counterpart,
    layer_trials,
    options_of,
    run_trial,
    step_of,
)
from obc_deploy.errors import ArtifactError, RuntimeFailedError, RuntimeMissingError
from obc_deploy.exporters.engine import EngineOptions, Profile, build_engine, find_library
from obc_deploy.runtimes import tensorrt
from obc_deploy.runtimes.contract import DeviceTimes, LayerProfile
from obc_deploy.runtimes.session import WORKER, open_session

try:
    find_library("tensorrt_rtx")
    NO_RTX = None
except RuntimeMissingError as error:
    NO_RTX = str(error)
INFO = tensorrt.info()


def step(name, ms, nodes=(), kind=""):
    return LayerProfile(name, kind, ms, nodes=tuple(nodes))


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([step("conv1 + relu1", 1.0), step("conv2", 2.0)], 1.0),
        ([step("{ForeignNode[a...b]}", 1.0, ("conv1", "relu1"))], 1.0),
        # What the inspector says goes before the name.
        ([step("conv1", 1.0, ("conv2",)), step("fused", 2.0, ("conv1",))], 2.0),
        # A step of two layers, and a layer of two steps, have no time of the layer's own.
        ([step("conv1 + conv2", 1.0)], None),
        ([step("fused", 1.0, ("conv1", "conv2"))], None),
        ([step("first half", 1.0, ("conv1",)), step("second", 1.0, ("conv1",))], None),
        ([step("conv10", 1.0), step("conv1_relu", 1.0)], None),
        ([], None),
    ],
)
def test_the_step_of_a_layer(steps, found):
    one = step_of("conv1", ["conv1", "conv2"], steps)
    assert (None if one is None else one.ms) == found


def test_layers_in_both_profiles():
    allowed = [step("conv1", 1.0, kind="sparse_kernel"), step("conv2 + add", 4.0)]
    forbidden = [step("conv1 + relu", 2.0), step("conv2 + conv3", 3.0)]
    trials = layer_trials(["conv1", "conv2", "conv3"], allowed, forbidden)
    assert trials["conv1"] == LayerTrial("conv1", 1.0, 2.0, "sparse_kernel")
    assert trials["conv1"].speedup == 2.0
    assert (trials["conv2"].with_ms, trials["conv2"].speedup) == (4.0, None)
    assert trials["conv3"] == LayerTrial("conv3")


@pytest.mark.parametrize(
    ("interval", "faster"), [((1.1, 1.3), True), ((0.8, 0.9), False), ((0.9, 1.1), None)]
)
def test_the_verdict_is_the_intervals(interval, faster):
    trial = SparsityTrial("a GPU", 1.0, 1.0, 1.0, interval, {"conv": LayerTrial("conv", 2.0, 3.0)})
    assert trial.faster is faster
    said = json.loads(json.dumps(trial.as_dict()))
    assert said["faster"] is faster
    assert said["layers"] == [
        {"node": "conv", "with_ms": 2.0, "without_ms": 3.0, "kernel": "", "speedup": 1.5}
    ]


class Replayed:
    """Stands where a GPU would: a session that hands back times it was given."""

    def __init__(self, name, ms, log):
        self.name, self.ms, self.log = name, ms, log
        self.facts = {"device": "a GPU"}

    def time_on_device(self, inputs, *, warmup, samples):
        self.log.append(self.name)
        taken = np.full(samples, self.ms[self.log.count(self.name) - 1])
        return DeviceTimes(taken, taken + 1.0)

    def profile(self, inputs, *, iterations):
        return [step("conv", self.ms[0])]


def test_turns_are_taken_and_a_slower_round_changes_no_ratio():
    log = []
    slow = [1.0, 3.0, 1.0, 1.0]
    ours, theirs = (
        Replayed(name, [factor * ms for ms in slow], log)
        for name, factor in (("with", 2.0), ("without", 3.0))
    )
    trial = run_trial(ours, theirs, {}, ["conv"], rounds=4, samples=5)
    assert log == ["with", "without", "without", "with"] * 2
    assert trial.speedup == pytest.approx(1.5)
    assert trial.interval == pytest.approx((1.5, 1.5))
    assert trial.faster
    assert (trial.with_ms, trial.without_ms) == (2.0, 3.0)
    assert trial.layers["conv"].speedup == pytest.approx(1.5)


def test_runtimes_on_the_cpu_are_refused(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    x = {"x": np.ones((1, 4), np.float32)}
    with (
        open_session("onnxruntime", path, threads=1) as session,
        pytest.raises(RuntimeFailedError, match="computes on the CPU"),
    ):
        run_trial(session, session, x, [])


@pytest.fixture
def inspector(monkeypatch):
    """The worker's own module, found as the worker finds it."""
    monkeypatch.syspath_prepend(str(WORKER))
    monkeypatch.delitem(sys.modules, "worker_inspector", raising=False)
    import worker_inspector

    return worker_inspector


def test_what_an_inspector_says(inspector):
    layers = [
        {
            "Name": "conv1 + relu1", "LayerType": "CaskConvolution", "TacticName": "sm80_sparse",
            "Metadata": "[ONNX Layer: /conv1/Conv]\x1e[ONNX Layer: /relu1/Relu]",
        },
        {"Name": "shuffle", "LayerType": "NoOp"},
        "a layer with a name alone",
    ]  # fmt: skip
    found = inspector.engine_layers(json.dumps({"Layers": layers, "Bindings": ["x"]}))
    assert found == {
        "conv1 + relu1": ("sm80_sparse", ["/conv1/Conv", "/relu1/Relu"]),
        "shuffle": ("NoOp", []),
    }


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"Layers": ["conv1"]}'])
def test_an_inspector_that_says_nothing(inspector, text):
    assert inspector.engine_layers(text) == {}


def two_four_file(path, size=256):
    """A product with a 2:4 float16 weight, of an open number of rows."""
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float16)
    weight.reshape(-1, 4, size)[:, 2:] = 0
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "graph",
        [helper.make_tensor_value_info("x", half, ["n", size])],
        [helper.make_tensor_value_info("y", half, ["n", size])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


@pytest.mark.tensorrt_rtx
@pytest.mark.skipif(NO_RTX is not None, reason=str(NO_RTX))
def test_the_counterpart_differs_in_sparsity_alone(tmp_path):
    source = two_four_file(tmp_path / "net.onnx")
    options = EngineOptions(
        profiles={"x": Profile((1, 256), (16, 256), (64, 256))}, optimization_level=2,
        workspace_bytes=64 << 20, capabilities=("8.6",),
    )  # fmt: skip
    engine = build_engine(source, options=options, library="tensorrt_rtx")
    assert options_of(engine.manifest, sparse=True) == options
    other = counterpart(engine, source, tmp_path / "other.engine")
    assert not other.manifest.sparse
    assert options_of(other.manifest, sparse=True) == options
    with pytest.raises(ArtifactError, match=r"other\.engine' was built without sparse kernels"):
        counterpart(other, source, tmp_path / "third.engine")


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.skipif(not INFO.works, reason=f"engines do not run here: {INFO.reason}")
def test_a_trial_on_a_gpu(tmp_path):
    source = two_four_file(tmp_path / "net.onnx", 1024)
    shape = Profile((1, 1024), (512, 1024), (512, 1024))
    engine = build_engine(source, options=EngineOptions(profiles={"x": shape}))
    other = counterpart(engine, source, tmp_path / "other.engine")
    x = {"x": np.ones((512, 1024), np.float16)}
    with (
        open_session("tensorrt", engine.path) as ours,
        open_session("tensorrt", other.path) as theirs,
    ):
        trial = run_trial(ours, theirs, x, ["product"], rounds=3, samples=10)
    assert trial.with_ms > 0
    assert trial.without_ms > 0
    assert trial.layers["product"].with_ms is not None
