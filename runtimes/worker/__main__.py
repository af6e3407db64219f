"""The worker's loop: read a request, answer it, until the session closes the pipe."""

from __future__ import annotations

import argparse
import os
import platform
import select
import sys
import threading
import traceback
from typing import Any, Dict, Optional, Tuple

NO_NUMPY = 78
"""Exit code where the interpreter has no numpy: without it not even an error can be framed."""

try:
    import numpy as np
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(NO_NUMPY)

from worker_backend import BadArtifact, Explained, Missing, NoDevice, Refused  # noqa: E402
from worker_framing import Arrays, Header, decode_frame, encode_frame  # noqa: E402
from worker_timing import take_samples  # noqa: E402

ERROR_KINDS = (
    (Missing, "missing"),
    (NoDevice, "device"),
    (BadArtifact, "artifact"),
    (Explained, "explained"),
    (Refused, "refused"),
)


class Pipes:
    """The two ends that this process holds."""

    def __init__(self, requests: int, responses: int) -> None:
        self._requests = requests
        self._responses = responses

    def read(self, size: int) -> bytearray:
        """Exactly `size` bytes of the request pipe."""
        data = bytearray()
        while len(data) < size:
            piece = os.read(self._requests, min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError("the session closed the pipe")
            data += piece
        return data

    def answer(self, header: Header, arrays: Arrays) -> None:
        """Write one frame; nothing is written where a value cannot travel."""
        for piece in list(encode_frame(header, arrays)):
            while piece:
                piece = piece[os.write(self._responses, piece) :]

    def exit_with_session(self) -> None:
        """End this process as soon as the session's end of the request pipe is gone."""
        poll = select.poll()
        poll.register(self._requests, 0)
        poll.poll()
        os._exit(0)


def _load(runtime: str) -> Any:
    try:
        if runtime == "onnxruntime":
            import worker_onnxruntime as module
        elif runtime == "deepsparse":
            import worker_deepsparse as module
        elif runtime == "tensorrt":
            import worker_tensorrt as module
        else:
            raise Missing("this worker knows no runtime '%s'" % runtime)
    except (ImportError, OSError, RuntimeError) as error:
        raise Missing("%s: %s" % (type(error).__name__, error)) from error
    return module


class Worker:
    """At most one artifact, and the requests about it."""

    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes
        self._backend: Optional[Any] = None

    def hello(self, request: Header, feed: Arrays) -> Tuple[Header, Arrays]:
        """Versions of the interpreter and of numpy."""
        return {"versions": {"python": platform.python_version(), "numpy": np.__version__}}, {}

    def open(self, request: Header, feed: Arrays) -> Tuple[Header, Arrays]:
        """Load the artifact, on the given cores only."""
        cores = request["cores"]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        module = _load(request["runtime"])
        self._backend = backend = module.Backend(
            request["path"], len(cores), request["batch_size"], request["options"]
        )
        header = {
            "version": backend.version,
            "inputs": backend.inputs,
            "outputs": backend.outputs,
            "facts": backend.facts,
        }
        return header, {}

    def _opened(self) -> Any:
        if self._backend is None:
            raise Refused("no artifact is open")
        return self._backend

    def run(self, request: Header, feed: Arrays) -> Tuple[Header, Arrays]:
        """Outputs of one inference."""
        backend = self._opened()
        outputs = backend.infer(feed)
        names = [spec["name"] for spec in backend.outputs]
        return {}, dict(zip(names, outputs))  # noqa: B905 (Python 3.8)

    def time(self, request: Header, feed: Arrays) -> Tuple[Header, Arrays]:
        """Raw samples, in milliseconds, warm-ups apart."""
        warmup = request["warmup"]
        taken = take_samples(
            self._opened().infer,
            feed,
            request["preprocessing"],
            warmup,
            request["samples"],
            lambda done: self._pipes.answer({"progress": done}, {}),
        )
        return {}, {"warmup_ms": taken[:warmup], "samples_ms": taken[warmup:]}

    def time_on_device(self, request: Header, feed: Arrays) -> Tuple[Header, Arrays]:
        """Raw milliseconds between events on the device, without copies and with them."""
        backend = self._opened()
        if not hasattr(backend, "device_times"):
            raise Explained("it computes on the CPU, where no device keeps time: use Session.time")
        warmup, count = request["warmup"], request["warmup"] + request["samples"]
        taken = backend.device_times(
            feed, count, lambda done: self._pipes.answer({"progress": done}, {})
        )
        return {}, {"compute_ms": taken[0, warmup:], "with_copies_ms": taken[1, warmup:]}

    def profile(self, request: Header, feed: Arrays) -> Tuple[Header, Arrays]:
        """The runtime's own table of layers."""
        described: Dict[str, Any] = self._opened().profile(
            feed, request["warmup"], request["iterations"], request["options"]
        )
        return described, {}


def _error(error: Exception) -> Header:
    kind = next((name for cls, name in ERROR_KINDS if isinstance(error, cls)), "failed")
    message = str(error) if kind != "failed" else "%s: %s" % (type(error).__name__, error)
    return {"error": {"kind": kind, "message": message}}


def main() -> None:
    """Answer requests until the session closes the pipe or asks to close."""
    parser = argparse.ArgumentParser(description="runs one artifact for an OBC Deploy session")
    parser.add_argument("requests", type=int, help="file descriptor to read frames from")
    parser.add_argument("responses", type=int, help="file descriptor to write frames to")
    arguments = parser.parse_args()
    pipes = Pipes(arguments.requests, arguments.responses)
    threading.Thread(target=pipes.exit_with_session, daemon=True).start()
    worker = Worker(pipes)
    handlers = {
        "hello": worker.hello,
        "open": worker.open,
        "run": worker.run,
        "time": worker.time,
        "time_on_device": worker.time_on_device,
        "profile": worker.profile,
    }
    while True:
        try:
            request, feed = decode_frame(pipes.read)
        except EOFError:
            return
        if request["request"] == "close":
            pipes.answer({}, {})
            return
        try:
            pipes.answer(*handlers[request["request"]](request, feed))
        except OSError:
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            pipes.answer(_error(error), {})


if __name__ == "__main__":
    main()
