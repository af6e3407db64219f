"""A session: one artifact, open in one runtime, in a fresh worker process.

Whatever the runtime does (crash, hang, print, refuse), the caller gets an error of one line, the
worker is gone, and its pipes are closed.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from obc_deploy.errors import (
    ArtifactError,
    ObcDeployError,
    RuntimeFailedError,
    RuntimeMissingError,
)
from obc_deploy.runtimes import onnxruntime_cpu, tensorrt
from obc_deploy.runtimes.contract import (
    DeviceTimes,
    LayerProfile,
    RuntimeInfo,
    SessionOptions,
    TensorSpec,
    TimedSamples,
)
from obc_deploy.runtimes.environments import interpreter_variables
from obc_deploy.runtimes.registry import find_runtime, require_runtime

if TYPE_CHECKING:
    import numpy as np

    from obc_deploy.data import Preprocessing

WORKER = Path(__file__).parent / "worker"
NO_NUMPY = 78
"""The worker's exit code where its interpreter has no numpy."""

PIECE_BYTES = 1 << 20
TAIL_BYTES = 4000
TAIL_CHARACTERS = 300

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class _WorkerEndedError(Exception):
    """The worker closed its end of the pipe."""


class _WorkerSilentError(Exception):
    """The worker did not answer in time."""


def usable_cores() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cores this process may run on: one of each physical core, and their hyper-threads."""
    allowed = sorted(os.sched_getaffinity(0))
    seen: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for core in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        try:
            siblings = topology.read_text(encoding="ascii").strip()
        except OSError:
            siblings = str(core)
        (second if siblings in seen else first).append(core)
        seen.add(siblings)
    return tuple(first), tuple(second)


def _cores(threads: int | None) -> tuple[int, ...]:
    physical, hyperthreads = usable_cores()
    usable = (*physical, *hyperthreads)
    if threads is None:
        threads = len(physical)
    if not 1 <= threads <= len(usable):
        raise RuntimeFailedError(
            f"{threads} threads cannot be pinned: this process may use {len(usable)} cores; "
            f"ask for 1 to {len(usable)} threads"
        )
    return usable[:threads]


def _tail(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - TAIL_BYTES))
    text = _ESCAPES.sub("", log.read().decode("utf-8", "replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-TAIL_CHARACTERS:]


def _one_line(text: str) -> str:
    line = " ".join(_ESCAPES.sub("", text).split())
    if len(line) <= TAIL_CHARACTERS:
        return line
    # Native code likes to put the path of its source first and what went wrong last.
    return f"{line[: TAIL_CHARACTERS // 3]} ... {line[-2 * TAIL_CHARACTERS // 3 :]}"


def _end(process: subprocess.Popen[bytes], fds: tuple[int, int], log: IO[bytes]) -> None:
    """Kill the worker and everything it started, reap it, and close what we hold. Never raises."""
    for fd in fds:
        os.close(fd)
    if process.poll() is None:
        try:
            # The worker leads a session of its own; SIGKILL also ends a stopped process.
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:
            process.kill()
        process.wait()
    log.close()


class _Worker:
    """The process, its two pipes and its log."""

    def __init__(self, python: Path, variables: Mapping[str, str]) -> None:
        requests, self._write = os.pipe()
        self._read, responses = os.pipe()
        # Open until the finalizer ends it: not a context.
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                [python, "-s", WORKER, str(requests), str(responses)],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=(requests, responses),
                env=dict(variables),
                start_new_session=True,
            )
        except BaseException as error:
            os.close(self._write)
            os.close(self._read)
            self.log.close()
            if isinstance(error, OSError):
                raise RuntimeMissingError(
                    f"'{python}' cannot be started ({error.strerror}); install the runtime again"
                ) from error
            raise
        finally:
            os.close(requests)
            os.close(responses)
        os.set_blocking(self._write, False)
        os.set_blocking(self._read, False)
        self.end = weakref.finalize(self, _end, self.process, (self._write, self._read), self.log)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _WorkerSilentError

    def send(self, header: dict[str, Any], arrays: Mapping[str, Any], deadline: float) -> None:
        """Write one frame."""
        from obc_deploy.runtimes.worker.worker_framing import encode_frame

        for whole in list(encode_frame(header, arrays)):
            piece = whole
            while piece:
                self._wait(self._write, select.POLLOUT, deadline)
                try:
                    piece = piece[os.write(self._write, piece[:PIECE_BYTES]) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise _WorkerEndedError from None

    def receive(self, deadline: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read one frame."""
        from obc_deploy.runtimes.worker.worker_framing import decode_frame

        def read(size: int) -> bytearray:
            data = bytearray()
            while len(data) < size:
                self._wait(self._read, select.POLLIN, deadline)
                try:
                    piece = os.read(self._read, min(size - len(data), PIECE_BYTES))
                except BlockingIOError:
                    continue
                if not piece:
                    raise _WorkerEndedError
                data += piece
            return data

        return decode_frame(read)


@dataclass(frozen=True)
class _Opened:
    """What the worker said when it had loaded the artifact."""

    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: dict[str, Any]


def _specs(described: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in described
    )


class Session:
    """An artifact that can be run, timed and profiled; made by `open_session`.

    A context manager; one thread at a time may use it. After a crash or a hang it is closed, after
    refused inputs it can be used on.

    Attributes:
        runtime: name of the runtime.
        version: its version.
        path: the artifact.
        threads: threads it computes with.
        cores: the cores it is pinned to.
        batch_size: what it was opened for.
        inputs: what `run` takes.
        outputs: what `run` returns.
        facts: what the runtime says about the loaded artifact ("fraction_native" of DeepSparse).
        pid: the worker's process id.
        versions: of the worker's "python" and "numpy".
    """

    def __init__(
        self,
        worker: _Worker,
        info: RuntimeInfo,
        path: Path,
        cores: tuple[int, ...],
        batch_size: int,
        timeout_s: float,
        options: SessionOptions,
    ) -> None:
        self._worker = worker
        self._info = info
        self._timeout_s = timeout_s
        self.runtime = info.name
        self.path = path
        self.cores = cores
        self.threads = len(cores)
        self.batch_size = batch_size
        self.pid = worker.process.pid
        greeting, _ = self._ask("hello", {})
        self.versions: dict[str, str] = greeting["versions"]
        header, _ = self._ask(
            "open",
            {
                "runtime": info.name,
                "path": str(path.absolute()),
                "cores": list(cores),
                "batch_size": batch_size,
                "options": options.as_dict(),
            },
        )
        opened = _Opened(
            header["version"],
            _specs(header["inputs"]),
            _specs(header["outputs"]),
            header["facts"],
        )
        self.version = opened.version
        self.inputs = opened.inputs
        self.outputs = opened.outputs
        self.facts = opened.facts

    def __repr__(self) -> str:
        state = "open" if self._worker.end.alive else "closed"
        return f"<{state} session of {self.runtime} on '{self.path}', {self.threads} threads>"

    def __enter__(self) -> Session:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End the worker; nothing happens the second time."""
        self._worker.end()

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for one set of inputs by name.

        Raises:
            RuntimeFailedError: inputs that do not fit, or the runtime failed, crashed or hung.
        """
        self._check_inputs(inputs)
        _, outputs = self._ask("run", {}, self._ordered(inputs))
        return outputs

    def time(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        warmup: int = 10,
        samples: int = 100,
        end_to_end: Preprocessing | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> TimedSamples:
        """Milliseconds of each run, measured inside the worker.

        Args:
            inputs: the network's inputs; raw ones (bytes or floats) with `end_to_end`.
            warmup: runs that do not count, returned apart.
            samples: runs that count.
            end_to_end: time pre-processing, inference and post-processing (softmax and argmax of
                the first output) instead of inference alone.
            progress: called now and then with the number of runs done.

        Raises:
            RuntimeFailedError: as in `run`; the time limit holds between two signs of life.
        """
        if warmup < 0 or samples < 1:
            raise RuntimeFailedError(
                f"{warmup} warm-up runs and {samples} samples cannot be timed; "
                "ask for 0 or more and 1 or more"
            )
        self._check_inputs(inputs, raw=end_to_end is not None)
        preprocessing = None if end_to_end is None else end_to_end.as_dict()
        request = {"warmup": warmup, "samples": samples, "preprocessing": preprocessing}
        _, taken = self._ask("time", request, self._ordered(inputs), progress=progress)
        return TimedSamples(taken["warmup_ms"], taken["samples_ms"])

    def time_on_device(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        warmup: int = 10,
        samples: int = 100,
        progress: Callable[[int], None] | None = None,
    ) -> DeviceTimes:
        """Milliseconds between CUDA events: of the engine alone, and with host-device copies.

        `time` says what a caller waits for, all of it; here the device keeps time.

        Args:
            inputs: the network's inputs.
            warmup: runs of either kind that do not count.
            samples: runs of either kind that count.
            progress: called now and then with the number of runs done.

        Raises:
            RuntimeFailedError: the runtime computes on the CPU; or as in `run`.
        """
        if warmup < 0 or samples < 1:
            raise RuntimeFailedError(
                f"{warmup} warm-up runs and {samples} samples cannot be timed; "
                "ask for 0 or more and 1 or more"
            )
        self._check_inputs(inputs)
        request = {"warmup": warmup, "samples": samples}
        _, taken = self._ask("time_on_device", request, self._ordered(inputs), progress=progress)
        return DeviceTimes(taken["compute_ms"], taken["with_copies_ms"])

    def profile(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        warmup: int = 3,
        iterations: int = 10,
        optimized_model: Path | None = None,
    ) -> list[LayerProfile]:
        """The runtime's own schedule, step by step, with milliseconds.

        ONNX Runtime knows a region of our sparse operators as one step; these are run as the nodes
        that they were before they were joined.

        Args:
            inputs: the network's inputs.
            warmup: runs that do not count.
            iterations: runs that count.
            optimized_model: where ONNX Runtime writes the graph it really runs.

        Raises:
            RuntimeFailedError: as in `run`.
        """
        self._check_inputs(inputs)
        options = {"optimized_model": str(optimized_model)} if optimized_model else {}
        with tempfile.TemporaryDirectory(prefix="obc-profile-") as folder:
            if self.runtime == onnxruntime_cpu.NAME:
                from obc_deploy.runtimes.regions import separated_copy

                if copy := separated_copy(self.path, Path(folder)):
                    options["model"] = str(copy)
            request = {"warmup": warmup, "iterations": iterations, "options": options}
            header, _ = self._ask("profile", request, self._ordered(inputs))
        return [
            LayerProfile(
                **{
                    **layer,
                    "outputs": tuple(layer.get("outputs", ())),
                    "nodes": tuple(layer.get("nodes", ())),
                }
            )
            for layer in header["layers"]
        ]

    def _ordered(
        self, inputs: Mapping[str, np.ndarray[Any, Any]]
    ) -> dict[str, np.ndarray[Any, Any]]:
        return {spec.name: inputs[spec.name] for spec in self.inputs}

    def _check_inputs(
        self, inputs: Mapping[str, np.ndarray[Any, Any]], *, raw: bool = False
    ) -> None:
        wanted = [spec.name for spec in self.inputs]
        if sorted(inputs) != sorted(wanted):
            raise RuntimeFailedError(
                f"inputs {sorted(inputs)} were given and '{self.path.name}' takes {wanted}; "
                "name exactly these"
            )
        for index, spec in enumerate(self.inputs):
            array = inputs[spec.name]
            if raw and index == 0:
                continue
            fits = len(array.shape) == len(spec.shape) and all(
                size == wanted_size or not isinstance(wanted_size, int)
                for size, wanted_size in zip(array.shape, spec.shape, strict=True)
            )
            if not fits or str(array.dtype) != spec.dtype:
                raise RuntimeFailedError(
                    f"input '{spec.name}' is {array.dtype} {array.shape} and '{self.path.name}' "
                    f"takes {spec.dtype} {spec.shape}; convert it"
                )

    def _ask(
        self,
        request: str,
        header: dict[str, Any],
        arrays: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if not self._worker.end.alive:
            raise RuntimeFailedError(
                f"the session of {self.runtime} on '{self.path}' is closed; open a new one"
            )
        from obc_deploy.runtimes.worker.worker_framing import FramingError

        try:
            deadline = time.monotonic() + self._timeout_s
            self._worker.send({**header, "request": request}, arrays or {}, deadline)
            while True:
                answer, outputs = self._worker.receive(time.monotonic() + self._timeout_s)
                if "progress" not in answer:
                    break
                if progress is not None:
                    progress(answer["progress"])
        except (_WorkerEndedError, _WorkerSilentError, FramingError) as error:
            failure = self._failure(request, error)
            self.close()
            raise failure from None
        except BaseException:
            # An interrupt in the middle of a frame leaves a conversation nobody can resume.
            self.close()
            raise
        if "error" in answer:
            raise self._reported(request, answer["error"])
        return answer, outputs

    def _failure(self, request: str, error: Exception) -> ObcDeployError:
        title = self._info.title
        place = f"at '{request}' on '{self.path}'"
        process = self._worker.process
        if isinstance(error, _WorkerSilentError):
            said = _tail(self._worker.log)
            return RuntimeFailedError(
                f"{title} did not answer within {self._timeout_s:g} s {place} (last words: "
                f"{said or 'none'}); its worker was ended: raise timeout_s, or try fewer threads"
            )
        if isinstance(error, _WorkerEndedError):
            try:
                code = process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                code = 0
            said = _tail(self._worker.log)
            if code == NO_NUMPY:
                return RuntimeMissingError(
                    f"{title}'s interpreter '{self._info.python}' has no numpy ({said}); "
                    f"run: {self._info.install_command}"
                )
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            if code == -signal.SIGKILL:
                how += ", out of memory?"
            return RuntimeFailedError(
                f"{title}'s worker died ({how}) {place} (last words: {said or 'none'}); "
                "check the file with `obc-deploy doctor` and another runtime"
            )
        return RuntimeFailedError(f"{title}'s worker spoke no protocol {place}: {error}; reinstall")

    def _reported(self, request: str, error: dict[str, str]) -> ObcDeployError:
        title, message = self._info.title, _one_line(error["message"])
        if error["kind"] == "missing":
            return RuntimeMissingError(
                f"{title} cannot be imported by '{self._info.python}' ({message}); "
                f"run: {self._info.install_command}"
            )
        if error["kind"] == "device":
            return RuntimeMissingError(
                f"{title} runs on an NVIDIA GPU: {message}; run: {tensorrt.DRIVER_COMMAND}"
            )
        if error["kind"] == "explained":
            return RuntimeFailedError(f"{title} failed at '{request}' on '{self.path}': {message}")
        if error["kind"] == "artifact":
            return ArtifactError(
                f"{title} cannot read '{self.path}' ({message}); export the run again"
            )
        return RuntimeFailedError(
            f"{title} failed at '{request}' on '{self.path}': {message}; "
            "export for this runtime's target, or choose another runtime"
        )


def _variables(info: RuntimeInfo, environment: Mapping[str, str], threads: int) -> dict[str, str]:
    count = str(threads)
    pinned = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        **environment,
    }
    import sys

    if info.python == Path(sys.executable):
        return {**os.environ, **pinned}
    return interpreter_variables(pinned)


def open_session(
    runtime: str,
    path: Path | str,
    *,
    threads: int | None = None,
    batch_size: int = 1,
    timeout_s: float = 120.0,
    options: SessionOptions | None = None,
) -> Session:
    """Open an artifact in a runtime, in a fresh worker process.

    Args:
        runtime: name of the runtime.
        path: the ONNX file; for TensorRT the engine.
        threads: threads to compute with, each pinned to a core; the physical cores where None.
        batch_size: DeepSparse compiles for one batch size; ONNX Runtime takes the graph's.
        timeout_s: seconds any one request may take.
        options: what else the runtime is told.

    Raises:
        RuntimeMissingError: the runtime is unknown, not installed, or cannot be imported.
        ArtifactError: the file is missing or no ONNX graph.
        RuntimeFailedError: the runtime refuses the graph, crashed or hung.
    """
    from obc_deploy.runtimes.onnx_graph import read_onnx_graph

    artifact = Path(path)
    chosen = options or SessionOptions()
    definition = find_runtime(runtime)
    if runtime == tensorrt.NAME:
        # What is wrong with an engine can be said without a GPU, so that is said first.
        chosen = replace(chosen, modules=tensorrt.check_engine(artifact).modules)
    info = require_runtime(runtime)
    assert info.python is not None
    if runtime != tensorrt.NAME:
        graph = read_onnx_graph(artifact)
        refusals = definition.refusals(graph)
        if refusals:
            raise RuntimeFailedError(f"{info.title} will not load '{artifact}': {refusals[0]}")
    cores = _cores(threads)
    if batch_size < 1:
        raise RuntimeFailedError(f"batch size {batch_size} is no batch; ask for 1 or more")
    if runtime == onnxruntime_cpu.NAME:
        needed = onnxruntime_cpu.libraries(graph.domains)
        more = tuple(path for path in needed if path not in chosen.custom_ops)
        chosen = replace(chosen, custom_ops=(*chosen.custom_ops, *more))
    worker = _Worker(info.python, _variables(info, definition.environment, len(cores)))
    try:
        return Session(worker, info, artifact, cores, batch_size, timeout_s, chosen)
    except BaseException:
        worker.end()
        raise
