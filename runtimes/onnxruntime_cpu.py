"""ONNX Runtime's CPU provider: dense float32 and int8, in this interpreter's own packages."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from obc_deploy.runtimes.contract import Runtime, RuntimeInfo

NAME = "onnxruntime"
INSTALL_COMMAND = f"{sys.executable} -m pip install onnxruntime"
NO_SPARSITY = (
    "ONNX Runtime multiplies every weight, zero or not: sparsity makes nothing faster here "
    "(export with target deepsparse to use it)"
)


def info() -> RuntimeInfo:
    """Whether onnxruntime is installed beside us."""
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return RuntimeInfo(
            NAME, "ONNX Runtime", True, version, None, INSTALL_COMMAND, Path(sys.executable)
        )
    return RuntimeInfo(
        NAME, "ONNX Runtime", False, None, "onnxruntime is not installed", INSTALL_COMMAND, None
    )


RUNTIME = Runtime(name=NAME, title="ONNX Runtime", info=info)
