from __future__ import annotations

import ast
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import CHANNELS, DEEPSPARSE_MARKS, OnnxBuilder, convolve, needs_deepsparse

from obc_deploy.data import Preprocessing
from obc_deploy.errors import ArtifactError, RuntimeFailedError, RuntimeMissingError
from obc_deploy.runtimes.contract import SessionOptions, TensorSpec
from obc_deploy.runtimes.session import WORKER, Session, open_session, usable_cores

BOTH = [
    "onnxruntime",
    pytest.param("deepsparse", marks=DEEPSPARSE_MARKS),
]


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Neither running nor a zombie."""
    until = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def session(models: OnnxBuilder) -> Session:
    with open_session("onnxruntime", models.float_conv(), threads=1, timeout_s=60) as opened:
        yield opened


def signal_soon(pid: int, number: int) -> threading.Timer:
    timer = threading.Timer(0.3, os.kill, (pid, number))
    timer.start()
    return timer


@pytest.mark.parametrize("runtime", BOTH)
def test_float_outputs_match_a_float64_reference(runtime: str, models: OnnxBuilder) -> None:
    convolved = convolve(models.x, models.weight) + models.bias.reshape(1, -1, 1, 1)
    expected = np.maximum(convolved, 0).mean(axis=(2, 3))
    with open_session(runtime, models.float_conv(), threads=1) as session:
        assert session.inputs == (TensorSpec("x", (1, CHANNELS, 8, 8), "float32"),)
        assert session.outputs == (TensorSpec("y", (1, CHANNELS), "float32"),)
        found = session.run({"x": models.x})
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", BOTH)
@pytest.mark.parametrize("per_channel", [False, True])
def test_integer_outputs_match_integer_arithmetic(
    runtime: str, per_channel: bool, models: OnnxBuilder
) -> None:
    codes = np.clip(np.rint(models.x / models.scale) + 128, 0, 255)
    sums = convolve(codes - 128, models.codes) + models.bias_codes.reshape(1, -1, 1, 1)
    scale = models.weight_scale if per_channel else np.full(CHANNELS, 0.001)
    real = sums * (models.scale * scale.reshape(1, -1, 1, 1))
    steps = np.clip(np.rint(real / models.output_scale) + 128, 0, 255) - 128
    with open_session(runtime, models.qlinear_conv(per_channel=per_channel), threads=1) as session:
        found = session.run({"x": models.x})["y"]
    # A tie may round either way where the runtime multiplies in float32.
    assert np.abs(found / models.output_scale - steps).max() < 1.001
    assert (np.abs(found / models.output_scale - steps) < 1e-3).mean() > 0.99


@pytest.mark.parametrize("runtime", BOTH)
def test_raw_samples_come_back_warm_ups_apart(runtime: str, models: OnnxBuilder) -> None:
    with open_session(runtime, models.float_conv(), threads=1) as session:
        taken = session.time({"x": models.x}, warmup=3, samples=7)
        assert taken.warmup_ms.shape == (3,)
        assert taken.samples_ms.shape == (7,)
        assert (taken.samples_ms > 0).all()
        raw = np.zeros((1, CHANNELS, 8, 8), dtype=np.uint8)
        how = Preprocessing(1 / 255, (0.5,) * CHANNELS, (0.25,) * CHANNELS)
        whole = session.time({"x": raw}, warmup=0, samples=4, end_to_end=how)
        assert whole.warmup_ms.shape == (0,)
        assert whole.samples_ms.shape == (4,)
        assert session.profile({"x": models.x}, warmup=1, iterations=2)


def test_pre_processing_reads_the_first_input_of_the_graph(tmp_path: Path) -> None:
    float_type, byte_type = TensorProto.FLOAT, TensorProto.UINT8
    image = helper.make_tensor_value_info("image", float_type, [1, 3, 2, 2])
    gain = helper.make_tensor_value_info("gain", byte_type, [1])
    output = helper.make_tensor_value_info("y", float_type, [1, 3, 2, 2])
    nodes = [
        helper.make_node("Cast", ["gain"], ["factor"], to=float_type),
        helper.make_node("Mul", ["image", "factor"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [image, gain], [output])
    opset = helper.make_opsetid("", 13)
    path = tmp_path / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    raw = {"gain": np.ones(1, np.uint8), "image": np.zeros((1, 3, 2, 2), np.uint8)}
    with open_session("onnxruntime", path, threads=1) as session:
        assert session.time(
            raw, warmup=0, samples=2, end_to_end=Preprocessing()
        ).samples_ms.shape == (2,)


def test_the_worker_is_pinned_to_its_cores(models: OnnxBuilder) -> None:
    physical, hyperthreads = usable_cores()
    assert {*physical, *hyperthreads} == os.sched_getaffinity(0)
    with open_session("onnxruntime", models.float_conv(), threads=1) as session:
        assert session.cores == physical[:1]
        assert os.sched_getaffinity(session.pid) == set(session.cores)
    with open_session("onnxruntime", models.float_conv()) as session:
        assert session.threads == len(physical)


def test_each_session_has_a_fresh_process(models: OnnxBuilder) -> None:
    path = models.float_conv()
    with (
        open_session("onnxruntime", path, threads=1) as one,
        open_session("onnxruntime", path, threads=1) as other,
    ):
        assert len({one.pid, other.pid, os.getpid()}) == 3
        assert one.versions == {"python": platform.python_version(), "numpy": np.__version__}
    assert gone(one.pid, 0)
    assert gone(other.pid, 0)


def test_the_worker_runs_on_python_3_8_and_hides_no_package() -> None:
    for path in WORKER.glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        assert path.stem.startswith("worker_") or path.stem in ("__init__", "__main__")


def test_profile_names_the_operators(session: Session, models: OnnxBuilder) -> None:
    kinds = [step.kind for step in session.profile({"x": models.x})]
    assert "Conv" in kinds
    assert "Gemm" in kinds


def test_optimizations_can_be_left_out(models: OnnxBuilder) -> None:
    options = SessionOptions(optimize=False)
    with open_session("onnxruntime", models.float_conv(), threads=1, options=options) as session:
        kinds = [step.kind for step in session.profile({"x": models.x})]
    assert kinds == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, r"takes \['x'\]"),
        ({"z": np.zeros((1, CHANNELS, 8, 8), np.float32)}, r"inputs \['z'\]"),
        ({"x": np.zeros((1, CHANNELS, 8, 9), np.float32)}, r"\(1, 16, 8, 9\)"),
        ({"x": np.zeros((CHANNELS, 8, 8), np.float32)}, r"\(16, 8, 8\)"),
        ({"x": np.zeros((1, CHANNELS, 8, 8), np.float64)}, "float64"),
    ],
)
def test_inputs_that_do_not_fit_leave_the_session_usable(
    inputs: dict[str, np.ndarray], said: str, session: Session, models: OnnxBuilder
) -> None:
    with pytest.raises(RuntimeFailedError, match=said) as error:
        session.run(inputs)
    one_line(error)
    assert session.run({"x": models.x})["y"].shape == (1, CHANNELS)


def test_an_error_inside_the_runtime_leaves_the_session_usable(
    session: Session, models: OnnxBuilder
) -> None:
    how = Preprocessing(mean=(0.0, 1.0), std=(1.0, 1.0))
    with pytest.raises(RuntimeFailedError, match="at 'time'") as error:
        session.time({"x": models.x}, end_to_end=how)
    one_line(error)
    assert session.run({"x": models.x})["y"].shape == (1, CHANNELS)


@pytest.mark.parametrize(("warmup", "samples"), [(-1, 5), (0, 0)])
def test_no_samples_are_no_measurement(warmup: int, samples: int, session: Session) -> None:
    with pytest.raises(RuntimeFailedError, match=f"{samples} samples"):
        session.time({}, warmup=warmup, samples=samples)


def test_a_closed_session_says_so(session: Session, models: OnnxBuilder) -> None:
    session.close()
    session.close()
    assert gone(session.pid, 0)
    with pytest.raises(RuntimeFailedError, match="is closed"):
        session.run({"x": models.x})


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07\x12\x00" * 40, None])
@pytest.mark.parametrize("runtime", BOTH)
def test_files_that_are_no_artifact(runtime: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    before = open_descriptors()
    with pytest.raises(ArtifactError, match=r"bad\.onnx") as error:
        open_session(runtime, path)
    one_line(error)
    assert open_descriptors() == before


def test_a_truncated_artifact(models: OnnxBuilder, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    data = models.float_conv().read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=r"cut\.onnx") as error:
        open_session("onnxruntime", path)
    one_line(error)


def test_a_folder_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a folder"):
        open_session("onnxruntime", tmp_path)


def test_a_graph_the_runtime_refuses(models: OnnxBuilder) -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nowhere")
    path = models.save("refused", [node], {})
    before = open_descriptors()
    with pytest.raises((RuntimeFailedError, ArtifactError), match=r"refused\.onnx") as error:
        open_session("onnxruntime", path)
    one_line(error)
    assert open_descriptors() == before


def test_a_graph_of_a_later_opset_is_refused_in_one_line(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [output])
    opset = helper.make_opsetid("", 99)
    path = tmp_path / "later.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    with pytest.raises(RuntimeFailedError, match=r"later\.onnx") as error:
        open_session("onnxruntime", path)
    assert "opset" in one_line(error)


def test_an_unknown_runtime_lists_the_known(models: OnnxBuilder) -> None:
    with pytest.raises(RuntimeMissingError, match="'tflite' is no runtime; choose one of deepsp"):
        open_session("tflite", models.float_conv())


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_threads_without_cores(threads: int, models: OnnxBuilder) -> None:
    with pytest.raises(RuntimeFailedError, match=f"{threads} threads cannot be pinned"):
        open_session("onnxruntime", models.float_conv(), threads=threads)


def test_a_batch_of_nothing(models: OnnxBuilder) -> None:
    with pytest.raises(RuntimeFailedError, match="batch size 0"):
        open_session("onnxruntime", models.float_conv(), batch_size=0)


def test_a_crash_in_the_middle_of_a_request(models: OnnxBuilder) -> None:
    before = open_descriptors()
    session = open_session("onnxruntime", models.float_conv(), threads=1)
    timer = signal_soon(session.pid, signal.SIGSEGV)
    with pytest.raises(RuntimeFailedError, match="died \\(SIGSEGV\\) at 'time'") as error:
        session.time({"x": models.x}, samples=10_000_000)
    timer.join()
    assert "float.onnx" in one_line(error)
    assert gone(session.pid, 0)
    assert open_descriptors() == before
    with pytest.raises(RuntimeFailedError, match="is closed"):
        session.run({"x": models.x})


def test_a_crash_between_two_requests(session: Session, models: OnnxBuilder) -> None:
    os.kill(session.pid, signal.SIGKILL)
    with pytest.raises(RuntimeFailedError, match="SIGKILL, out of memory"):
        session.run({"x": models.x})
    assert gone(session.pid, 0)


def test_a_hang_in_the_middle_of_a_request(models: OnnxBuilder) -> None:
    before = open_descriptors()
    session = open_session("onnxruntime", models.float_conv(), threads=1)
    session._timeout_s = 3.0
    timer = signal_soon(session.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeFailedError, match="did not answer within 3 s at 'time'") as error:
        session.time({"x": models.x}, samples=10_000_000)
    timer.join()
    one_line(error)
    assert gone(session.pid, 0)
    assert open_descriptors() == before


def test_a_worker_that_does_not_read_its_pipe(models: OnnxBuilder) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    path = models.save("wide", nodes, {})
    with open_session("onnxruntime", path, threads=1, timeout_s=30) as session:
        os.kill(session.pid, signal.SIGSTOP)
        session._timeout_s = 1.0
        raw = np.zeros((1, 512, 64, 64), dtype=np.float32)
        with pytest.raises(RuntimeFailedError, match="did not answer within 1 s"):
            session.time({"x": raw}, end_to_end=Preprocessing())
    assert gone(session.pid, 0)


def test_a_long_measurement_outlives_the_time_limit_while_it_progresses(
    session: Session, models: OnnxBuilder
) -> None:
    session._timeout_s = 4.0
    rate = 20 / session.time({"x": models.x}, samples=20).samples_ms.sum() * 1000
    told: list[int] = []
    samples = int(rate * 5) + 100
    taken = session.time({"x": models.x}, warmup=0, samples=samples, progress=told.append)
    assert taken.samples_ms.shape == (samples,)
    assert told == sorted(told)


def test_many_sessions_leave_nothing_behind(models: OnnxBuilder) -> None:
    before = open_descriptors()
    pids = []
    for _ in range(3):
        session = open_session("onnxruntime", models.float_conv(), threads=1)
        pids.append(session.pid)
        del session
    assert all(gone(pid, 0) for pid in pids)
    assert open_descriptors() == before


SCRIPT = """
import signal, sys
import numpy as np
from obc_deploy.runtimes.session import open_session
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
session = open_session("onnxruntime", sys.argv[1], threads=1)
print(session.pid, flush=True)
session.time({"x": np.zeros((1, 16, 8, 8), np.float32)}, samples=100_000_000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_worker_ends_with_its_caller(number: signal.Signals, models: OnnxBuilder) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, models.float_conv()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with caller:
        assert caller.stdout is not None
        worker = int(caller.stdout.readline())
        time.sleep(0.3)
        assert Path(f"/proc/{worker}").exists()
        caller.send_signal(number)
        try:
            caller.wait(timeout=20)
        finally:
            caller.kill()
    assert gone(worker)


@needs_deepsparse
def test_deepsparse_refuses_a_later_file_format(models: OnnxBuilder) -> None:
    with pytest.raises(RuntimeFailedError, match="IR version 10") as error:
        open_session("deepsparse", models.float_conv(ir_version=10))
    assert "export with target deepsparse" in one_line(error)


@needs_deepsparse
def test_deepsparse_refuses_a_later_opset(models: OnnxBuilder) -> None:
    with pytest.raises(RuntimeFailedError, match="opset 20") as error:
        open_session("deepsparse", models.float_conv(opset=20))
    assert "export with target deepsparse" in one_line(error)


@needs_deepsparse
def test_deepsparse_compiles_for_another_batch_size(models: OnnxBuilder) -> None:
    x = np.concatenate([models.x, -models.x, models.x])
    with open_session("deepsparse", models.float_conv(), threads=1, batch_size=3) as session:
        assert session.inputs[0].shape == (3, CHANNELS, 8, 8)
        found = session.run({"x": x})["y"]
    assert found.shape == (3, CHANNELS)
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)
