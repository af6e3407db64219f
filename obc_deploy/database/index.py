"""The index of a database: which levels of which layers are in which file, and its checksum.

    index.json                          the index, itself with a checksum
    <layer>-<checksum>.safetensors      one file a layer, `<scheme>/<array>` for each packed form
    .lock                               held while a build writes

A file is complete under its name before the index speaks of it, and goes after the index has
stopped to. So whatever a kill leaves, the index tells of whole files alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from obc_deploy.data import first_line
from obc_deploy.database.identity import Identity
from obc_deploy.errors import DatabaseError
from obc_deploy.schemes import Scheme

SCHEMA_VERSION: Literal[1] = 1
FILE_NAME = "index.json"


class DamagedIndexError(DatabaseError):
    """An index that says nothing reliable: building starts over, reading fails."""


class LayerRecord(BaseModel):
    """One layer's file.

    Attributes:
        rows: rows of its weight.
        cols: columns of its weight.
        identity: the problem it answers.
        file: name of its file.
        sha256: the file's checksum.
        levels: schemes that were asked for, as text.
        errors: relative squared output error of each packed form; a form's text is a level's less
            the activations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    rows: int
    cols: int
    identity: Identity
    file: str
    sha256: str
    levels: tuple[str, ...]
    errors: dict[str, float]


class Index(BaseModel):
    """All layers of a database by name, in the order they were first solved."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    sha256: str = ""
    layers: dict[str, LayerRecord] = Field(default_factory=dict)

    def text(self) -> str:
        """The file's text, checksum included."""
        return Index(sha256=self.checksum(), layers=self.layers).model_dump_json(indent=1) + "\n"

    def checksum(self) -> str:
        """SHA-256 of everything but itself."""
        content = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> Index:
    """The index of a database.

    Raises:
        DamagedIndexError: it is truncated or altered.
        DatabaseError: there is none, it cannot be read, or it is of another version.
    """
    path = folder / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DatabaseError(
            f"'{folder}' is no database of compressed layers: it has no {FILE_NAME}; build one"
        ) from error
    except OSError as error:
        raise DatabaseError(f"cannot read '{path}': {error.strerror}") from error
    try:
        raw = json.loads(content)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version != SCHEMA_VERSION:
            raise DatabaseError(
                f"'{path}' has schema version {version}, this software reads {SCHEMA_VERSION}; "
                "build in another folder"
            )
        index = Index.model_validate(raw)
        for record in index.layers.values():
            for text in (*record.levels, *record.errors):
                Scheme.parse(text)
    except (ValidationError, ValueError) as error:
        raise DamagedIndexError(
            f"'{path}' is damaged ({first_line(error)}); build the database again"
        ) from error
    if index.checksum() != index.sha256:
        raise DamagedIndexError(
            f"'{path}' was altered: its checksum differs; build the database again"
        )
    return index
