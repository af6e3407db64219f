"""What wrote a file: with another exporter layers may get other operators, and take other times."""

from __future__ import annotations

import hashlib
from pathlib import Path

from obc_deploy.runtimes import regions, sparse
from obc_deploy.targets import Target


def exporter_checksum(target: Target) -> str:
    """SHA-256 of the code that writes a target's files, and of our kernels where it has them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    if target.sparse_operators and sparse.is_available():
        files += [Path(regions.__file__), sparse.library_path()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
