"""ONNX files from anywhere, timed side by side: how much faster each is than the first.

Nothing is known of them but what runtimes say: no schemes, no accuracy. So their outputs on the
same random input stand beside the times, as what they differ by from the first one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from obc_deploy.benchmarks import statistics
from obc_deploy.benchmarks.interleaving import Candidate, Samples, measure_interleaved
from obc_deploy.benchmarks.measurement import Latency
from obc_deploy.errors import MeasurementError, ObcDeployError
from obc_deploy.runtimes.audit import random_inputs
from obc_deploy.runtimes.session import open_session

if TYPE_CHECKING:
    from obc_deploy.solvers.contract import Progress

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class FileInRuntime:
    """What is to be timed: a file, and the name of the runtime to run it in."""

    path: Path
    runtime: str


class TimedFile(BaseModel):
    """One file in one runtime, beside the first.

    Attributes:
        path: the file.
        runtime: what ran it.
        threads: threads it computed with; None where no worker started.
        batch_size: samples in an inference.
        size_bytes: the file's size; None where there is none.
        latency_ms: of an inference of one batch; None where it could not be timed.
        speedup: median over rounds of the first one's time over its own; above 1 it is faster.
        interval: 95 % bootstrap interval of the speedup.
        difference: ‖outputs - the first one's‖ / ‖the first one's‖ on the same random input; None
            where they cannot be compared, or were not.
        warnings: what a reader must know before trusting the numbers.
        error: why there are no timings; None where all went well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: Path
    runtime: str
    threads: int | None
    batch_size: int
    size_bytes: int | None
    latency_ms: Latency | None = None
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    difference: float | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None

    @property
    def noisy(self) -> bool:
        """Whether its timings disagree with each other more than a quiet machine's do."""
        return any(map(statistics.is_noise, self.warnings))


@dataclass
class _Tried:
    """What became of a file when it was run once."""

    inputs: Mapping[str, Array] = field(default_factory=dict)
    outputs: Sequence[Array] = ()
    error: str | None = None


def time_files(
    files: Sequence[FileInRuntime],
    *,
    inputs: Mapping[str, npt.NDArray[np.generic]] | None = None,
    threads: int | None = None,
    batch_size: int = 1,
    rounds: int = 5,
    samples_per_round: int = 10,
    processes: int = 2,
    time_budget_s: float = 20.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TimedFile]:
    """Time files in turns, each in worker processes of its own.

    Args:
        files: what to time, no two alike; the first is what the others are compared with.
        inputs: input name to array, one batch; random ones of the sizes that the first file takes
            where None.
        threads: threads, pinned to as many cores; the machine's physical cores where None.
        batch_size: samples in an inference, where files leave that open.
        rounds: rounds in each worker process.
        samples_per_round: timed inferences in a round.
        processes: fresh worker processes a file.
        time_budget_s: seconds that one file may be timed for.
        seed: of orders and resampling.
        progress: told the share of the work done.

    Returns:
        One a file, in their order.

    Raises:
        MeasurementError: nothing to time, two files alike, or numbers out of range.
    """
    if not files:
        raise MeasurementError("nothing to time: give at least one ONNX file")
    tried: dict[FileInRuntime, _Tried] = {}
    for file in files:
        tried[file] = _try(file, inputs, threads, batch_size)
        inputs = inputs or tried[file].inputs or None
    found = measure_interleaved(
        [
            Candidate(file, file.runtime, file.path, inputs or {})
            for file in files
            if tried[file].error is None
        ],
        rounds=rounds, samples_per_round=samples_per_round, processes=processes, threads=threads,
        batch_size=batch_size, time_budget_s=time_budget_s, seed=seed, progress=progress,
    )  # fmt: skip
    samples = [found.get(file, Samples(error=tried[file].error)) for file in files]
    first, outputs = samples[0], tried[files[0]].outputs
    batch = _batch_size(inputs or {}, batch_size)
    return [
        TimedFile(
            path=file.path,
            runtime=file.runtime,
            threads=own.threads,
            batch_size=batch,
            size_bytes=_size(file.path),
            difference=_difference(tried[file].outputs, outputs),
            error=own.error,
            **_times(own, first, seed),
        )
        for file, own in zip(files, samples, strict=True)
    ]


def _times(own: Samples, first: Samples, seed: int) -> dict[str, Any]:
    """The fields of a `TimedFile` that are its times."""
    if own.error is not None:
        return {"warnings": own.warnings}
    times = [worker.rounds for worker in own.workers]
    found: dict[str, Any] = {
        "latency_ms": Latency.of(statistics.flatten(times)),
        "warnings": (*own.warnings, *statistics.noise_warnings(times)),
    }
    if own is first:
        found["speedup"], found["interval"] = 1.0, (1.0, 1.0)
    elif first.error is None:
        reference = [worker.rounds for worker in first.workers]
        found["speedup"] = statistics.speedup(reference, times)
        found["interval"] = statistics.speedup_interval(reference, times, seed=seed)
    return found


def _try(
    file: FileInRuntime, inputs: Mapping[str, Array] | None, threads: int | None, batch_size: int
) -> _Tried:
    """Run a file once, on these inputs or on random ones of the sizes that it takes."""
    tried = _Tried()
    try:
        with open_session(
            file.runtime, file.path, threads=threads, batch_size=batch_size
        ) as session:
            own = random_inputs(session.inputs, batch_size)
            tried.inputs = own if inputs is None else inputs
            if _sizes(own) != _sizes(tried.inputs):
                tried.error = (
                    f"takes {_told(own)}, and not {_told(tried.inputs)}: files that are timed "
                    "beside each other take the same inputs"
                )
                return tried
            tried.outputs = list(session.run(tried.inputs).values())
    except ObcDeployError as error:
        tried.error = str(error)
    return tried


def _sizes(inputs: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in inputs.items()}


def _told(inputs: Mapping[str, Array]) -> str:
    return ", ".join(f"'{name}' {list(array.shape)}" for name, array in inputs.items()) or "nothing"


def _difference(found: Sequence[Array], wanted: Sequence[Array]) -> float | None:
    from obc_deploy.exporters.parity import relative_error

    if not found or [array.shape for array in found] != [array.shape for array in wanted]:
        return None
    error = relative_error(found, wanted)
    return error if np.isfinite(error) else None


def _size(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_size
    return None


def _batch_size(inputs: Mapping[str, Array], otherwise: int) -> int:
    array = next(iter(inputs.values()), None)
    return int(array.shape[0]) if array is not None and array.ndim else otherwise
