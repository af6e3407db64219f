"""TensorRT and TensorRT-RTX: engines on an NVIDIA GPU, in this interpreter's own packages.

Both libraries have one interface, so one worker runs either; the engine says which it needs. An
engine runs in the version of the library that built it, on the kind of GPU that it was built for:
its manifest is checked for both before a worker starts.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from obc_deploy.errors import RuntimeFailedError, RuntimeMissingError
from obc_deploy.manifest import EngineManifest
from obc_deploy.runtimes.contract import Runtime, RuntimeInfo
from obc_deploy.runtimes.engine_file import (
    engine_library,
    engine_manifest_path,
    read_engine_manifest,
)
from obc_deploy.runtimes.fingerprint import Gpu, take_gpus

NAME = "tensorrt"
TITLE = "TensorRT"

LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
"""The modules that either library may be imported as."""
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tensorrt": (
        "tensorrt-cu13-bindings", "tensorrt-cu12-bindings", "tensorrt-cu13", "tensorrt-cu12",
        "tensorrt",
    ),
    "tensorrt_rtx": (
        "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx",
    ),
}  # fmt: skip
"""Distributions that carry those modules."""
INSTALL_COMMANDS = {
    "tensorrt": f"{sys.executable} -m pip install tensorrt-cu13",
    "tensorrt_rtx": f"{sys.executable} -m pip install 'obc-deploy[tensorrt-rtx]'",
}
DRIVER_COMMAND = "nvidia-smi"
"""What says whether a driver and a GPU are here: neither comes by pip."""


@dataclass(frozen=True)
class EngineLibrary:
    """What a worker needs to know to load an engine.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        modules: names it may be imported as.
    """

    name: str
    modules: tuple[str, ...]


def installed_libraries() -> dict[str, str]:
    """Versions of the libraries that are installed, by name; none is imported."""
    found = {}
    for library, modules in LIBRARIES.items():
        if not any(importlib.util.find_spec(module) for module in modules):
            continue
        for package in _PACKAGES[library]:
            try:
                found[library] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
            break
        else:
            found[library] = "?"
    return found


def why_no_gpu() -> str | None:
    """Why no GPU can be used here; None where one can."""
    from obc_deploy.runtimes.worker.worker_cuda import why_no_device

    return why_no_device()


def info() -> RuntimeInfo:
    """Whether an NVIDIA GPU is here, and a library that runs engines on it."""
    versions = installed_libraries()
    version = ", ".join(f"{TITLES[name]} {number}" for name, number in versions.items()) or None
    missing = why_no_gpu()
    command = INSTALL_COMMANDS["tensorrt_rtx"]
    reason = None
    if missing is not None and versions:
        command = DRIVER_COMMAND
        reason = f"{missing}: files are written and checked here"
        if "tensorrt_rtx" in versions:
            reason += ", TensorRT-RTX builds engines ahead of time"
        reason += ", none runs"
    elif missing is not None:
        reason = f"{missing}, and neither TensorRT nor TensorRT-RTX is installed"
    elif not versions:
        reason = "neither TensorRT nor TensorRT-RTX is installed"
    python = None if reason else Path(sys.executable)
    return RuntimeInfo(NAME, TITLE, reason is None, version, reason, command, python)


def _release(version: str) -> tuple[str, ...]:
    """The numbers that two versions must share for an engine to run in both."""
    return tuple(version.partition("+")[0].split(".")[:3])


def version_obstacle(manifest: EngineManifest, versions: Mapping[str, str]) -> str | None:
    """Why the installed library does not run an engine, with the fix; None where it may.

    Args:
        manifest: the engine's.
        versions: of the installed libraries, by name.
    """
    title, built = TITLES[manifest.library], manifest.version
    again = f"build it again from '{manifest.onnx_file}'"
    if manifest.library not in versions:
        others = ", ".join(f"{TITLES[name]} {number}" for name, number in versions.items())
        return (
            f"it was built with {title} {built}, which is not installed here ("
            f"{others or 'nor is another'}): {again}, or run: {INSTALL_COMMANDS[manifest.library]}"
        )
    here = versions[manifest.library]
    if here == "?" or _release(here) == _release(built):
        return None
    kind = "major version" if _release(here)[0] != _release(built)[0] else "version"
    return (
        f"it was built with {title} {built} and {here} is here, another {kind}: engines run in the "
        f"version that built them: {again}, or install {built}"
    )


def gpu_obstacle(manifest: EngineManifest, gpus: Sequence[Gpu]) -> str | None:
    """Why no GPU of a machine runs an engine, with the fix; None where one may.

    Args:
        manifest: the engine's; without compute capabilities it says nothing.
        gpus: of the machine; of none nothing can be said.
    """
    wanted = set(manifest.capabilities)
    if not wanted or not gpus or wanted & {gpu.compute_capability for gpu in gpus}:
        return None
    here = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus)
    return (
        f"it was built for {manifest.gpu} (compute capability {', '.join(sorted(wanted))}) and "
        f"this machine has {here}: build it again here from '{manifest.onnx_file}'"
    )


def check_engine(path: Path) -> EngineLibrary:
    """Whether an engine can be loaded here, as far as its file and its manifest tell.

    An engine without a manifest, from `trtexec`, is taken as it is: its library will say.

    Raises:
        ArtifactError: it is missing, no engine, or not the one its manifest describes.
        RuntimeFailedError: it is of another version or for another GPU.
        RuntimeMissingError: there is no manifest, and its library is not installed.
    """
    library = engine_library(path)
    versions = installed_libraries()
    if engine_manifest_path(path).is_file():
        manifest = read_engine_manifest(path)
        library = manifest.library
        obstacle = version_obstacle(manifest, versions) or gpu_obstacle(manifest, take_gpus())
        if obstacle is not None:
            raise RuntimeFailedError(f"{TITLE} will not load '{path}': {obstacle}")
    elif library not in versions:
        raise RuntimeMissingError(
            f"'{path}' is an engine of {TITLES[library]}, which is not installed; run: "
            f"{INSTALL_COMMANDS[library]}"
        )
    return EngineLibrary(library, LIBRARIES[library])


RUNTIME = Runtime(name=NAME, title=TITLE, info=info)
