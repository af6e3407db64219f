"""Files of a database: whole or not there, one writer at a time, nothing left of killed builds."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from obc_deploy.data import first_line
from obc_deploy.database.compact import Packed
from obc_deploy.database.index import FILE_NAME, Index
from obc_deploy.errors import DatabaseError

LOCK = ".lock"
_PARTIAL = re.compile(r"\..+\.\d+\.partial")
_LAYER_FILE = re.compile(r".+-[0-9a-f]{16}\.safetensors")
_LONGEST_NAME = 80
_CHUNK = 1 << 22


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Be the only one to write a database, whose folder is made if need be.

    Raises:
        DatabaseError: another build is at it, or the folder cannot be written or holds other
            things.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir()}
        if names and not names & {FILE_NAME, LOCK}:
            raise DatabaseError(
                f"'{folder}' holds other files and is no database of compressed layers; choose "
                "another folder"
            )
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with lock:
        try:
            # The kernel lets go of it whatever ends the process.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatabaseError(
                f"another build is writing database '{folder}'; wait for it, or choose another "
                "folder"
            ) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield


def sweep(folder: Path, index: Index) -> None:
    """Remove partial files of killed builds and layer files that the index does not name.

    Only for who writes the database.
    """
    named = {record.file for record in index.layers.values()}
    try:
        for path in list(folder.iterdir()):
            left_over = _PARTIAL.fullmatch(path.name) or _LAYER_FILE.fullmatch(path.name)
            if left_over and path.name not in named:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_index(folder: Path, index: Index) -> None:
    """Replace the index.

    Raises:
        DatabaseError: it cannot be written; the old one stays.
    """
    partial = _partial(folder, FILE_NAME)
    try:
        partial.write_text(index.text(), encoding="utf-8")
        _settle(partial, folder / FILE_NAME)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_layer(folder: Path, layer: str, forms: Mapping[str, Packed]) -> tuple[str, str]:
    """Write a layer's packed forms; name and SHA-256 of the file.

    Raises:
        DatabaseError: it cannot be written; nothing of it stays.
    """
    tensors = {
        f"{form}/{name}": np.ascontiguousarray(array)
        for form, packed in forms.items()
        for name, array in packed.items()
    }
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", layer)[:_LONGEST_NAME].lstrip(".") or "layer"
    # Written by us: the library's own writer leaves a file of a name of its own when it is killed.
    content = save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    name = f"{readable}-{digest[:16]}.safetensors"
    partial = _partial(folder, readable)
    try:
        partial.write_bytes(content)
        _settle(partial, folder / name)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return name, digest


def read_form(path: Path, form: str) -> Packed:
    """The packed arrays of one form in a layer's file.

    Raises:
        DatabaseError: the file does not have it.
    """
    try:
        with safe_open(path, framework="np") as stored:
            names = stored.keys()
            packed = {
                name.rpartition("/")[2]: stored.get_tensor(name)
                for name in names
                if name.rpartition("/")[0] == form
            }
    except (OSError, SafetensorError) as error:
        raise DatabaseError(f"cannot read '{path}' ({first_line(error)})") from error
    if not packed:
        raise DatabaseError(f"'{path}' has no form '{form}'; build the database again")
    return packed


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _partial(folder: Path, name: str) -> Path:
    return folder / f".{name}.{os.getpid()}.partial"


def _settle(partial: Path, final: Path) -> None:
    """Give a file its name once the disk has its bytes, and have the disk keep the name."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unwritable(folder: Path, error: OSError) -> DatabaseError:
    return DatabaseError(
        f"cannot write database '{folder}' ({error.strerror or error}); make room, or choose "
        "another place"
    )
