"""Dry runs: files for TensorRT parsed and built ahead of time by TensorRT-RTX, without a GPU.

That catches what the parser or the builder refuses. It says nothing about speed, nor about which
kernels a GPU will run: the engines are never deserialized here.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import Residual, Transformer, samples

from obc_deploy.errors import ArtifactError, ExportError, RuntimeMissingError
from obc_deploy.exporters import engine as engines
from obc_deploy.exporters.engine import (
    EngineOptions,
    Profile,
    build_engine,
    find_library,
    load_engine,
)
from obc_deploy.runtimes.engine_file import engine_manifest_path

try:
    find_library("tensorrt_rtx")
    MISSING = None
except RuntimeMissingError as error:
    MISSING = str(error)

pytestmark = [
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


@pytest.fixture(scope="module")
def source(for_tensorrt):
    """A file of a small network."""
    return for_tensorrt.file(Residual, "w8a8").path


def test_open_batches_take_a_profile(for_tensorrt, tmp_path):
    kind = Transformer
    source = for_tensorrt.file(kind, "2:4+w8a8", dynamic_batch=True).path
    (name,) = [value.name for value in onnx.load(source).graph.input]
    shape = samples(kind, 1).shape[1:]
    out = tmp_path / "net.engine"
    with pytest.raises(ExportError, match=rf"input '{name}' has open sizes .*\(--batches 1:8:32"):
        build_engine(source, out, library="tensorrt_rtx")
    good = Profile((1, *shape), (4, *shape), (8, *shape))
    engine = build_engine(source, out, EngineOptions(profiles={name: good}), library="tensorrt_rtx")
    stored = engine.manifest.profiles[name]
    assert (stored.minimum, stored.maximum) == ([1, *shape], [8, *shape])
    wrong = tuple(size + 1 for size in shape)
    bad = Profile((1, *wrong), (4, *wrong), (8, *wrong))
    with pytest.raises(ExportError, match=f"profile of '{name}' .* does not fit its shape"):
        build_engine(source, out, EngineOptions(profiles={name: bad}), library="tensorrt_rtx")
    with pytest.raises(ExportError, match="a profile is for 'y', which is no input"):
        build_engine(source, out, EngineOptions(profiles={"y": good}), library="tensorrt_rtx")


def test_level_and_workspace_and_no_timing_cache(source, tmp_path):
    cache = tmp_path / "net.timing"
    options = EngineOptions(optimization_level=1, workspace_bytes=64 << 20, timing_cache=cache)
    made = build_engine(source, tmp_path / "a.engine", options, library="tensorrt_rtx").manifest
    assert (made.optimization_level, made.workspace_bytes) == (1, 64 << 20)
    # TensorRT-RTX times nothing, so it has nothing to keep; that is said.
    assert not cache.exists()
    assert any("'net.timing' was not used" in warning for warning in made.warnings)


def test_capabilities(source, tmp_path):
    out = tmp_path / "net.engine"
    options = EngineOptions(capabilities=("8.6",))
    made = build_engine(source, out, options, library="tensorrt_rtx").manifest
    assert made.capabilities == ["8.6"]
    with pytest.raises(ExportError, match=r"'3\.5' is not one .* those are 7\.5, 8\.0"):
        build_engine(source, out, EngineOptions(capabilities=("3.5",)), library="tensorrt_rtx")


def test_progress_rises_and_may_stop_the_build(source, tmp_path):
    said = []
    build_engine(
        source, tmp_path / "a.engine", library="tensorrt_rtx",
        progress=lambda what, share: said.append((what, share)),
    )  # fmt: skip
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert 0.0 <= shares[0] < shares[-1] <= 1.0
    assert all(what.startswith("TensorRT: ") for what, _ in said)

    def interrupt(what, share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(source, tmp_path / "b.engine", library="tensorrt_rtx", progress=interrupt)
    assert not (tmp_path / "b.engine").exists()


def test_a_place_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(ExportError, match=r"cannot write .*choose a writable place"):
        build_engine(source, tmp_path / "file" / "a.engine", library="tensorrt_rtx")


def test_damaged_engines_are_found(source, tmp_path):
    engine = build_engine(source, tmp_path / "net.engine", library="tensorrt_rtx")
    whole = engine.path.read_bytes()
    engine.path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="not the engine its manifest describes"):
        load_engine(engine.path)
    engine_manifest_path(engine.path).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_engine(engine.path)


def saved(path, nodes, arrays, *domains):
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(name, 1) for name in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


def quantized(zero_point):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantizer"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    return nodes, {"s": np.float32(0.1), "z": zero_point}, ()


def dynamic_product():
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="dynamic"),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"], name="integer"),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    return nodes, {"w": np.ones((8, 8), np.int8)}, ()


def packed_product():
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], name="packed", domain="com.microsoft",
        K=8, N=8, bits=4, block_size=16,
    )  # fmt: skip
    return (
        [node],
        {"w": np.zeros((8, 1, 8), np.uint8), "s": np.ones(8, np.float32)},
        ("com.microsoft",),
    )


def integer_bias():
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "s"], ["d"], name="bias"),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    return nodes, {"b": np.ones(8, np.int32), "s": np.float32(0.1)}, ()


def unknown_operator():
    return [helper.make_node("Unheard", ["x"], ["y"], name="strange", domain="ours")], {}, ("ours",)


REFUSED = {
    "a zero point that is not zero": (quantized(np.int8(3)), "quantizer"),
    "MatMulInteger": (dynamic_product(), "integer"),
    "MatMulNBits": (packed_product(), "packed"),
    "an int32 bias": (integer_bias(), "bias"),
    "an operator that nobody has": (unknown_operator(), "strange"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_the_parser_refuses_and_its_words_and_node_are_passed_on(tmp_path, monkeypatch, case):
    (nodes, arrays, domains), node = REFUSED[case]
    path = saved(tmp_path / "odd.onnx", nodes, arrays, *domains)
    # Our own check would say so first, for all but operators it never heard of.
    monkeypatch.setattr(engines, "check_buildable", lambda source: None)
    with pytest.raises(ExportError, match=r"does not take 'odd\.onnx'") as error:
        build_engine(path, tmp_path / "odd.engine", library="tensorrt_rtx")
    assert node in str(error.value)
    assert "\n" not in str(error.value)
    assert [found.name for found in tmp_path.iterdir()] == ["odd.onnx"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (quantized(np.int8(3)), r"'quantizer' \(QuantizeLinear\) has a zero point"),
        (quantized(np.uint8(0)), r"'quantizer' \(QuantizeLinear\) has uint8 codes"),
        (dynamic_product(), r"'dynamic' \(DynamicQuantizeLinear\) computes on integers"),
        (packed_product(), r"'packed' \(MatMulNBits\) computes on integers"),
        (integer_bias(), r"'bias' \(DequantizeLinear\) has int32 codes"),
    ],
)
def test_our_check_refuses_before_the_parser_does(tmp_path, case, reason):
    nodes, arrays, domains = case
    path = saved(tmp_path / "odd.onnx", nodes, arrays, *domains)
    with pytest.raises(ExportError, match=reason):
        build_engine(path, tmp_path / "odd.engine", library="tensorrt_rtx")


def test_files_for_other_runtimes_are_refused(for_tensorrt, tmp_path):
    path = for_tensorrt.model(Residual, "w8a8").export(tmp_path, "onnxruntime", check=False).path
    with pytest.raises(ExportError, match=r"\(--target tensorrt\)"):
        build_engine(path, library="tensorrt_rtx")


def test_building_needs_no_torch(tmp_path):
    # `doctor` builds a small engine where a GPU is, and runtimes leave torch alone.
    code = (
        "import sys; from pathlib import Path\n"
        "from obc_deploy.exporters.engine import build_engine\n"
        "from obc_deploy.runtimes.doctor import _write_probe\n"
        "path = Path(sys.argv[1]); _write_probe(path); build_engine(path)\n"
        "assert 'torch' not in sys.modules\n"
    )
    path = tmp_path / "probe.onnx"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, path], check=True, env=env)
    assert path.with_suffix(".engine").stat().st_size > 10_000
