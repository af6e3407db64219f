"""Sessions of engines: what is checked without a GPU, and, where there is one, what runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from obc_deploy.artifacts import file_sha256
from obc_deploy.errors import ArtifactError, RuntimeFailedError, RuntimeMissingError
from obc_deploy.manifest import EngineManifest, write_json
from obc_deploy.runtimes import session as sessions
from obc_deploy.runtimes import tensorrt
from obc_deploy.runtimes.doctor import _write_probe, diagnose
from obc_deploy.runtimes.engine_file import engine_library, engine_manifest_path
from obc_deploy.runtimes.fingerprint import Gpu
from obc_deploy.runtimes.session import WORKER, Session, open_session
from obc_deploy.runtimes.tensorrt import check_engine, gpu_obstacle, version_obstacle
from obc_deploy.runtimes.worker.worker_cuda import Device, why_no_device

NO_GPU = why_no_device()
RTX = tensorrt.installed_libraries().get("tensorrt_rtx")
needs_rtx = [
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(
        RTX is None,
        reason="TensorRT-RTX is not installed; run: pip install 'obc-deploy[tensorrt-rtx]'",
    ),
]
INFO = tensorrt.info()
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.tensorrt,
    pytest.mark.skipif(not INFO.works, reason=f"engines do not run here: {INFO.reason}"),
]


def marked(marks):
    def mark(function):
        for each in marks:
            function = each(function)
        return function

    return mark


def engine_file(path: Path, **changes: object) -> Path:
    """Bytes that begin as an engine does, and a manifest about them."""
    path.write_bytes(b"vtrt" + bytes(100))
    known = {
        "library": "tensorrt_rtx", "version": RTX or "1.7.1", "gpu": "ahead of time",
        "onnx_file": "net.onnx", "onnx_sha256": "0" * 64, "file": path.name,
        "file_sha256": file_sha256(path), "size_bytes": path.stat().st_size, "sparse": True,
        "seconds": 1.0,
    }  # fmt: skip
    write_json(engine_manifest_path(path), EngineManifest.model_validate({**known, **changes}))
    return path


def manifest(tmp_path: Path, **changes: object) -> EngineManifest:
    path = engine_file(tmp_path / "net.engine", **changes)
    return EngineManifest.model_validate_json(engine_manifest_path(path).read_text())


@pytest.mark.parametrize(
    ("built", "here", "said"),
    [
        ("10.3.0", "10.3.0", None),
        ("10.3.0.26", "10.3.0.1", None),
        ("10.3.0", "11.1.0", "and 11.1.0 is here, another major version: engines run in"),
        ("10.3.0", "10.4.0", "and 10.4.0 is here, another version: engines run in the"),
        ("10.3.0", None, "TensorRT 10.3.0, which is not installed here (TensorRT-RTX 1.7.1)"),
        ("10.3.0", "?", None),
    ],
)
def test_versions_that_run_an_engine(tmp_path, built, here, said):
    versions = {"tensorrt_rtx": "1.7.1"} | ({} if here is None else {"tensorrt": here})
    found = version_obstacle(manifest(tmp_path, library="tensorrt", version=built), versions)
    if said is None:
        assert found is None
        return
    assert said in found
    assert "build it again from 'net.onnx'" in found
    assert built in found


def test_gpus_that_run_an_engine(tmp_path):
    made = manifest(tmp_path, library="tensorrt", gpu="NVIDIA A100", capabilities=["8.0"])
    ampere = Gpu("NVIDIA A30", 24 << 30, "590.1", "8.0")
    hopper = Gpu("NVIDIA H200", 141 << 30, "590.1", "9.0")
    assert gpu_obstacle(made, ()) is None
    assert gpu_obstacle(made, (ampere,)) is None
    assert gpu_obstacle(made, (hopper, ampere)) is None
    assert gpu_obstacle(made.model_copy(update={"capabilities": []}), (hopper,)) is None
    found = gpu_obstacle(made, (hopper,))
    assert "built for NVIDIA A100 (compute capability 8.0)" in found
    assert "this machine has NVIDIA H200 (9.0): build it again here from 'net.onnx'" in found


def test_files_that_are_no_engine(tmp_path):
    damaged = engine_file(tmp_path / "damaged.engine")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    unread = engine_file(tmp_path / "unread.engine")
    engine_manifest_path(unread).write_text(json.dumps({"library": "tensorrt"}))
    short = tmp_path / "short.engine"
    short.write_bytes(b"vtrt")
    onnx = tmp_path / "net.onnx"
    _write_probe(onnx)
    for path, reason in (
        (damaged, "is not the engine its manifest describes"),
        (unread, "'unread.engine.json' of .* cannot be read"),
        (short, "'.*short.engine' is no engine: it has 4 bytes"),
        (onnx, "is an ONNX file and TensorRT runs engines; build one with"),
        (tmp_path / "missing.engine", r"no engine '.*missing.engine' \(No such file"),
    ):
        with pytest.raises(ArtifactError, match=reason):
            open_session("tensorrt", path)


def test_engines_of_other_versions_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "_Worker", None)
    path = engine_file(tmp_path / "net.engine", library="tensorrt", version="4.0.1")
    with pytest.raises(RuntimeFailedError, match=r"will not load '.*net.engine': .* 4\.0\.1"):
        open_session("tensorrt", path)


def test_an_engine_without_a_manifest_is_taken_where_its_library_is(tmp_path, monkeypatch):
    path = engine_file(tmp_path / "net.engine")
    engine_manifest_path(path).unlink()
    monkeypatch.setattr(tensorrt, "installed_libraries", lambda: {"tensorrt_rtx": "1.7.1"})
    assert check_engine(path).name == "tensorrt_rtx"
    monkeypatch.setattr(tensorrt, "installed_libraries", lambda: {"tensorrt": "11.0"})
    with pytest.raises(RuntimeMissingError, match="an engine of TensorRT-RTX, which is not inst"):
        check_engine(path)
    path.write_bytes(b"ftrt" + bytes(100))
    assert engine_library(path) == "tensorrt"
    assert check_engine(path).modules == ("tensorrt", "tensorrt_bindings")


@pytest.mark.skipif(NO_GPU is None, reason="a GPU is here")
def test_without_a_gpu_that_is_what_is_said():
    info = tensorrt.info()
    assert not info.works
    assert info.python is None
    assert info.reason.startswith(NO_GPU)
    assert ("TensorRT-RTX builds engines ahead of time" in info.reason) == (RTX is not None)
    assert (info.version or "").startswith("TensorRT") == bool(tensorrt.installed_libraries())
    found = {each.name: each for each in diagnose().runtimes}["tensorrt"]
    assert found == info


@marked(needs_rtx)
@pytest.mark.skipif(NO_GPU is None, reason="a GPU is here")
def test_a_worker_says_that_there_is_no_gpu(tmp_path, monkeypatch):
    # The session would not start one; its worker must say so too, where a driver lost its GPU.
    path = engine_file(tmp_path / "net.engine")
    working = replace(tensorrt.info(), python=Path(sys.executable), works=True)
    monkeypatch.setattr(sessions, "require_runtime", lambda name: working)
    with pytest.raises(RuntimeMissingError) as error:
        open_session("tensorrt", path, threads=1)
    assert str(error.value) == f"TensorRT runs on an NVIDIA GPU: {NO_GPU}; run: nvidia-smi"


def test_runtimes_on_the_cpu_have_no_times_on_a_device(tmp_path):
    _write_probe(tmp_path / "probe.onnx")
    x = np.ones((1, 16), np.float32)
    with open_session("onnxruntime", tmp_path / "probe.onnx", threads=1) as session:
        with pytest.raises(RuntimeFailedError, match=r"computes on the CPU, .* use Session\.time"):
            session.time_on_device({"x": x})
        with pytest.raises(RuntimeFailedError, match="0 or more and 1 or more"):
            session.time_on_device({"x": x}, samples=0)
        np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x)


@pytest.fixture
def profiles(monkeypatch):
    """The worker's own module, found as the worker finds it."""
    monkeypatch.syspath_prepend(str(WORKER))
    for name in ("worker_profiles", "worker_backend"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import worker_profiles

    return worker_profiles


NARROW = {"x": ((1, 3), (2, 3), (4, 3)), "y": ((1,), (1,), (8,))}
WIDE = {"x": ((1, 3), (16, 3), (32, 3)), "y": ((1,), (4,), (8,))}


@pytest.mark.parametrize(
    ("shapes", "number"),
    [
        ({"x": (2, 3), "y": (1,)}, 0),
        ({"x": (4, 3), "y": (8,)}, 0),
        ({"x": (5, 3), "y": (1,)}, 1),
        ({"x": (32, 3), "y": (8,)}, 1),
    ],
)
def test_the_profile_that_is_tuned_nearest_is_taken(profiles, shapes, number):
    assert profiles.choose_profile(shapes, [NARROW, WIDE]) == number


@pytest.mark.parametrize("shape", [(33, 3), (0, 3), (4, 4), (4,), (4, 3, 1)])
def test_shapes_outside_all_profiles_are_named(profiles, shape):
    with pytest.raises(Exception, match="input 'x' of shape") as error:
        profiles.choose_profile({"y": (2,), "x": shape}, [NARROW, WIDE])
    assert type(error.value).__name__ == "Explained"
    assert str(list(shape)) in str(error.value)
    assert "([1, 3] to [4, 3], [1, 3] to [32, 3])" in str(error.value)


def test_inputs_that_fit_no_profile_together_are_said(profiles):
    either = [
        {"x": ((1,), (1,), (1,)), "y": ((2,), (2,), (2,))},
        {"x": ((2,), (2,), (2,)), "y": ((1,), (1,), (1,))},
    ]
    with pytest.raises(Exception, match=r"takes all of \{'x': \[1\], 'y': \[1\]\} at once"):
        profiles.choose_profile({"x": (1,), "y": (1,)}, either)


SIZES = st.integers(1, 6)


@given(
    bounds=st.lists(st.tuples(SIZES, SIZES, SIZES).map(sorted), min_size=1, max_size=4), size=SIZES
)
def test_a_profile_is_chosen_exactly_where_one_fits(bounds, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(WORKER))
        from worker_profiles import choose_profile
    given_profiles = [{"x": tuple((n,) for n in three)} for three in bounds]
    fitting = [i for i, (low, _, high) in enumerate(bounds) if low <= size <= high]
    if not fitting:
        with pytest.raises(Exception, match="is outside the engine's profile"):
            choose_profile({"x": (size,)}, given_profiles)
        return
    chosen = choose_profile({"x": (size,)}, given_profiles)
    assert chosen in fitting
    assert abs(bounds[chosen][1] - size) == min(abs(bounds[i][1] - size) for i in fitting)


# What follows has to have a GPU.


@pytest.fixture(scope="module")
def probe_engine(tmp_path_factory):
    """An engine of y = relu(2 x) for one sample."""
    from obc_deploy.exporters.engine import build_engine

    path = tmp_path_factory.mktemp("engines") / "probe.onnx"
    _write_probe(path)
    return build_engine(path).path


@pytest.fixture(scope="module")
def open_engine(tmp_path_factory):
    """The same for 1 to 8 samples."""
    import onnx

    from obc_deploy.exporters.engine import EngineOptions, Profile, build_engine

    path = tmp_path_factory.mktemp("engines") / "open.onnx"
    _write_probe(path)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, path)
    profile = Profile((1, 16), (4, 16), (8, 16))
    return build_engine(path, options=EngineOptions(profiles={"x": profile})).path


def batch(count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(count).standard_normal((count, 16)).astype(np.float32)}


def check(session: Session, feed: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(
        session.run(feed)["y"], np.maximum(2 * feed["x"], 0), rtol=1e-3, atol=1e-3
    )


@marked(needs_gpu)
def test_an_engine_computes_and_is_captured(probe_engine):
    with open_session("tensorrt", probe_engine) as session:
        check(session, batch(1))
        check(session, batch(1))
        assert session.facts["device"]
        with pytest.raises(RuntimeFailedError, match="convert it"):
            session.run(batch(2))
        taken = session.time_on_device(batch(1), warmup=3, samples=50)
        assert taken.compute_ms.shape == taken.with_copies_ms.shape == (50,)
        assert (taken.compute_ms > 0).all()
        assert (session.time(batch(1), warmup=2, samples=9).samples_ms > 0).all()
        check(session, batch(1))


@marked(needs_gpu)
def test_open_batches_run_within_their_profile(open_engine):
    with open_session("tensorrt", open_engine) as session:
        for count in (1, 8, 3, 8):
            check(session, batch(count))
        with pytest.raises(RuntimeFailedError, match=r"input 'x' of shape \[9, 16\] is outside"):
            session.run(batch(9))
        check(session, batch(2))


@marked(needs_gpu)
def test_layers_are_profiled(open_engine):
    with open_session("tensorrt", open_engine) as session:
        layers = session.profile(batch(4), warmup=2, iterations=5)
        assert layers
        assert all(layer.ms >= 0 and layer.name for layer in layers)
        check(session, batch(4))


@marked(needs_gpu)
def test_a_device_without_free_memory_is_said(probe_engine):
    device = Device()
    device.make_current()
    free, _ = device.memory()
    held = device.driver.handle("cuMemAlloc_v2", free - (64 << 20))
    try:
        with pytest.raises(RuntimeFailedError, match="out of memory"):
            open_session("tensorrt", probe_engine)
    finally:
        device.driver.call("cuMemFree_v2", held)
    with open_session("tensorrt", probe_engine) as session:
        check(session, batch(1))


@marked(needs_gpu)
def test_garbage_behind_a_manifest_is_refused(tmp_path, probe_engine):
    path = tmp_path / "cut.engine"
    path.write_bytes(probe_engine.read_bytes()[:-64])
    with pytest.raises((ArtifactError, RuntimeFailedError), match=r"cut\.engine"):
        open_session("tensorrt", path)


@marked(needs_gpu)
def test_the_doctor_runs_an_engine():
    found = {each.name: each for each in diagnose().runtimes}["tensorrt"]
    assert found.works, found.reason
