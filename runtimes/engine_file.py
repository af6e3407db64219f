"""Engine files: what lies on disk, before any library is asked to load it."""

from __future__ import annotations

from pathlib import Path

from obc_deploy.artifacts import file_sha256
from obc_deploy.data import first_line
from obc_deploy.errors import ArtifactError
from obc_deploy.manifest import EngineManifest

RTX_MAGIC = b"vtrt"
"""The first bytes of TensorRT-RTX's engines."""
HEADER_BYTES = 32
"""Any engine is longer."""
_BUILD = "build one with 'obc-deploy export RUN --target tensorrt --engine'"


def engine_manifest_path(engine: Path) -> Path:
    """Where an engine's manifest lies: model.engine -> model.engine.json."""
    return engine.with_name(f"{engine.name}.json")


def read_engine_manifest(path: Path | str) -> EngineManifest:
    """An engine's manifest, after a check that it is about this file.

    Raises:
        ArtifactError: a file is missing, damaged, or not the one the manifest describes.
    """
    engine = Path(path)
    beside = engine_manifest_path(engine)
    if not engine.is_file():
        raise ArtifactError(f"no engine '{engine}'; {_BUILD}")
    try:
        manifest = EngineManifest.model_validate_json(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the manifest '{beside.name}' of '{engine}' cannot be read ({first_line(error)}); "
            "build the engine again"
        ) from error
    if file_sha256(engine) != manifest.file_sha256:
        raise ArtifactError(
            f"'{engine}' is not the engine its manifest describes: it is damaged or was changed; "
            "build it again"
        )
    return manifest


def engine_library(path: Path) -> str:
    """The library that wrote an engine, by its first bytes: "tensorrt_rtx", else "tensorrt".

    Raises:
        ArtifactError: there is no such file, or it is no engine.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise ArtifactError(f"no engine '{path}' ({error.strerror}); {_BUILD}") from error
    if path.suffix == ".onnx":
        raise ArtifactError(f"'{path}' is an ONNX file and TensorRT runs engines; {_BUILD}")
    if len(head) < HEADER_BYTES:
        raise ArtifactError(f"'{path}' is no engine: it has {len(head)} bytes; {_BUILD}")
    return "tensorrt_rtx" if head.startswith(RTX_MAGIC) else "tensorrt"
