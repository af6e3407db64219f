"""Time several candidates side by side, so that what disturbs the machine disturbs all of them.

Each candidate gets a fresh worker process. In each round every candidate is timed once, in an order
that is shuffled anew (A B C, C A B, ...), with only one worker at work at a time. After the rounds
all workers are closed and started again: how a process happens to lie in memory makes it faster or
slower for its whole life, so one process a candidate is not enough.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from obc_deploy.benchmarks import statistics
from obc_deploy.benchmarks.measurement import WorkerSamples
from obc_deploy.errors import MeasurementError, ObcDeployError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from obc_deploy.data import Preprocessing
    from obc_deploy.solvers.contract import Progress

MIN_SAMPLES_PER_ROUND = 3
"""However slow a network is, a round has this many samples."""
MAX_GROWTH = 20
"""However fast a network is, a round has at most this many times the samples asked for."""
MIN_ROUND_MS = 20.0
"""A round of a fast network lasts about this long; shorter ones see a moment of the machine."""
PILOT_SAMPLES = 3
"""Last warm-up inferences, from which calibration learns how long one takes."""
REWARM = 2
"""Inferences before a round that are not samples: other workers emptied the caches."""


class Timings(Protocol):
    """What a session's `time` returns, in ms."""

    @property
    def warmup_ms(self) -> Iterable[float]:
        """Inferences before the samples."""
        ...

    @property
    def samples_ms(self) -> Iterable[float]:
        """One time an inference."""
        ...


class TimedSession(Protocol):
    """The part of a runtime's session that timing needs."""

    @property
    def version(self) -> str:
        """The runtime's version."""
        ...

    @property
    def threads(self) -> int:
        """Threads it computes with."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the runtime says about the loaded artifact."""
        ...

    def time(
        self,
        inputs: Mapping[str, npt.NDArray[Any]],
        *,
        warmup: int,
        samples: int,
        end_to_end: Preprocessing | None = None,
    ) -> Timings:
        """Time inferences of `inputs` in the worker, or the whole way from a raw input."""
        ...

    def close(self) -> None:
        """End the worker."""
        ...


@dataclass(frozen=True)
class EndToEnd:
    """What the whole way starts from.

    Attributes:
        inputs: input name to the raw array, one batch.
        preprocessing: how the worker makes the model's input of it.
    """

    inputs: Mapping[str, npt.NDArray[np.generic]]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        key: what the result is filed under; unique.
        runtime: the runtime's name.
        path: the artifact file.
        inputs: input name to array, one batch.
        end_to_end: the raw input and its preprocessing; None where only the bare inference is
            timed.
    """

    key: Hashable
    runtime: str
    path: Path
    inputs: Mapping[str, npt.NDArray[np.generic]]
    end_to_end: EndToEnd | None = None


@dataclass(frozen=True)
class Samples:
    """What was measured of one candidate.

    Attributes:
        workers: one entry a worker process, in the order in which they ran.
        samples_per_round: how many samples calibration settled on.
        version: the runtime's version; None where no worker started.
        threads: threads the workers computed with; None where no worker started.
        facts: what the runtime said about the artifact when it loaded it.
        warnings: what calibration had to change.
        error: why the candidate has no timings, or fewer than the others.
    """

    workers: tuple[WorkerSamples, ...] = ()
    samples_per_round: int = 0
    version: str | None = None
    threads: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str | None = None


OpenSession = Callable[[Candidate], TimedSession]
"""Starts a fresh worker process for a candidate."""


@dataclass
class _Worker:
    """One worker process while it runs, and what it has measured so far."""

    session: TimedSession
    rounds: list[tuple[float, ...]] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)
    end_to_end_rounds: list[tuple[float, ...]] = field(default_factory=list)
    end_to_end_warmup_ms: list[float] = field(default_factory=list)

    def samples(self) -> WorkerSamples:
        return WorkerSamples(
            rounds=tuple(self.rounds),
            warmup_ms=tuple(self.warmup_ms),
            end_to_end_rounds=tuple(self.end_to_end_rounds),
            end_to_end_warmup_ms=tuple(self.end_to_end_warmup_ms),
        )


def measure_interleaved(
    candidates: Sequence[Candidate],
    *,
    rounds: int = 5,
    samples_per_round: int = 10,
    warmup: int = 10,
    threads: int | None = 1,
    batch_size: int = 1,
    processes: int = 2,
    time_budget_s: float = 20.0,
    timeout_s: float = 120.0,
    seed: int = 0,
    progress: Progress | None = None,
    open_session: OpenSession | None = None,
) -> dict[Hashable, Samples]:
    """Time all candidates side by side: processes x rounds x samples, in shuffled order.

    The number of samples in a round is fitted to each candidate after its first warm-up: more for a
    network so fast that a round would be over in a moment, fewer (at least 3) where the candidate
    would exceed `time_budget_s`. A candidate whose worker fails keeps what it has and its error;
    the others go on.

    Args:
        candidates: what to time; keys must differ.
        rounds: rounds in each worker process.
        samples_per_round: samples that a round should have.
        warmup: inferences after a worker's start that are not samples; at least 3 are made.
        threads: threads of the runtime; None leaves the choice to it.
        batch_size: samples in one inference, as the inputs have it.
        processes: worker processes a candidate, one after another. At least 2 show whether
            processes differ.
        time_budget_s: seconds that one candidate's inferences may take in all.
        timeout_s: seconds after which a worker that does not answer counts as failed.
        seed: seed of the order within rounds.
        progress: called with the share of work that is done.
        open_session: starts a worker; `obc_deploy.runtimes.open_session` where not given.

    Returns:
        Key to samples, in the candidates' order.

    Raises:
        MeasurementError: a number is out of range, or two candidates share a key.
    """
    _check(candidates, rounds, samples_per_round, warmup, processes, time_budget_s)
    if open_session is None:
        open_session = _opener(threads, batch_size, timeout_s)
    order = random.Random(seed)
    finished: dict[Hashable, list[WorkerSamples]] = {one.key: [] for one in candidates}
    counts: dict[Hashable, tuple[int, int]] = {}
    warnings: dict[Hashable, tuple[str, ...]] = {one.key: () for one in candidates}
    told: dict[Hashable, tuple[str | None, int | None, dict[str, Any]]] = {}
    errors: dict[Hashable, str] = {}
    steps = processes * (1 + rounds) * max(1, len(candidates))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done / steps)

    for generation in range(processes):
        workers: dict[Hashable, _Worker] = {}
        try:
            for candidate in order.sample(list(candidates), len(candidates)):
                key = candidate.key
                if key not in errors:
                    try:
                        session = open_session(candidate)
                        worker = workers[key] = _Worker(session)
                        told[key] = (session.version, session.threads, dict(session.facts))
                        pilot, pilot_end_to_end = _warm_up(candidate, worker, warmup)
                        if key not in counts:
                            counts[key], warnings[key] = _fit_samples(
                                pilot,
                                pilot_end_to_end,
                                samples_per_round=samples_per_round,
                                rounds=rounds * processes,
                                time_budget_s=time_budget_s,
                            )
                    except ObcDeployError as wrong:
                        errors[key] = _failure(wrong, generation, processes)
                advance()
            for _ in range(rounds):
                for candidate in order.sample(list(candidates), len(candidates)):
                    key = candidate.key
                    if key not in errors:
                        try:
                            _time_round(candidate, workers[key], *counts[key])
                        except ObcDeployError as wrong:
                            errors[key] = _failure(wrong, generation, processes)
                    advance()
        finally:
            _close_all(workers)
        for key, worker in workers.items():
            if worker.rounds:
                finished[key].append(worker.samples())

    found: dict[Hashable, Samples] = {}
    for one in candidates:
        version, used_threads, facts = told.get(one.key, (None, None, {}))
        found[one.key] = Samples(
            workers=tuple(finished[one.key]),
            samples_per_round=counts.get(one.key, (0, 0))[0],
            version=version,
            threads=used_threads,
            facts=facts,
            warnings=warnings[one.key],
            error=errors.get(one.key),
        )
    return found


def _check(
    candidates: Sequence[Candidate],
    rounds: int,
    samples_per_round: int,
    warmup: int,
    processes: int,
    time_budget_s: float,
) -> None:
    for name, value, least in (
        ("rounds", rounds, 1),
        ("samples_per_round", samples_per_round, 1),
        ("warmup", warmup, 0),
        ("processes", processes, 1),
    ):
        if value < least:
            raise MeasurementError(f"{name} is {value}; measuring needs at least {least}")
    if not (math.isfinite(time_budget_s) and time_budget_s > 0.0):
        raise MeasurementError(f"time_budget_s is {time_budget_s:g}; give seconds above 0")
    seen: set[Hashable] = set()
    for candidate in candidates:
        if candidate.key in seen:
            raise MeasurementError(f"two candidates are called {candidate.key!r}; rename one")
        seen.add(candidate.key)


def _opener(threads: int | None, batch_size: int, timeout_s: float) -> OpenSession:
    from obc_deploy.runtimes.session import open_session

    def start(candidate: Candidate) -> TimedSession:
        return open_session(
            candidate.runtime,
            candidate.path,
            threads=threads,
            batch_size=batch_size,
            timeout_s=timeout_s,
        )

    return start


def _warm_up(
    candidate: Candidate, worker: _Worker, warmup: int
) -> tuple[Sequence[float], Sequence[float]]:
    """Run the warm-up inferences; the last few, in ms, tell how long one takes."""
    timed = worker.session.time(
        candidate.inputs,
        warmup=max(0, warmup - PILOT_SAMPLES),
        samples=PILOT_SAMPLES,
    )
    pilot = _floats(timed.samples_ms)
    worker.warmup_ms.extend((*_floats(timed.warmup_ms), *pilot))
    if candidate.end_to_end is None:
        return pilot, ()
    whole = worker.session.time(
        candidate.end_to_end.inputs,
        warmup=max(0, warmup // 2 - PILOT_SAMPLES),
        samples=PILOT_SAMPLES,
        end_to_end=candidate.end_to_end.preprocessing,
    )
    pilot_whole = _floats(whole.samples_ms)
    worker.end_to_end_warmup_ms.extend((*_floats(whole.warmup_ms), *pilot_whole))
    return pilot, pilot_whole


def _floats(times: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(time) for time in times)


def _fit_samples(
    pilot: Sequence[float],
    pilot_end_to_end: Sequence[float],
    *,
    samples_per_round: int,
    rounds: int,
    time_budget_s: float,
) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Samples a round of the bare inference and of the whole way, and what to tell about it."""
    inference = statistics.median(pilot)
    whole = statistics.median(pilot_end_to_end) if pilot_end_to_end else 0.0
    wanted = max(samples_per_round, math.ceil(MIN_ROUND_MS / inference))
    wanted = min(wanted, samples_per_round * MAX_GROWTH)
    # The whole way is a second opinion, not what speedups are made of: half as many samples do.
    share = 0.5 if pilot_end_to_end else 0.0
    affordable = int(time_budget_s * 1000.0 / (rounds * (inference + share * whole))) - REWARM
    least = min(MIN_SAMPLES_PER_ROUND, samples_per_round)
    count = max(least, min(wanted, affordable))
    warnings: tuple[str, ...] = ()
    if count < samples_per_round:
        warnings = (
            f"{count} samples a round instead of {samples_per_round}: one inference takes "
            f"{inference:.3g} ms and the time budget is {time_budget_s:g} s; raise the budget for "
            "narrower intervals",
        )
    half = max(least, math.ceil(count * share)) if pilot_end_to_end else 0
    return (count, half), warnings


def _time_round(
    candidate: Candidate, worker: _Worker, samples: int, end_to_end_samples: int
) -> None:
    timed = worker.session.time(candidate.inputs, warmup=REWARM, samples=samples)
    worker.warmup_ms.extend(_floats(timed.warmup_ms))
    worker.rounds.append(_floats(timed.samples_ms))
    if candidate.end_to_end is not None:
        whole = worker.session.time(
            candidate.end_to_end.inputs,
            warmup=1,
            samples=end_to_end_samples,
            end_to_end=candidate.end_to_end.preprocessing,
        )
        worker.end_to_end_warmup_ms.extend(_floats(whole.warmup_ms))
        worker.end_to_end_rounds.append(_floats(whole.samples_ms))


def _close_all(workers: Mapping[Hashable, _Worker]) -> None:
    """Close every worker, whatever the others do: none may outlive its generation."""
    interrupted: BaseException | None = None
    for worker in workers.values():
        try:
            worker.session.close()
        except ObcDeployError:
            # A worker that died has its error on record already; its samples are still good.
            continue
        except BaseException as wrong:
            interrupted = wrong
    if interrupted is not None:
        raise interrupted


def _failure(wrong: ObcDeployError, generation: int, processes: int) -> str:
    message = " ".join(str(wrong).split())
    return message if processes == 1 else f"{message} (worker {generation + 1} of {processes})"
