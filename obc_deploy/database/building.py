"""Building a database: layer by layer, only what is missing, so that a killed build goes on.

A layer is solved in one call, so that its levels share their traces; it is done when the index
names its file. The same build killed and started again ends with the same bytes.

While a GPU solves a layer, a thread packs and writes the one before it. For 66 levels of a 256x1152
layer that takes 0.4 s where two cores solve for 16 s: nothing there, and as long as a GPU takes
that is twenty to forty times as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from obc_deploy.database.compact import Packed, pack
from obc_deploy.database.files import exclusive, read_form, sweep, write_index, write_layer
from obc_deploy.database.identity import SOLVER_VERSION, Identity, identity_of
from obc_deploy.database.index import FILE_NAME, DamagedIndexError, Index, LayerRecord, read_index
from obc_deploy.database.outline import outline_of_problem
from obc_deploy.database.plan import (
    BuildPlan,
    LayerPlan,
    LevelsOf,
    all_levels,
    forms_of,
    plan_layers,
)
from obc_deploy.database.store import Database, refuse_other
from obc_deploy.errors import DatabaseError
from obc_deploy.schemes import Scheme
from obc_deploy.solvers import METHODS, solve_levels
from obc_deploy.solvers.contract import CompressedLayer, LayerProblem, Progress
from obc_deploy.solvers.dispatch import torch_device
from obc_deploy.solvers.settings import compression_settings

Stage = Callable[[str, float], None]
"""Called with the name of the layer at work and the share of the whole build that is done."""


def build(
    problems: Iterable[LayerProblem],
    levels_of: LevelsOf,
    folder: Path | str,
    *,
    method: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    plan: BuildPlan | None = None,
    overwrite: bool = False,
    progress: Stage | None = None,
) -> Database:
    """Solve every layer for every level that the folder does not have yet.

    Levels that are there stay, whether asked for now or not. A layer whose file is truncated or
    altered, or was solved by another version of the solver, is solved again with all its levels.

    Args:
        problems: the layers. With a `plan` they are taken one at a time, so that a generator can
            make and drop their Hessians; without one they are all held first.
        levels_of: which schemes each is to be solved for.
        folder: where the database is, or is to be; made if need be.
        method: as in `solve`; None is "exact_obs".
        dtype: as in `solve`.
        device: as in `solve`.
        plan: what `plan_build` said of these layers, for the progress.
        overwrite: solve layers again that were solved from other weights, another Hessian or with
            other settings, instead of refusing them.
        progress: called with the layer's name and the overall share.

    Raises:
        DatabaseError: the folder is in use, cannot be written, holds other things, or a database
            of other problems or another version; what was finished is kept.
        ProblemError: a problem that cannot be solved.
        SchemeError: a scheme that does not fit its layer.
    """
    folder = Path(folder)
    if plan is None:
        problems = list(problems)
        outlines = [outline_of_problem(problem) for problem in problems]
        plans = plan_layers(outlines, levels_of, folder, method=method, dtype=dtype)
    else:
        plans = list(plan.layers)
    shares = _Shares(plans, progress or _silent)
    chosen = METHODS[0] if method is None else method
    names: set[str] = set()
    with exclusive(folder):
        index = _stored(folder)
        sweep(folder, index)
        with _finishing(folder, index, behind=_solves_elsewhere(device)) as finishing:
            for problem in problems:
                if problem.name in names:
                    raise DatabaseError(
                        f"two layers are called '{problem.name}'; a database tells layers apart by "
                        "their names"
                    )
                names.add(problem.name)
                identity = identity_of(problem, method=chosen, dtype=dtype, solver=SOLVER_VERSION)
                # What the thread is still writing is another layer's.
                known = finishing.index
                old = _whole(Database(folder, known), problem.name, identity, overwrite=overwrite)
                levels = all_levels(
                    tuple(levels_of(outline_of_problem(problem))), known.layers.get(problem.name)
                )
                if levels:
                    finishing.take(
                        _solved(problem, levels, identity, old, device, shares.of(problem.name))
                    )
        if not (folder / FILE_NAME).exists():
            write_index(folder, finishing.index)
    return Database.open(folder)


def _solves_elsewhere(device: str) -> bool:
    """Whether the CPU idles while a layer is solved."""
    return torch_device(device).type != "cpu"


def _stored(folder: Path) -> Index:
    """The index that is there; an empty one where there is none, or a damaged one."""
    if not (folder / FILE_NAME).exists():
        return Index()
    try:
        return read_index(folder)
    except DamagedIndexError:
        return Index()


def _whole(
    database: Database, name: str, identity: Identity, *, overwrite: bool
) -> LayerRecord | None:
    """A layer's record, if all that it says is still true."""
    record = database.index.layers.get(name)
    if record is None:
        return None
    difference = record.identity.difference(identity)
    if not overwrite:
        refuse_other(database.folder, name, difference)
    if not record.identity.answers(identity) or not database.is_intact(name):
        return None
    return record


@dataclass(frozen=True)
class _Solved:
    """A layer whose missing forms were solved, and are not yet on disk.

    Attributes:
        name: the layer.
        rows: of its weight.
        cols: of its weight.
        identity: of its problem.
        levels: all that it is to have.
        old: its record, if that is still true.
        forms: what `old` lacks; emptied as they are packed.
    """

    name: str
    rows: int
    cols: int
    identity: Identity
    levels: tuple[Scheme, ...]
    old: LayerRecord | None
    forms: list[CompressedLayer[Tensor]]


def _solved(
    problem: LayerProblem,
    levels: tuple[Scheme, ...],
    identity: Identity,
    old: LayerRecord | None,
    device: str,
    progress: Progress,
) -> _Solved:
    errors = {} if old is None else old.errors
    missing = [form for form in forms_of(levels) if str(form) not in errors]
    forms: list[CompressedLayer[Tensor]] = []
    if old is None or missing:
        forms = solve_levels(
            problem, missing, method=identity.method, device=device, progress=progress,
            settings=compression_settings(identity.dtype),
        )  # fmt: skip
    rows, cols = problem.weight.shape
    return _Solved(problem.name, rows, cols, identity, levels, old, forms)


class _StoppedError(Exception):
    """The build was interrupted while a layer was being packed."""


class _Finishing:
    """Packs and writes solved layers, one at a time; behind the solver's back, if that is wanted.

    A layer is taken when the one before it is on disk, so at most two layers' forms are held.
    """

    def __init__(self, folder: Path, index: Index, thread: ThreadPoolExecutor | None) -> None:
        self.index = index
        self.stopped = threading.Event()
        self._folder = folder
        self._thread = thread
        self._pending: Future[Index] | None = None

    def take(self, solved: _Solved) -> None:
        """Write a layer and its record.

        Raises:
            DatabaseError: this layer, or the one before it, cannot be packed or written.
        """
        self.wait()
        if self._thread is None:
            self.index = self._finished(solved, self.index)
        else:
            self._pending = self._thread.submit(self._finished, solved, self.index)

    def wait(self) -> None:
        """Until everything taken is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.index = pending.result()

    def _finished(self, solved: _Solved, index: Index) -> Index:
        record = self._written(solved)
        if record == solved.old:
            return index
        return _recorded(self._folder, index, solved.name, record)

    def _written(self, solved: _Solved) -> LayerRecord:
        """The layer's record, whose file is written."""
        old, forms = solved.old, solved.forms
        texts = tuple(str(level) for level in solved.levels)
        if old is not None and not forms:
            return old.model_copy(update={"levels": texts})
        errors: dict[str, float] = {}
        packed: dict[str, Packed] = {}
        if old is not None:
            errors = dict(old.errors)
            packed = {text: read_form(self._folder / old.file, text) for text in errors}
        # Taken off the list, so that each full form is gone when the next one is packed.
        while forms:
            if self.stopped.is_set():
                raise _StoppedError
            form = forms.pop()
            packed[str(form.scheme)] = pack(form)
            errors[str(form.scheme)] = form.error
        file, sha256 = write_layer(self._folder, solved.name, packed)
        return LayerRecord(
            rows=solved.rows, cols=solved.cols, identity=solved.identity, file=file,
            sha256=sha256, levels=texts, errors=dict(sorted(errors.items())),
        )  # fmt: skip


@contextmanager
def _finishing(folder: Path, index: Index, *, behind: bool) -> Iterator[_Finishing]:
    """What is taken is finished, also where a later layer fails; an interrupt drops it."""
    with ThreadPoolExecutor(1, "obc-database") as thread:
        finishing = _Finishing(folder, index, thread if behind else None)
        try:
            yield finishing
            finishing.wait()
        except Exception:
            finishing.wait()
            raise
        finally:
            finishing.stopped.set()


def _recorded(folder: Path, index: Index, name: str, record: LayerRecord) -> Index:
    """The index with a layer's record, on disk; files that no record names are gone."""
    updated = Index(layers={**index.layers, name: record})
    try:
        write_index(folder, updated)
    except DatabaseError:
        sweep(folder, index)
        raise
    sweep(folder, updated)
    return updated


class _Shares:
    """The share of a whole build from the shares of its layers."""

    def __init__(self, plans: Iterable[LayerPlan], report: Stage) -> None:
        self._efforts = {plan.outline.name: plan.effort for plan in plans}
        self._total = sum(self._efforts.values())
        self._report = report
        self._done = 0.0

    def of(self, layer: str) -> Progress:
        """The progress of the next layer; those before it count as done."""
        effort = self._efforts.get(layer, 0.0)
        start = self._done
        self._done += effort

        def report(share: float) -> None:
            if self._total > 0.0:
                self._report(layer, min(1.0, (start + share * effort) / self._total))

        return report


def _silent(layer: str, share: float) -> None:
    """No progress is shown."""
