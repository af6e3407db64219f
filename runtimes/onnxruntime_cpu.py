"""ONNX Runtime's CPU provider: dense float32 and int8, in this interpreter's own packages."""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from obc_deploy.errors import RuntimeMissingError
from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.contract import Runtime, RuntimeInfo

if TYPE_CHECKING:
    from obc_deploy.runtimes.onnx_graph import OnnxGraph

NAME = "onnxruntime"
INSTALL_COMMAND = f"{sys.executable} -m pip install onnxruntime"
NO_SPARSITY = (
    "ONNX Runtime multiplies every weight, zero or not: sparsity makes nothing faster here "
    "(export with target ort-sparse or deepsparse to use it)"
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


def libraries(domains: Collection[str]) -> tuple[Path, ...]:
    """Libraries that ONNX Runtime must load to run operators of the domains.

    Raises:
        RuntimeMissingError: our sparse kernels are wanted and are not there.
    """
    if sparse.DOMAIN not in domains:
        return ()
    if not sparse.is_available():
        raise RuntimeMissingError(
            f"the file has operators of our sparse kernels, and these are {_missing()}; or export "
            "with target onnxruntime"
        )
    return (sparse.library_path(),)


def _missing() -> str:
    return f"missing here: {sparse.why_missing()}"


def refusals(graph: OnnxGraph) -> tuple[str, ...]:
    """Why ONNX Runtime will not load the graph."""
    if sparse.DOMAIN in graph.domains and not sparse.is_available():
        return (
            f"it has operators of our sparse kernels, and these are {_missing()}; or export with "
            "target onnxruntime",
        )
    known = range(sparse.OLDEST_DOMAIN_VERSION, sparse.DOMAIN_VERSION + 1)
    if sparse.DOMAIN in graph.domains and graph.sparse_version not in known:
        return (
            f"it was written for version {graph.sparse_version} of our sparse operators, and they "
            f"are at version {sparse.DOMAIN_VERSION} here: export it again",
        )
    return ()


RUNTIME = Runtime(name=NAME, title="ONNX Runtime", info=info, refusals=refusals)
