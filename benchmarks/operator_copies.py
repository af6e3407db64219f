"""How long an operator takes within a network, of which nothing else is measured.

    time of one = (time of a graph with 1 + n copies - time of a graph with one) / n

All copies read the same input; each has weights of its own, as the layers of a network do. ONNX
Runtime's trace would say the same of a single operator, but in whole microseconds and with 2 to 3
of its own in each: as much as a small layer takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from obc_deploy.errors import MeasurementError
from obc_deploy.runtimes import sparse

ENOUGH_WORK = 200_000_000
"""Multiply-accumulates of the copies beyond the first one: dense, half a millisecond or more."""
MOST_COPIES = 24
WAKING_S = 0.005
"""Inferences that do not count go on for so long: a thread that sleeps takes a while to wake, and
in a small virtual machine a tick of the scheduler, 4 ms, to come to a core of its own."""
ATTEMPTS = 10


def copies_for(work: float) -> int:
    """So many copies beyond the first one as a difference of two times can be trusted of.

    Args:
        work: multiply-accumulates of one.
    """
    return max(2, min(MOST_COPIES, math.ceil(ENOUGH_WORK / work)))


class Copies:
    """Two sessions, of a graph with one copy of an operator and of one with some more."""

    def __init__(
        self, graph: Callable[[int], bytes], more: int, threads: int, x: npt.NDArray[np.uint8]
    ) -> None:
        """Open both.

        Args:
            graph: the file's content, by the number of copies: uint8 input "x", one uint8 output of
                each copy, all of the same shape.
            more: copies of the second graph beyond the first one.
            threads: of each session.
            x: the input.
        """
        self._more = more
        self._one = _Bound(graph(1), threads, x)
        self._several = _Bound(graph(1 + more), threads, x)

    @property
    def output(self) -> npt.NDArray[np.uint8]:
        """What the first copy computes."""
        return self._one.outputs()[0]

    def microseconds(self, inferences: int) -> float:
        """Of one operator: the difference of medians, shared out.

        Args:
            inferences: of each graph that count.

        Raises:
            MeasurementError: the copies took no time.
        """
        for _ in range(ATTEMPTS):
            one, several = self._one.seconds(inferences), self._several.seconds(inferences)
            if several > one:
                return 1e6 * (several - one) / self._more
        raise MeasurementError(
            f"{1 + self._more} copies took no longer than one, {ATTEMPTS} times: noise hides an "
            "operator this small; give more --inferences"
        )


class _Bound:
    """A session with its input in place, and outputs that are written to the same memory in turn.

    A network's layers find their outputs' memory in the caches too: ONNX Runtime gives each what an
    earlier one no longer needs. It begins with a cache line there, and so it does here.
    """

    def __init__(self, content: bytes, threads: int, x: npt.NDArray[np.uint8]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads wait for the next run by spinning, so that it finds them awake, as it does in use;
        # but not for 50 ms, as they would by themselves: other sessions have their turn then.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
        options.log_severity_level = 3
        options.register_custom_ops_library(str(sparse.library_path()))
        self._session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        self._x = onnxruntime.OrtValue.ortvalue_from_numpy(x)
        shape = self.outputs()[0].shape
        memory = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, "cpu")
        self._binding: Any = self._session.io_binding()
        self._binding.bind_ortvalue_input("x", self._x)
        for output in self._session.get_outputs():
            self._binding.bind_ortvalue_output(output.name, memory)

    def outputs(self) -> list[npt.NDArray[np.uint8]]:
        found: list[npt.NDArray[np.uint8]] = self._session.run(None, {"x": self._x.numpy()})
        return found

    def seconds(self, inferences: int) -> float:
        """The median of some inferences, once the threads are awake."""
        awake = time.perf_counter() + WAKING_S
        self._inference_s()
        while time.perf_counter() < awake:
            self._inference_s()
        return median(self._inference_s() for _ in range(inferences))

    def _inference_s(self) -> float:
        begin = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - begin
