"""ONNX Runtime on the CPU, inside a worker."""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
from collections import defaultdict
from typing import Any, Dict, List, Tuple

import onnxruntime
from worker_backend import BadArtifact, Refused

VERSION = onnxruntime.__version__

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}
_CORRUPT = {"InvalidProtobuf", "NoSuchFile", "NoModel", "InvalidGraph"}
_SPIN_US = 200


def _idle() -> Tuple[str, str]:
    """For how long a pool waits for its next run by spinning.

    Sessions of several variants are measured in turn on the same cores, and by itself it would spin
    for some 50 ms, which the next one would pay for. Not at all, and each run would first wake its
    threads, which takes longer than a small network; but older versions know nothing between.
    """
    release = tuple(int(part) for part in re.findall(r"\d+", VERSION)[:2])
    if release >= (1, 27):
        return "session.intra_op.spin_duration_us", str(_SPIN_US)
    return "session.force_spinning_stop", "1"


_IDLE = _idle()


def _spec(value: Any) -> Dict[str, Any]:
    shape = [size if isinstance(size, int) else (size or None) for size in value.shape]
    dtype = _DTYPES.get(value.type, value.type[len("tensor(") : -1])
    return {"name": value.name, "shape": shape, "dtype": dtype}


class Backend:
    """One artifact, loaded; one thread more or less is the only freedom ONNX Runtime gets."""

    def __init__(self, path: str, threads: int, batch_size: int, options: Dict[str, Any]) -> None:
        self.version = VERSION
        self._path = path
        self._threads = threads
        self._options = options
        self._session = self._open(path, self._session_options())
        self.inputs = [_spec(value) for value in self._session.get_inputs()]
        self.outputs = [_spec(value) for value in self._session.get_outputs()]
        self.facts: Dict[str, Any] = {"providers": self._session.get_providers()}

    def _session_options(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry(*_IDLE)
        if not self._options.get("optimize", True):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for library in self._options.get("custom_ops", []):
            options.register_custom_ops_library(library)
        return options

    def _open(self, path: str, options: Any) -> Any:
        try:
            return onnxruntime.InferenceSession(
                path, sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            kind = BadArtifact if type(error).__name__ in _CORRUPT else Refused
            raise kind(str(error)) from error

    def infer(self, feed: Dict[str, Any]) -> List[Any]:
        """All outputs, in the graph's order."""
        return self._session.run(None, feed)

    def profile(
        self, feed: Dict[str, Any], warmup: int, iterations: int, options: Dict[str, Any]
    ) -> Dict[str, Any]:
        """Median milliseconds a node, from ONNX Runtime's own trace of a second session."""
        with tempfile.TemporaryDirectory(prefix="obc-profile-") as folder:
            traced = self._session_options()
            traced.enable_profiling = True
            traced.profile_file_prefix = os.path.join(folder, "trace")
            if options.get("optimized_model"):
                traced.optimized_model_filepath = options["optimized_model"]
            session = self._open(options.get("model", self._path), traced)
            for _ in range(warmup + iterations):
                session.run(None, feed)
            with open(session.end_profiling(), encoding="utf-8") as trace:
                events = json.load(trace)
        durations: Dict[str, List[float]] = defaultdict(list)
        kinds: Dict[str, str] = {}
        for event in sorted(events, key=lambda event: event.get("ts", 0)):
            name = event.get("name", "")
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                node = name[: -len("_kernel_time")]
                durations[node].append(event["dur"] / 1e3)
                kinds[node] = event["args"].get("op_name", "")
        layers = []
        for node, taken in durations.items():
            kept = taken[warmup:] or taken
            layers.append({"name": node, "kind": kinds[node], "ms": statistics.median(kept)})
        return {"layers": layers, "facts": {}}
