"""What a builder is told, and what is said where there is none: no library is needed for that."""

from __future__ import annotations

import shlex

import pytest

from obc_deploy.errors import ArtifactError, ExportError, RuntimeMissingError
from obc_deploy.exporters import engine as engines
from obc_deploy.exporters.engine import (
    EngineOptions,
    Profile,
    build_engine,
    engine_manifest_path,
    find_library,
    load_engine,
    trtexec_command,
)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((1, 3), (2, 3), (4,)), "different rank"),
        (((2, 3), (1, 3), (4, 3)), "not in order"),
        (((1, 3), (8, 3), (4, 3)), "not in order"),
        (((0, 3), (1, 3), (4, 3)), "not in order"),
    ],
)
def test_profiles_that_cannot_be(shapes, reason):
    with pytest.raises(ExportError, match=reason):
        Profile(*shapes)


def test_options_that_cannot_be():
    with pytest.raises(ExportError, match="level 6: give 0 to 5"):
        EngineOptions(optimization_level=6)
    with pytest.raises(ExportError, match="workspace of 0 bytes"):
        EngineOptions(workspace_bytes=0)


def test_the_command_says_what_the_options_say(tmp_path):
    options = EngineOptions(
        profiles={"x": Profile((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))}, optimization_level=4,
        workspace_bytes=3 << 30, timing_cache=tmp_path / "a b.timing",
    )  # fmt: skip
    words = shlex.split(trtexec_command("net.onnx", options))
    assert words[0] == "trtexec"
    assert set(words[1:]) == {
        "--onnx=net.onnx",
        "--stronglyTyped",
        "--sparsity=enable",
        "--saveEngine=net.engine",
        f"--timingCacheFile={tmp_path}/a b.timing",
        "--profilingVerbosity=detailed",
        "--builderOptimizationLevel=4",
        "--memPoolSize=workspace:3072M",
        "--minShapes=x:1x3x8x8",
        "--optShapes=x:8x3x8x8",
        "--maxShapes=x:32x3x8x8",
    }
    dense = shlex.split(trtexec_command("net.onnx", EngineOptions(sparse=False)))
    assert "--sparsity=disable" in dense
    assert not [word for word in dense if "Shapes" in word]


def libraries(monkeypatch, *modules):
    monkeypatch.setattr(engines, "LIBRARIES", {"tensorrt": modules})


def test_no_library_at_all(monkeypatch):
    libraries(monkeypatch, "no_such_module")
    with pytest.raises(RuntimeMissingError, match=r"not installed\); pip install tensorrt-cu13"):
        find_library()
    with pytest.raises(RuntimeMissingError, match="choose tensorrt or tensorrt_rtx"):
        find_library("cudnn")


def test_a_package_without_a_builder(monkeypatch):
    libraries(monkeypatch, "json")
    with pytest.raises(RuntimeMissingError, match=r"json has no builder \(a runtime-only package"):
        find_library()


def test_a_package_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "broken_bindings.py").write_text("raise OSError('libnvinfer.so.10 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    libraries(monkeypatch, "broken_bindings")
    with pytest.raises(RuntimeMissingError, match=r"does not load \(libnvinfer\.so\.10 is missing"):
        find_library()


def test_a_package_of_an_old_version(monkeypatch, tmp_path):
    (tmp_path / "old_bindings.py").write_text("__version__ = '8.6.1'\nBuilder = OnnxParser = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    libraries(monkeypatch, "old_bindings")
    with pytest.raises(RuntimeMissingError, match=r"old_bindings is of version 8\.6\.1, too old"):
        find_library()


def test_files_that_are_no_networks(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        build_engine(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").write_bytes(b"no network")
    with pytest.raises(ArtifactError, match="is no ONNX file"):
        build_engine(tmp_path / "net.onnx")


def test_engines_that_are_not_there(tmp_path):
    with pytest.raises(ArtifactError, match=r"no engine .*--engine"):
        load_engine(tmp_path / "net.engine")
    (tmp_path / "net.engine").write_bytes(b"engine")
    with pytest.raises(ArtifactError, match=r"manifest 'net\.engine\.json' .* cannot be read"):
        load_engine(tmp_path / "net.engine")
    engine_manifest_path(tmp_path / "net.engine").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_engine(tmp_path / "net.engine")
