"""Reading a database: errors without weights, a level's compressed layer, sizes.

A layer's file is checked against the index before the first of its levels is read, and again
whenever the file was touched since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch

from obc_deploy.database.compact import stored_scheme, unpack
from obc_deploy.database.files import checksum, read_form
from obc_deploy.database.identity import identity_of
from obc_deploy.database.index import FILE_NAME, Index, LayerRecord, read_index
from obc_deploy.errors import DatabaseError
from obc_deploy.schemes import Scheme, as_scheme
from obc_deploy.solvers.contract import CompressedLayer, LayerProblem

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class LayerSize:
    """What a layer takes.

    Attributes:
        layer: its name.
        levels: schemes that were asked for.
        forms: distinct weights among them; levels that differ in activations alone share one.
        file_bytes: its file on disk.
        dense_bytes: a float32 copy of the layer for each form.
    """

    layer: str
    levels: int
    forms: int
    file_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class SizeReport:
    """What a database takes, against dense copies.

    Attributes:
        layers: layer by layer.
        index_bytes: the index on disk.
    """

    layers: tuple[LayerSize, ...]
    index_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files."""
        return self.index_bytes + sum(layer.file_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of float32 copies of every form."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def times_smaller(self) -> float:
        """Dense bytes over bytes on disk."""
        return self.dense_bytes / self.disk_bytes


@dataclass(frozen=True)
class Database:
    """A database of compressed layers, as it was when it was opened.

    Attributes:
        folder: where it is.
        index: what is in it.
    """

    folder: Path
    index: Index
    _checked: dict[str, tuple[int, int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path | str, problems: Iterable[LayerProblem] = ()) -> Database:
        """A database for reading.

        Args:
            folder: where it was built.
            problems: layers that it is to be a database of, checked as by `check`.

        Raises:
            DatabaseError: there is none, its index is damaged, or it is of other problems.
        """
        database = cls(Path(folder), read_index(Path(folder)))
        for problem in problems:
            database.check(problem)
        return database

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(self.index.layers)

    def levels(self, layer: str) -> tuple[Scheme, ...]:
        """Schemes that a layer was solved for.

        Raises:
            DatabaseError: no such layer.
        """
        return tuple(Scheme.parse(text) for text in self._record(layer).levels)

    def errors(self, layer: str) -> Mapping[Scheme, float]:
        """Relative squared output error of each of a layer's schemes; reads no weights.

        Raises:
            DatabaseError: no such layer.
        """
        stored = self._record(layer).errors
        return MappingProxyType(
            {scheme: stored[str(stored_scheme(scheme))] for scheme in self.levels(layer)}
        )

    def load(self, layer: str, scheme: Scheme | str) -> CompressedLayer[torch.Tensor]:
        """A layer at one of its levels, on the CPU, to the bit as it was solved.

        Args:
            layer: its name.
            scheme: a level, or one that differs from a level in its activations alone.

        Raises:
            DatabaseError: no such layer or level, or the file is missing, truncated or altered.
            SchemeError: the scheme cannot be read.
        """
        wanted = as_scheme(scheme)
        record = self._record(layer)
        form = stored_scheme(wanted)
        if str(form) not in record.errors:
            raise DatabaseError(
                f"database '{self.folder}' has no level '{wanted}' of layer '{layer}'; build it "
                "with this level too"
            )
        if not self.is_intact(layer):
            raise DatabaseError(
                f"database '{self.folder}': file '{record.file}' of layer '{layer}' is missing or "
                "is not what was written; build the database again, what is whole is kept"
            )
        stored = unpack(
            read_form(self.folder / record.file, str(form)), form, record.rows, record.cols,
            error=record.errors[str(form)], method=record.identity.method,
        )  # fmt: skip
        return replace(stored, scheme=wanted)

    def check(self, problem: LayerProblem) -> None:
        """Make sure that a layer in here was solved from this weight, Hessian and damping.

        Raises:
            DatabaseError: it was not, or there is no such layer.
        """
        record = self._record(problem.name)
        stored = record.identity
        given = identity_of(problem, method=stored.method, dtype=stored.dtype, solver=stored.solver)
        refuse_other(self.folder, problem.name, stored.difference(given))

    def is_intact(self, layer: str) -> bool:
        """Whether a layer's file is what was written.

        Raises:
            DatabaseError: no such layer.
        """
        record = self._record(layer)
        path = self.folder / record.file
        try:
            status = path.stat()
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._checked.get(layer) == seen:
                return True
            if checksum(path) != record.sha256:
                return False
        except OSError:
            return False
        self._checked[layer] = seen
        return True

    def size_report(self) -> SizeReport:
        """Bytes on disk now, against float32 copies.

        Raises:
            DatabaseError: a file is missing.
        """
        try:
            return SizeReport(
                tuple(
                    LayerSize(
                        layer=name,
                        levels=len(record.levels),
                        forms=len(record.errors),
                        file_bytes=(self.folder / record.file).stat().st_size,
                        dense_bytes=_FLOAT_BYTES * record.rows * record.cols * len(record.errors),
                    )
                    for name, record in self.index.layers.items()
                ),
                (self.folder / FILE_NAME).stat().st_size,
            )
        except OSError as error:
            raise DatabaseError(
                f"database '{self.folder}' has lost a file ({error.strerror}: "
                f"'{error.filename}'); build it again"
            ) from error

    def _record(self, layer: str) -> LayerRecord:
        record = self.index.layers.get(layer)
        if record is None:
            raise DatabaseError(
                f"database '{self.folder}' has no layer '{layer}'; it has {len(self.layers)}: "
                f"{', '.join(self.layers[:6])}{', ...' if len(self.layers) > 6 else ''}"
            )
        return record


def refuse_other(folder: Path, layer: str, difference: str | None) -> None:
    """Raise where a stored layer is of another problem.

    Raises:
        DatabaseError: there is a difference.
    """
    if difference is not None:
        raise DatabaseError(
            f"database '{folder}' does not fit layer '{layer}': it is given {difference}; use "
            "the database of this model and calibration, or build one in another folder"
        )
