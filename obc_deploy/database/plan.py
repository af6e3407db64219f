"""What a build will take, before it starts: seconds, peak memory, bytes on disk.

Needs the layers' shapes alone, no calibration; what a database in the folder has already is left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from obc_deploy.database.compact import packed_bytes, stored_scheme
from obc_deploy.database.identity import SOLVER_VERSION
from obc_deploy.database.index import FILE_NAME, DamagedIndexError, Index, LayerRecord, read_index
from obc_deploy.database.outline import LayerOutline
from obc_deploy.schemes import Scheme
from obc_deploy.solvers import METHODS, check_scheme, needs_hessian
from obc_deploy.solvers.estimate import LayerShape, estimate_seconds, layer_work
from obc_deploy.solvers.settings import SolverSettings, compression_settings

LevelsOf = Callable[[LayerOutline], Iterable[Scheme]]
"""Which schemes a layer is to be solved for."""

_HEADER_BYTES = 115
"""What a safetensors header says of one array."""
_INDEX_BYTES = 70
"""What the index says of one level."""
_HESSIANS = 7
"""Copies of the Hessian in double precision that making it ready takes at the most."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer's part of a build.

    Attributes:
        outline: its shape.
        levels: all schemes that it will have.
        missing: packed forms that are to be solved.
        memory_bytes: peak memory while it is solved, besides the problem itself.
        disk_bytes: its file, when done.
        effort: operations that solving will take, for the share of the progress.
    """

    outline: LayerOutline
    levels: tuple[Scheme, ...]
    missing: tuple[Scheme, ...]
    memory_bytes: int
    disk_bytes: int
    effort: float


@dataclass(frozen=True)
class BuildPlan:
    """A build before it starts.

    Attributes:
        layers: layer by layer.
        seconds: estimated solving time with the threads torch has now; None where there is no
            estimate: on a GPU, and for methods without Hessians, which take next to none.
        memory_bytes: peak memory, besides the problems themselves.
        disk_bytes: the database's files, when done; while a layer that has levels already gets
            more, both of its files are there.
        dense_bytes: float32 copies of everything instead.
    """

    layers: tuple[LayerPlan, ...]
    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    dense_bytes: int

    @property
    def missing(self) -> int:
        """Packed forms that are to be solved."""
        return sum(len(layer.missing) for layer in self.layers)


def plan_build(
    layers: Iterable[LayerOutline],
    levels_of: LevelsOf,
    folder: Path | str | None = None,
    *,
    method: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> BuildPlan:
    """Seconds, memory and disk of a build, which is not started.

    Args:
        layers: outlines of the layers.
        levels_of: which schemes each is to be solved for.
        folder: a database whose levels need not be solved again, where there is one.
        method: as in `solve`.
        dtype: as in `solve`.
        device: as in `solve`; seconds are known of the CPU alone.

    Raises:
        DatabaseError: the folder has a database of another version.
        ProblemError: unknown method or dtype.
        SchemeError: a scheme does not fit its layer.
    """
    plans = plan_layers(layers, levels_of, folder, method=method, dtype=dtype)
    seconds = None
    if needs_hessian(method) and device == "cpu":
        seconds = estimate_seconds(
            [
                LayerShape(plan.outline.rows, plan.outline.cols, plan.missing)
                for plan in plans
                if plan.missing
            ],
            compression_settings(dtype),
        )
    return BuildPlan(
        layers=tuple(plans),
        seconds=seconds,
        memory_bytes=max((plan.memory_bytes for plan in plans), default=0),
        disk_bytes=sum(plan.disk_bytes for plan in plans)
        + _INDEX_BYTES * sum(len(plan.levels) for plan in plans),
        dense_bytes=sum(4 * plan.outline.weights * len(forms_of(plan.levels)) for plan in plans),
    )


def plan_layers(
    layers: Iterable[LayerOutline],
    levels_of: LevelsOf,
    folder: Path | str | None = None,
    *,
    method: str | None = None,
    dtype: str = "float32",
) -> list[LayerPlan]:
    """What `plan_build` says layer by layer; measures nothing.

    Raises:
        DatabaseError: as in `plan_build`.
        ProblemError: as in `plan_build`.
        SchemeError: as in `plan_build`.
    """
    exact = needs_hessian(method)
    chosen = METHODS[0] if method is None else method
    settings = compression_settings(dtype)
    index = _index(folder)
    plans = []
    for outline in layers:
        record = index.layers.get(outline.name)
        wanted = tuple(levels_of(outline))
        for scheme in wanted:
            check_scheme(
                scheme, rows=outline.rows, cols=outline.cols, channels=outline.channels,
                name=outline.name,
            )  # fmt: skip
        levels = all_levels(wanted, record)
        there = record is not None and _answers(record, outline, chosen, dtype)
        stored = record.errors if there and record is not None else {}
        plans.append(_plan_layer(outline, levels, stored, settings, exact))
    return plans


def _plan_layer(
    outline: LayerOutline,
    levels: tuple[Scheme, ...],
    stored: Container[str],
    settings: SolverSettings,
    exact: bool,
) -> LayerPlan:
    forms = forms_of(levels)
    missing = tuple(form for form in forms if str(form) not in stored)
    packed = sum(packed_bytes(form, outline.rows, outline.cols) for form in forms)
    memory, effort = 0, 0.0
    if missing:
        memory = 2 * packed + _memory(outline, missing, settings, exact)
        effort = float(outline.weights * len(missing))
        if exact:
            work = layer_work(LayerShape(outline.rows, outline.cols, missing), settings)
            effort += work.updates + work.solves + work.inverses + work.factors
    return LayerPlan(
        outline=outline,
        levels=levels,
        missing=missing,
        memory_bytes=memory,
        disk_bytes=packed + _HEADER_BYTES * sum(_arrays(form) for form in forms),
        effort=effort,
    )


def all_levels(wanted: Sequence[Scheme], record: LayerRecord | None) -> tuple[Scheme, ...]:
    """What a layer has, as far as it is on record, and what it is to have besides."""
    had = () if record is None else tuple(Scheme.parse(text) for text in record.levels)
    return tuple(dict.fromkeys((*had, *wanted)))


def _answers(record: LayerRecord, outline: LayerOutline, method: str, dtype: str) -> bool:
    """Whether a record can be of this layer, as far as that shows without its bytes."""
    found = record.identity
    return (record.rows, record.cols, found.channels, found.method, found.dtype, found.solver) == (
        outline.rows, outline.cols, outline.channels, method, dtype, SOLVER_VERSION,
    )  # fmt: skip


def _index(folder: Path | str | None) -> Index:
    if folder is None or not (Path(folder) / FILE_NAME).exists():
        return Index()
    try:
        return read_index(Path(folder))
    except DamagedIndexError:
        return Index()


def forms_of(levels: Iterable[Scheme]) -> tuple[Scheme, ...]:
    """The packed forms of levels: those that differ in activations alone share one."""
    return tuple(dict.fromkeys(stored_scheme(level) for level in levels))


def _arrays(form: Scheme) -> int:
    """Arrays of a packed form."""
    quantization = form.quantization
    of_weights = 1 if quantization is None else 3 if quantization.asymmetric else 2
    return of_weights + (form.pattern is not None)


def _memory(
    outline: LayerOutline, missing: Sequence[Scheme], settings: SolverSettings, exact: bool
) -> int:
    """Bytes while a layer is solved: its Hessians made ready, inverses at work, every level."""
    weights, cols = outline.weights, outline.cols
    size = 3 * 8 * weights
    if exact:
        inverses = min(outline.rows, 2 * settings.workers(outline.rows, cols)) * cols**2 * 8
        size += _HESSIANS * 8 * outline.groups * cols**2 + min(settings.memory, inverses)
    patterns = len({form.pattern for form in missing if form.pattern is not None})
    grids = sum(form.quantization is not None for form in missing)
    # A pruned weight in double precision and its mask; codes; then the answer, all of it again.
    return size + weights * (9 * patterns + grids) + weights * (5 * len(missing) + grids)
