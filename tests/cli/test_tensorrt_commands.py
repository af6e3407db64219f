"""The command line for TensorRT, on any machine: files, the command to build, 2:4 checks."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obc_deploy.exporters import engine as engines
from obc_deploy.runtimes import tensorrt

Run = Callable[..., "Answer"]  # noqa: F821


@pytest.fixture(scope="session")
def tensorrt_file(lone_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with an open batch size; tests leave it as it is."""
    from obc_deploy.cli import main

    path = tmp_path_factory.mktemp("tensorrt") / "lone.onnx"
    given = ["export", str(lone_run), "-t", "tensorrt", "--dynamic-batch", "-o", str(path)]
    assert main(given) == 0
    return path


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LIBRARIES", {"tensorrt": ("no_such_module",)})


def test_export_writes_the_file_and_the_command(
    run: Run, lone_run: Path, tmp_path: Path, no_library: None
) -> None:
    path = tmp_path / "small.onnx"
    answer = run(
        "export", lone_run, "-t", "tensorrt", "-o", path, "--engine", "--dynamic-batch",
        "--batches", "1:2:4", "--workspace", 256, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.json["engine"] is None
    assert answer.json["precision"] == "float16"
    assert answer.json["parity"]["relative_error"] <= answer.json["parity"]["tolerance"]
    words = shlex.split(answer.json["trtexec"])
    assert {"--stronglyTyped", "--sparsity=enable", "--memPoolSize=workspace:256M"} <= set(words)
    assert f"--onnx={path}" in words
    assert "--maxShapes=input:4x4x8x8" in words
    # 2:4 is what this target is faster with: there is nothing to warn of.
    assert not any("sparse kernels" in note for note in answer.json["preflight"])
    told = run("export", lone_run, "-t", "tensorrt", "-o", path, "--engine", "--no-check")
    assert "no engine was built: no TensorRT with a builder here" in told.out
    assert "trtexec" in told.out


def test_number_formats(run: Run, lone_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    answer = run("export", lone_run, "-t", "tensorrt", "-o", path, "--precision", "bf16", "--fp8")
    assert answer.code == 0, answer.err
    assert "8-bit layers in fp8" in answer.out
    stored = {c.data_type for c in onnx.load(path).graph.initializer}
    assert {TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16} <= stored


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-t", "onnxruntime", "--engine"), "--target tensorrt, not for 'onnxruntime'"),
        (("-t", "deepsparse", "--workspace", 3), "--target tensorrt, not for 'deepsparse'"),
        (("-t", "onnxruntime", "--precision", "fp16"), "--precision fp16 is for --target tensorrt"),
        (("-t", "onnxruntime", "--fp8"), "--fp8 is for --target tensorrt"),
        (("-t", "tensorrt", "--batches", "1:8:32"), "add --dynamic-batch"),
        (("-t", "tensorrt", "--dynamic-batch", "--batches", "1:8"), "'1:8' is no smallest:usual"),
        (("-t", "tensorrt", "--dynamic-batch", "--batches", "4:2:8"), "smallest first"),
        (("-t", "tensorrt", "--optimization-level", 6), "6"),
        (("-t", "tensorrt", "--precision", "fp64"), "fp64"),
    ],
)
def test_options_that_do_not_fit(
    run: Run, lone_run: Path, tmp_path: Path, arguments: tuple[object], reason: str
) -> None:
    answer = run("export", lone_run, "-o", tmp_path / "x.onnx", *arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1
    assert reason in answer.err
    assert list(tmp_path.iterdir()) == []


def test_audit_of_an_artifact_lists_every_layer(run: Run, tensorrt_file: Path) -> None:
    answer = run("audit", tensorrt_file, "--json")
    assert answer.code == 0, answer.err
    layers = answer.json["two_of_four"]
    assert [layer["layer"] for layer in layers] == ["0", "3", "7"]
    assert all(layer["valid"] and layer["share"] == 1.0 for layer in layers)
    assert all(not layer["eligible"] and layer["obstacles"] for layer in layers)
    assert {layer["picked"] for layer in layers} == {None}
    assert answer.json["sparse_tactics"] is None
    told = run("audit", tensorrt_file)
    assert "3 of 3 layers are 2:4" in told.out
    assert "too small to gain" in " ".join(told.out.replace("│", " ").split())


def test_audit_of_a_run_writes_its_file(run: Run, lone_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lone_run, tmp_path / "run")
    answer = run("audit", folder, "--runtime", "tensorrt", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["path"] == str(folder / "artifacts" / "tensorrt" / "model.onnx")
    assert len(answer.json["two_of_four"]) == 3


def test_audit_of_a_file_from_elsewhere_checks_and_runs_it(run: Run, tmp_path: Path) -> None:
    weight = np.ones((16, 16), np.float32)
    weight[[0, 3, 5, 6, 9, 10, 12, 15]] = 0
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    answer = run("audit", path, "--threads", 1, "--json")
    assert answer.code == 0, answer.err
    assert [layer["valid"] for layer in answer.json["two_of_four"]] == [True]
    assert [layer["operator"] for layer in answer.json["layers"]] == ["MatMul"]
    alone = run("audit", path, "--runtime", "tensorrt", "--json")
    assert alone.json["two_of_four"] == answer.json["two_of_four"]
    assert "layers" not in alone.json


def test_files_that_cannot_be_audited(run: Run, tensorrt_file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(tensorrt_file.read_bytes()[:2000])
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16])],
    )  # fmt: skip
    empty = tmp_path / "empty.onnx"
    onnx.save(helper.make_model(graph), empty)
    for path, reason in (
        (damaged, "is no ONNX file"),
        (empty, "no Conv, Gemm or MatMul with a constant weight"),
        (tmp_path / "missing.onnx", "no file"),
    ):
        for options in ((), ("--runtime", "tensorrt")):
            answer = run("audit", path, *options)
            assert answer.code == 2
            assert answer.out == ""
            assert reason in answer.err
            assert path.name in answer.err


@pytest.mark.skipif(tensorrt.info().works, reason="engines run here")
def test_a_trial_needs_a_gpu_and_says_so_before_it_builds(run: Run, tensorrt_file: Path) -> None:
    answer = run("audit", tensorrt_file, "--trial")
    assert answer.code == 2
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1
    assert f"TensorRT: {tensorrt.info().reason}; run: " in answer.err


def test_a_trial_is_for_tensorrt(run: Run, tensorrt_file: Path) -> None:
    answer = run("audit", tensorrt_file, "--runtime", "onnxruntime", "--trial")
    assert answer.code == 2
    assert "--trial is for --runtime tensorrt; 'onnxruntime' has no sparse kernels" in answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "RUN", "--runtime", "tensorrt"),
        ("curve", "cli_networks:small_network", "-c", "DATA", "--eval", "DATA", "-o", "OUT",
         "-t", "tensorrt", "--budget", "macs:2x"),
        ("compress", "cli_networks:small_network", "-c", "DATA", "-o", "OUT", "-t", "tensorrt",
         "--budget", "latency:2x"),
        ("run", "cli_networks:small_network", "-c", "DATA", "-o", "OUT", "--runtime", "tensorrt"),
    ],
)  # fmt: skip
def test_tensorrt_is_not_timed_beside_other_runtimes(
    run: Run, lone_run: Path, data: Path, tmp_path: Path, arguments: tuple[str]
) -> None:
    places = {"RUN": lone_run, "DATA": data, "OUT": tmp_path / "out"}
    answer = run(*(places.get(word, word) for word in arguments))
    assert answer.code == 2
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1
    assert "no network is timed for target 'tensorrt' here" in answer.err
    assert "--target tensorrt --engine" in answer.err
    assert not (tmp_path / "out").exists()


def test_budgets_that_nothing_is_timed_for(run: Run, data: Path, tmp_path: Path) -> None:
    answer = run(
        "compress", "cli_networks:small_network", "-c", data, "-o", tmp_path / "run", "-t",
        "tensorrt", "--budget", "bops:4.5x", "--no-baselines", "--search-time", 0,
        "--database", tmp_path / "database",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert f"next: obc-deploy export {tmp_path / 'run'} --engine" in answer.out


@pytest.mark.tensorrt_rtx
def test_an_engine_beside_the_file_is_shown(run: Run, lone_run: Path, tmp_path: Path) -> None:
    try:
        engines.find_library("tensorrt_rtx")
    except engines.RuntimeMissingError as error:
        pytest.skip(str(error))
    path = tmp_path / "small.onnx"
    answer = run("export", lone_run, "-t", "tensorrt", "-o", path, "--engine", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["engine"]["path"] == str(path.with_suffix(".engine"))
    assert answer.json["engine"]["size_bytes"] > 10_000
    told = run("audit", path)
    assert "its builder's log does not say which kernels are sparse" in told.out
    engine = path.with_suffix(".engine")
    engine.write_bytes(engine.read_bytes()[:-10])
    assert "not the engine its manifest describes" in run("audit", path).err
