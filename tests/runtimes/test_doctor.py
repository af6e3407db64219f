from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from onnx_models import OnnxBuilder, needs_deepsparse
from rich.console import Console

from obc_deploy import native
from obc_deploy.compiled_library import missing
from obc_deploy.runtimes import onnxruntime_cpu, sparse
from obc_deploy.runtimes.doctor import (
    SolverInfo,
    SparseKernelsInfo,
    diagnose,
    explain_cpu,
    render,
    try_runtime,
    try_solvers,
    try_sparse_kernels,
)
from obc_deploy.runtimes.fingerprint import take_fingerprint
from obc_deploy.runtimes.registry import RUNTIMES


def test_the_diagnosis_runs_each_runtime_and_prints() -> None:
    import onnxruntime

    diagnosis = diagnose()
    found = {info.name: info for info in diagnosis.runtimes}
    assert set(found) == {*RUNTIMES, "tensorrt"}
    assert found["onnxruntime"].works
    assert found["onnxruntime"].version == onnxruntime.__version__
    for info in found.values():
        assert info.works == (info.reason is None)
        assert info.install_command
    assert json.loads(json.dumps(diagnosis.as_dict()))["python"] == platform.python_version()
    page = io.StringIO()
    Console(file=page, width=200).print(render(diagnosis))
    for title in ("ONNX Runtime", "DeepSparse", "TensorRT", "VNNI", "AMX", "torch"):
        if title in ("VNNI", "AMX") and platform.machine() != "x86_64":
            continue
        assert title in page.getvalue()
    solvers = diagnosis.as_dict()["solvers"]
    assert solvers["works"] == native.is_available()
    answer = f"yes, with {solvers['instruction_set']}" if solvers["works"] else "no: "
    assert f"compiled solvers │ {answer}" in re.sub(" +", " ", page.getvalue())
    kernels = diagnosis.as_dict()["sparse_kernels"]
    assert kernels["works"] == sparse.is_available()
    answer = f"yes, with {kernels['instruction_set']}" if kernels["works"] else "no: "
    assert f"sparse kernels │ {answer}" in re.sub(" +", " ", page.getvalue())


@pytest.mark.skipif(not native.is_available(), reason="the compiled solvers are missing here")
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_the_compiled_solvers_are_tried(name: str) -> None:
    with ExitStack() as stack:
        try:
            stack.enter_context(native.use_instruction_set(name))
        except ValueError:
            pytest.skip(f"this processor or this build lacks {name}")
        assert try_solvers() == SolverInfo(True, name, None)


def test_compiled_solvers_that_are_missing_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_find", lambda: missing("not built: install [g++]"))
    assert try_solvers() == SolverInfo(False, None, "not built: install [g++]")
    diagnosis = replace(diagnose(), solvers=try_solvers())
    page = io.StringIO()
    Console(file=page, width=200).print(render(diagnosis))
    assert "no: not built: install [g++]" in page.getvalue()


@pytest.mark.skipif(not native.is_available(), reason="the compiled solvers are missing here")
def test_compiled_solvers_that_compute_another_thing_do_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = SimpleNamespace(
        obc_prune_columns=lambda *arguments: 0,  # says it is done, and did nothing
        obc_instruction_set=native.library().obc_instruction_set,
    )
    monkeypatch.setattr(native, "library", lambda: library)
    found = try_solvers()
    assert not found.works
    assert "wrong result" in str(found.reason)


@pytest.mark.skipif(not sparse.is_available(), reason="the sparse kernels are missing here")
@pytest.mark.parametrize("name", sparse.INSTRUCTION_SETS)
def test_the_sparse_kernels_are_tried(name: str) -> None:
    with ExitStack() as stack:
        try:
            stack.enter_context(sparse.use_instruction_set(name))
        except ValueError:
            pytest.skip(f"this processor or this build lacks {name}")
        assert try_sparse_kernels() == SparseKernelsInfo(True, name, None)


def test_sparse_kernels_that_are_missing_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = missing("not built: install [g++]")
    monkeypatch.setattr(sparse, "_find", lambda: gone)
    assert try_sparse_kernels() == SparseKernelsInfo(False, None, "not built: install [g++]")


@pytest.mark.skipif(not sparse.is_available(), reason="the sparse kernels are missing here")
def test_sparse_kernels_that_onnxruntime_cannot_load_say_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sparse, "library_path", lambda: tmp_path / "nothing.so")
    found = try_sparse_kernels()
    assert not found.works
    assert "nothing.so" in str(found.reason)


def test_a_runtime_that_cannot_run_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "probe.onnx"
    broken.write_bytes(b"no graph")
    info = try_runtime(onnxruntime_cpu.info(), broken)
    assert not info.works
    assert info.reason is not None
    assert "probe.onnx" in info.reason


def test_a_runtime_that_computes_another_thing_does_not_work(models: OnnxBuilder) -> None:
    from onnx import helper

    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    x = models.x
    models.x = x.reshape(-1)[:16].reshape(1, 16)
    try:
        path = models.save("other", nodes, {}, output=(1, 16))
    finally:
        models.x = x
    info = try_runtime(onnxruntime_cpu.info(), path)
    assert not info.works
    assert "wrong result" in str(info.reason)


@needs_deepsparse
def test_deepsparse_is_found_with_its_licence() -> None:
    info = next(info for info in diagnose().runtimes if info.name == "deepsparse")
    assert info.works, info.reason
    assert info.version == "1.8.0"
    assert info.licence is not None
    assert "not production" in info.licence


@pytest.mark.parametrize(
    ("features", "machine", "name", "present", "said"),
    [
        (("avx2",), "x86_64", "VNNI", False, "saturate"),
        (("avx2", "avx_vnni"), "x86_64", "VNNI", True, "exact"),
        (("avx2", "avx512_vnni"), "x86_64", "VNNI", True, "exact"),
        (("avx2",), "x86_64", "AMX", False, "no tile products"),
        (("avx2", "amx_int8"), "x86_64", "AMX", True, "dense int8"),
        ((), "x86_64", "AVX2", False, "DeepSparse does not run"),
        (("asimddp",), "aarch64", "SDOT", True, "four at a time"),
        ((), "aarch64", "SDOT", False, "hardly faster"),
    ],
)
def test_what_a_cpu_feature_means(
    features: tuple[str, ...], machine: str, name: str, present: bool, said: str
) -> None:
    (feature,) = [item for item in explain_cpu(features, machine) if item.name == name]
    assert feature.present == present
    assert said in feature.meaning


def test_the_fingerprint_agrees_with_the_system() -> None:
    machine = take_fingerprint()
    assert machine.cpu
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert machine.logical_cores == os.cpu_count()
    assert machine.physical_cores == psutil.cpu_count(logical=False)
    assert machine.usable_cores == len(os.sched_getaffinity(0))
    assert machine.kernel == os.uname().release
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert all(feature in flags for feature in machine.cpu_features)
    json.dumps(machine.as_dict())


def test_runtimes_never_import_torch() -> None:
    code = (
        "import sys\n"
        "from obc_deploy.runtimes import audit, doctor, environments, fingerprint, session\n"
        "doctor.diagnose()\n"
        "assert 'torch' not in sys.modules\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
