"""CUDA's driver interface, as far as one engine needs it: memory, a stream, events, graphs.

The driver (libcuda.so.1) is there wherever a GPU works, whatever packages are; its handles are
those that TensorRT takes. Nothing else of this project is imported, so either side of a session
may use it.
"""

from __future__ import annotations

import ctypes
from typing import Any, List, Optional, Tuple

import numpy as np

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY = 2
STUB_LIBRARY = 34
NO_DEVICE = 100
_THREAD_LOCAL_CAPTURE = 1
_NON_BLOCKING = 1
_MAJOR, _MINOR = 75, 76

_P, _SIZE, _INT, _UINT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
_SIGNATURES = {
    "cuInit": [_UINT],
    "cuDriverGetVersion": [_P],
    "cuDeviceGetCount": [_P],
    "cuDeviceGet": [_P, _INT],
    "cuDeviceGetName": [_P, _INT, _INT],
    "cuDeviceGetAttribute": [_P, _INT, _INT],
    "cuDevicePrimaryCtxRetain": [_P, _INT],
    "cuCtxSetCurrent": [_P],
    "cuMemGetInfo_v2": [_P, _P],
    "cuMemAlloc_v2": [_P, _SIZE],
    "cuMemFree_v2": [ctypes.c_uint64],
    "cuMemHostAlloc": [_P, _SIZE, _UINT],
    "cuMemFreeHost": [_P],
    "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, _P, _SIZE, _P],
    "cuMemcpyDtoHAsync_v2": [_P, ctypes.c_uint64, _SIZE, _P],
    "cuStreamCreate": [_P, _UINT],
    "cuStreamSynchronize": [_P],
    "cuStreamBeginCapture_v2": [_P, _INT],
    "cuStreamEndCapture": [_P, _P],
    "cuGraphInstantiateWithFlags": [_P, _P, ctypes.c_ulonglong],
    "cuGraphDestroy": [_P],
    "cuGraphExecDestroy": [_P],
    "cuGraphLaunch": [_P, _P],
    "cuEventCreate": [_P, _UINT],
    "cuEventRecord": [_P, _P],
    "cuEventSynchronize": [_P],
    "cuEventElapsedTime": [_P, _P, _P],
    "cuGetErrorString": [_INT, _P],
}


class CudaError(Exception):
    """The driver is missing, finds no GPU, or a call failed.

    Attributes:
        code: the driver's error code; None where there is no driver.
    """

    def __init__(self, message: str, code: Optional[int] = None) -> None:
        super().__init__(message)
        self.code = code


def _load() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = _INT
    except (OSError, AttributeError) as error:
        missing = "%s is missing" % LIBRARY if "No such file" in str(error) else str(error)
        raise CudaError("no CUDA driver is here (%s)" % missing) from error
    return library


class Driver:
    """The loaded driver; its calls raise `CudaError`."""

    def __init__(self) -> None:
        self._library = _load()
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call one function of the driver.

        Raises:
            CudaError: it failed.
        """
        code = getattr(self._library, name)(*arguments)
        if not code:
            return
        if code == NO_DEVICE:
            raise CudaError("the CUDA driver finds no GPU", code)
        if code == STUB_LIBRARY:
            raise CudaError("no CUDA driver is here (%s is a stub to link with)" % LIBRARY, code)
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"unknown error").decode("utf-8", "replace")
        raise CudaError("%s: %s (CUDA error %d)" % (name, said, code), code)

    def handle(self, name: str, *arguments: Any) -> int:
        """What a function writes to the place that its first argument points to."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made.value or 0

    def handle_of_capture(self, stream: int) -> int:
        """The graph that a capture on a stream has come to."""
        graph = ctypes.c_void_p()
        self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        return graph.value or 0

    def number(self, name: str, *arguments: Any) -> int:
        """The same for an int."""
        made = _INT()
        self.call(name, ctypes.byref(made), *arguments)
        return made.value


class Device:
    """The first visible GPU.

    Attributes:
        driver: the loaded driver.
        name: product name.
        capability: compute capability.
    """

    def __init__(self) -> None:
        self.driver = driver = Driver()
        if not driver.number("cuDeviceGetCount"):
            raise CudaError("the CUDA driver finds no GPU", NO_DEVICE)
        self._ordinal = driver.number("cuDeviceGet", 0)
        text = ctypes.create_string_buffer(256)
        driver.call("cuDeviceGetName", text, len(text), self._ordinal)
        self.name = text.value.decode("utf-8", "replace")
        self.capability: Tuple[int, int] = (
            driver.number("cuDeviceGetAttribute", _MAJOR, self._ordinal),
            driver.number("cuDeviceGetAttribute", _MINOR, self._ordinal),
        )

    def make_current(self) -> None:
        """Use the context that CUDA's runtime, and TensorRT with it, share."""
        context = self.driver.handle("cuDevicePrimaryCtxRetain", self._ordinal)
        self.driver.call("cuCtxSetCurrent", context)

    def memory(self) -> Tuple[int, int]:
        """Free and total bytes."""
        free, total = _SIZE(), _SIZE()
        self.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value


def why_no_device() -> Optional[str]:
    """Why no GPU can be used here; None where one can."""
    try:
        Device()
    except CudaError as error:
        return str(error)
    return None


class Buffer:
    """Bytes on the device, and as many of pinned memory on the host.

    Attributes:
        address: on the device.
        host: the pinned memory, as an array.
    """

    def __init__(self, driver: Driver, shape: Tuple[int, ...], dtype: "np.dtype[Any]") -> None:
        self._driver = driver
        count = 1
        for size in shape:
            count *= size
        self.nbytes = count * dtype.itemsize
        self.address = 0
        self._pinned = 0
        length = max(self.nbytes, 1)
        self.address = driver.handle("cuMemAlloc_v2", length)
        try:
            self._pinned = driver.handle("cuMemHostAlloc", length, 0)
        except CudaError:
            self.free()
            raise
        raw = (ctypes.c_char * length).from_address(self._pinned)
        self.host = np.frombuffer(memoryview(raw), dtype=dtype, count=count).reshape(shape)

    def to_device(self, stream: int) -> None:
        """Enqueue the copy from the host."""
        self._driver.call("cuMemcpyHtoDAsync_v2", self.address, self._pinned, self.nbytes, stream)

    def to_host(self, stream: int) -> None:
        """Enqueue the copy from the device."""
        self._driver.call("cuMemcpyDtoHAsync_v2", self._pinned, self.address, self.nbytes, stream)

    def free(self) -> None:
        """Give both back; the array must not be used any more."""
        if self.address:
            self._driver.call("cuMemFree_v2", self.address)
        if self._pinned:
            self._driver.call("cuMemFreeHost", self._pinned)
        self.address = self._pinned = 0


class Stream:
    """A stream of its own, graphs of what is enqueued to it, and times on the device.

    Attributes:
        handle: the stream, as TensorRT takes it.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.handle = driver.handle("cuStreamCreate", _NON_BLOCKING)
        self._start = driver.handle("cuEventCreate", 0)
        self._end = driver.handle("cuEventCreate", 0)

    def wait(self) -> None:
        """Until all that was enqueued is done."""
        self._driver.call("cuStreamSynchronize", self.handle)

    def capture(self, enqueue: Any) -> int:
        """A graph of what `enqueue()` enqueues, ready to launch.

        Raises:
            CudaError: it cannot be captured; the stream is usable again.
        """
        driver = self._driver
        driver.call("cuStreamBeginCapture_v2", self.handle, _THREAD_LOCAL_CAPTURE)
        try:
            enqueue()
        except Exception as error:
            self._drop_capture()
            raise CudaError("cannot be captured: %s" % error) from error
        graph = driver.handle_of_capture(self.handle)
        try:
            return driver.handle("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            driver.call("cuGraphDestroy", graph)

    def _drop_capture(self) -> None:
        try:
            graph = self._driver.handle_of_capture(self.handle)
        except CudaError:
            return  # a broken capture leaves no graph
        if graph:
            self._driver.call("cuGraphDestroy", graph)

    def launch(self, graph: int) -> None:
        """Enqueue a graph."""
        self._driver.call("cuGraphLaunch", graph, self.handle)

    def drop(self, graphs: List[int]) -> None:
        """Give graphs back."""
        for graph in graphs:
            self._driver.call("cuGraphExecDestroy", graph)

    def timed(self, enqueue: Any) -> float:
        """Milliseconds on the device from before to after what `enqueue()` enqueues."""
        driver = self._driver
        driver.call("cuEventRecord", self._start, self.handle)
        enqueue()
        driver.call("cuEventRecord", self._end, self.handle)
        driver.call("cuEventSynchronize", self._end)
        taken = ctypes.c_float()
        driver.call("cuEventElapsedTime", ctypes.byref(taken), self._start, self._end)
        return taken.value
