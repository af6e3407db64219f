"""How much faster one ONNX file is than another that computes the same, timed side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.benchmarks import statistics
from obc_deploy.benchmarks.interleaving import Candidate, measure_interleaved
from obc_deploy.errors import MeasurementError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from obc_deploy.solvers.contract import Progress


@dataclass(frozen=True)
class FileSpeedup:
    """Two files' times at one batch size.

    Attributes:
        before_ms: median time of an inference of the first file, ms.
        after_ms: the same of the second.
        speedup: median over rounds of before / after; above 1 the second is faster.
        interval: 95 % bootstrap interval of the speedup.
        threads: threads that both ran on.
        batch_size: samples in an inference.
        noisy: whether the timings disagree with each other more than a quiet machine's do.
    """

    before_ms: float
    after_ms: float
    speedup: float
    interval: tuple[float, float]
    threads: int
    batch_size: int
    noisy: bool


def file_speedup(
    before: Path,
    after: Path,
    inputs: Mapping[str, npt.NDArray[np.generic]],
    *,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    rounds: int = 5,
    processes: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> FileSpeedup:
    """Time two files in turns, each in worker processes of its own.

    Args:
        before: the file to compare with.
        after: the file of interest; its inputs have the same names.
        inputs: input name to array, one batch.
        runtime: the runtime of both.
        threads: threads, pinned to as many cores; the machine's physical cores where None.
        rounds: rounds in each worker process.
        processes: fresh worker processes a file.
        seed: of orders and resampling.
        progress: told the share of the work done.

    Raises:
        MeasurementError: one of them could not be timed; the message says why.
    """
    batch_size = _batch_size(inputs)
    found = measure_interleaved(
        [Candidate(path, runtime, path, inputs) for path in (before, after)],
        rounds=rounds, processes=processes, threads=threads, batch_size=batch_size, seed=seed,
        progress=progress,
    )  # fmt: skip
    for path, samples in found.items():
        if samples.error is not None or samples.threads is None:
            raise MeasurementError(f"'{path}' could not be timed: {samples.error}")
    old, new = ([worker.rounds for worker in found[path].workers] for path in (before, after))
    return FileSpeedup(
        before_ms=statistics.median(statistics.flatten(old)),
        after_ms=statistics.median(statistics.flatten(new)),
        speedup=statistics.speedup(old, new),
        interval=statistics.speedup_interval(old, new, seed=seed),
        threads=found[after].threads or 0,
        batch_size=batch_size,
        noisy=any(map(statistics.noise_warnings, (old, new))),
    )


def _batch_size(inputs: Mapping[str, npt.NDArray[Any]]) -> int:
    first = next(iter(inputs.values()))
    return int(first.shape[0]) if first.ndim else 1
