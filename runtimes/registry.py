"""The runtimes by name."""

from __future__ import annotations

from obc_deploy.errors import RuntimeMissingError, TargetError
from obc_deploy.runtimes import deepsparse, onnxruntime_cpu, sparse, tensorrt
from obc_deploy.runtimes.contract import Runtime, RuntimeInfo
from obc_deploy.targets import ONNXRUNTIME, ORT_SPARSE, Target

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (onnxruntime_cpu.RUNTIME, deepsparse.RUNTIME, tensorrt.RUNTIME)
}


def find_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        RuntimeMissingError: there is no such runtime.
    """
    try:
        return RUNTIMES[name]
    except KeyError:
        known = ", ".join(sorted(RUNTIMES))
        raise RuntimeMissingError(f"'{name}' is no runtime; choose one of {known}") from None


def runtime_info(name: str) -> RuntimeInfo:
    """Whether the runtime of that name is installed, without starting it.

    Raises:
        RuntimeMissingError: there is no such runtime.
    """
    return find_runtime(name).info()


def require_runtime(name: str) -> RuntimeInfo:
    """The same for a runtime that must be there.

    Raises:
        RuntimeMissingError: there is no such runtime, or it is not installed.
    """
    info = runtime_info(name)
    if not info.works or info.python is None:
        raise RuntimeMissingError(f"{info.title}: {info.reason}; run: {info.install_command}")
    return info


def check_measured(target: Target) -> None:
    """Whether networks are timed in a target's runtime from here.

    Raises:
        TargetError: files are written for it, and nothing times them in turns with other runtimes.
    """
    if not target.measured:
        raise TargetError(
            f"no network is timed for target '{target.name}' here, nor has it a latency table: "
            f"'obc-deploy export RUN --target {target.name} --engine' builds the engine, and times "
            "it where it can run; for this choose another target, or a budget of macs, bops or size"
        )


def require_target(target: Target) -> RuntimeInfo:
    """The runtime of a target that is to be measured.

    Raises:
        TargetError: the target is not measured.
        RuntimeMissingError: its runtime does not work here.
    """
    check_measured(target)
    return require_runtime(target.runtime)


def default_target() -> Target:
    """Where a network is to run if nobody says: on our sparse kernels where they are built."""
    return ORT_SPARSE if sparse.is_available() else ONNXRUNTIME
