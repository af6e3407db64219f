"""Artifacts: an exported file and the manifest beside it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from obc_deploy.data import first_line
from obc_deploy.errors import ArtifactError
from obc_deploy.manifest import ArtifactManifest


@dataclass(frozen=True)
class Artifact:
    """An exported network.

    Attributes:
        path: the ONNX file.
        manifest: what it is and how it was made.
    """

    path: Path
    manifest: ArtifactManifest

    @property
    def target(self) -> str:
        """Name of the target it was written for."""
        return self.manifest.target

    @property
    def runtime(self) -> str:
        """Name of the runtime that runs it."""
        return self.manifest.runtime

    @property
    def scheme(self) -> str:
        """The scheme of the network in it."""
        return self.manifest.compression.scheme

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.manifest.size_bytes


def manifest_path(path: Path) -> Path:
    """Where the manifest of an artifact file lies: model.onnx -> model.manifest.json."""
    return path.with_name(f"{path.stem}.manifest.json")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_artifact(path: Path | str) -> Artifact:
    """An artifact from its file, checked against its manifest.

    Raises:
        ArtifactError: a file is missing, damaged, or not the one the manifest describes.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"no artifact '{path}'; make one with 'obc-deploy export'")
    beside = manifest_path(path)
    try:
        manifest = ArtifactManifest.model_validate_json(beside.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"'{path}' has no manifest '{beside.name}' beside it; name a file that 'obc-deploy "
            "export RUN' made, beside its manifest (those from elsewhere are timed by 'obc-deploy "
            "bench FILE FILE')"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"'{beside}' cannot be read ({first_line(error)}); export the model again"
        ) from error
    found = file_sha256(path)
    if found != manifest.file_sha256:
        raise ArtifactError(
            f"'{path}' is not the file its manifest describes (SHA-256 {found[:12]}, not "
            f"{manifest.file_sha256[:12]}): it is damaged or was changed; export it again"
        )
    return Artifact(path, manifest)
