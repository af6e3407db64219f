"""A measurement: one variant in one runtime, with every raw sample and what it was worth.

`measurements.json` is a list of these. Optional values are null; NaN and infinity never occur.
Times are in ms, accuracies and agreements fractions of 1, operation counts for one sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from obc_deploy.benchmarks import statistics
from obc_deploy.costs import Costs
from obc_deploy.errors import ArtifactError, MeasurementError

Role: TypeAlias = Literal["dense-fp32", "dense-int8", "compressed"]
Milliseconds: TypeAlias = Annotated[float, Field(gt=0.0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]
Speedup: TypeAlias = Annotated[float, Field(gt=0.0)]
Interval: TypeAlias = tuple[float, float]

_NANOSECOND_DIGITS = 6


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Latency(_Record):
    """Percentiles of some timings, and the timings themselves, in ms."""

    p50: Milliseconds
    p90: Milliseconds
    p99: Milliseconds
    samples: tuple[Milliseconds, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Latency:
        """The percentiles of `samples`, in ms.

        Raises:
            MeasurementError: no samples, or one that is not a finite time.
        """
        kept = tuple(round(sample, _NANOSECOND_DIGITS) for sample in samples)
        return cls(
            p50=statistics.percentile(kept, 50),
            p90=statistics.percentile(kept, 90),
            p99=statistics.percentile(kept, 99),
            samples=kept,
        )


class WorkerSamples(_Record):
    """What one worker process measured: its rounds in order, warm-ups apart, in ms."""

    rounds: tuple[tuple[Milliseconds, ...], ...] = ()
    warmup_ms: tuple[Milliseconds, ...] = ()
    end_to_end_rounds: tuple[tuple[Milliseconds, ...], ...] = ()
    end_to_end_warmup_ms: tuple[Milliseconds, ...] = ()


class Prediction(_Record):
    """Speedup over the dense float network that operation counts promise."""

    macs: Speedup
    bops: Speedup


class Measurement(_Record):
    """One variant in one runtime.

    Attributes:
        variant: the variant's name, unique together with `runtime`.
        scheme: what was done to its layers.
        runtime: where it ran.
        role: a dense baseline, or a compressed network.
        threads: threads of the runtime; None where it cannot be told.
        batch_size: samples in one inference.
        accuracy: share of right answers of the artifact in this runtime.
        accuracy_interval: 95 % Wilson interval of it.
        accuracy_samples: how many samples it was evaluated on.
        agreement: share of samples on which artifact and PyTorch model give the same answer.
        macs: multiply-accumulates left, one sample.
        bops: macs · max(weight bits, activation bits), one sample.
        bit_operations: macs · weight bits · activation bits, one sample.
        size_bytes: the artifact file's size.
        latency_ms: of the bare inference of one batch.
        end_to_end_ms: median of preprocessing, inference and postprocessing of one batch.
        end_to_end: the timings behind it.
        warmup_ms: inferences before the samples, not part of any percentile.
        processes: the same samples by worker process and round.
        speedup_vs_dense_fp32: against the dense float network in the same runtime and run.
        speedup_vs_dense_fp32_interval: 95 % bootstrap interval of it.
        speedup_vs_dense_int8: against the dense 8-bit network in the same runtime and run.
        speedup_vs_dense_int8_interval: 95 % bootstrap interval of it.
        predicted_speedup: what operation counts promise over the dense float network.
        layers_accelerated: layers that the runtime really ran sparse or in int8.
        layers_total: layers that a scheme was applied to.
        fraction_native: share of the graph that the runtime's own engine ran.
        warnings: what a reader must know before trusting the numbers.
        error: why there are no (or fewer) timings; None where all went well.
    """

    variant: str
    scheme: str
    runtime: str
    role: Role = "compressed"
    threads: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=1, ge=1)
    accuracy: Fraction | None = None
    accuracy_interval: Interval | None = None
    accuracy_samples: int | None = Field(default=None, ge=1)
    agreement: Fraction | None = None
    macs: int | None = Field(default=None, ge=0)
    bops: int | None = Field(default=None, ge=0)
    bit_operations: int | None = Field(default=None, ge=0)
    size_bytes: int | None = Field(default=None, ge=0)
    latency_ms: Latency | None = None
    end_to_end_ms: Milliseconds | None = None
    end_to_end: Latency | None = None
    warmup_ms: tuple[Milliseconds, ...] = ()
    processes: tuple[WorkerSamples, ...] = ()
    speedup_vs_dense_fp32: Speedup | None = None
    speedup_vs_dense_fp32_interval: Interval | None = None
    speedup_vs_dense_int8: Speedup | None = None
    speedup_vs_dense_int8_interval: Interval | None = None
    predicted_speedup: Prediction | None = None
    layers_accelerated: int | None = Field(default=None, ge=0)
    layers_total: int | None = Field(default=None, ge=0)
    fraction_native: Fraction | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Measurement:
        accelerated, layers = self.layers_accelerated, self.layers_total
        if accelerated is not None and layers is not None and accelerated > layers:
            raise ValueError(f"{accelerated} of {layers} layers accelerated")
        for interval in (
            self.accuracy_interval,
            self.speedup_vs_dense_fp32_interval,
            self.speedup_vs_dense_int8_interval,
        ):
            if interval is not None and interval[0] > interval[1]:
                raise ValueError(f"interval {interval} ends before it starts")
        return self

    @property
    def rounds(self) -> tuple[tuple[tuple[float, ...], ...], ...]:
        """Inference samples as workers -> rounds -> ms, the form that `statistics` takes."""
        return tuple(worker.rounds for worker in self.processes)

    @property
    def slower_than_dense(self) -> bool:
        """A compressed network whose whole interval lies below a dense baseline's speed."""
        if self.role != "compressed":
            return False
        intervals = (self.speedup_vs_dense_fp32_interval, self.speedup_vs_dense_int8_interval)
        return any(interval is not None and interval[1] < 1.0 for interval in intervals)


def measurement(
    *,
    variant: str,
    scheme: str,
    runtime: str,
    role: Role = "compressed",
    threads: int | None = None,
    batch_size: int = 1,
    processes: Sequence[WorkerSamples] = (),
    costs: Costs | None = None,
    accuracy: float | None = None,
    accuracy_samples: int | None = None,
    agreement: float | None = None,
    size_bytes: int | None = None,
    layers_accelerated: int | None = None,
    layers_total: int | None = None,
    fraction_native: float | None = None,
    warnings: Iterable[str] = (),
    error: str | None = None,
) -> Measurement:
    """A measurement from raw samples: percentiles, intervals, predictions and noise warnings.

    Speedups need the other variants: `with_speedups` adds them. Fields are those of `Measurement`.

    Raises:
        MeasurementError: a value is out of its range.
    """
    workers = [worker.rounds for worker in processes]
    samples = statistics.flatten(workers)
    end_to_end = statistics.flatten([worker.end_to_end_rounds for worker in processes])
    predicted = costs.predicted_speedup if costs is not None else None
    interval = None
    if accuracy is not None and accuracy_samples is not None:
        interval = statistics.wilson_interval(round(accuracy * accuracy_samples), accuracy_samples)
    complete = Latency.of(end_to_end) if end_to_end else None
    try:
        return Measurement(
            variant=variant,
            scheme=scheme,
            runtime=runtime,
            role=role,
            threads=threads,
            batch_size=batch_size,
            accuracy=accuracy,
            accuracy_interval=interval,
            accuracy_samples=accuracy_samples,
            agreement=agreement,
            macs=costs.macs if costs is not None else None,
            bops=costs.bops if costs is not None else None,
            bit_operations=costs.bit_operations if costs is not None else None,
            size_bytes=size_bytes,
            latency_ms=Latency.of(samples) if samples else None,
            end_to_end_ms=complete.p50 if complete is not None else None,
            end_to_end=complete,
            warmup_ms=tuple(time for worker in processes for time in worker.warmup_ms),
            processes=tuple(processes),
            predicted_speedup=(
                Prediction(macs=predicted.macs, bops=predicted.bops) if predicted else None
            ),
            layers_accelerated=layers_accelerated,
            layers_total=layers_total,
            fraction_native=fraction_native,
            warnings=(*warnings, *(statistics.noise_warnings(workers) if samples else ())),
            error=error,
        )
    except ValidationError as wrong:
        raise MeasurementError(
            f"measurement of '{variant}' in {runtime}: {_reason(wrong)}"
        ) from None


def with_speedups(
    measurements: Iterable[Measurement],
    *,
    level: float = statistics.DEFAULT_LEVEL,
    resamples: int = statistics.DEFAULT_RESAMPLES,
    seed: int = 0,
) -> list[Measurement]:
    """The same measurements with their speedups over the dense baselines of the same run.

    A baseline is the measurement with the role "dense-fp32" (or "dense-int8") of the same runtime,
    threads and batch size; without one that speedup stays None. All must come from one interleaved
    run: the intervals rely on round r of all of them having been measured side by side. Adds a
    warning where the interval cannot tell faster from slower, and where a compressed network is
    slower than a dense one.

    Raises:
        MeasurementError: two measurements claim to be the same baseline.
    """
    rows = list(measurements)
    baselines: dict[tuple[str, str, int | None, int], Measurement] = {}
    for row in rows:
        if row.role == "compressed":
            continue
        key = (row.role, row.runtime, row.threads, row.batch_size)
        if key in baselines:
            raise MeasurementError(
                f"both '{baselines[key].variant}' and '{row.variant}' are the {row.role} baseline "
                f"in {row.runtime}; keep one"
            )
        baselines[key] = row

    completed: list[Measurement] = []
    for row in rows:
        found: dict[str, float | Interval | tuple[str, ...] | None] = {}
        warnings = list(row.warnings)
        for role, field, words in (
            ("dense-fp32", "speedup_vs_dense_fp32", "dense fp32"),
            ("dense-int8", "speedup_vs_dense_int8", "dense int8"),
        ):
            baseline = baselines.get((role, row.runtime, row.threads, row.batch_size))
            if baseline is None or baseline.latency_ms is None or row.latency_ms is None:
                found[field] = found[f"{field}_interval"] = None
                continue
            if baseline is row:
                found[field], found[f"{field}_interval"] = 1.0, (1.0, 1.0)
                continue
            ratio = statistics.speedup(baseline.rounds, row.rounds)
            low, high = statistics.speedup_interval(
                baseline.rounds, row.rounds, level=level, resamples=resamples, seed=seed
            )
            found[field], found[f"{field}_interval"] = ratio, (low, high)
            if row.role != "compressed":
                continue
            if high < 1.0:
                warnings.append(
                    f"slower than {words} in {row.runtime}: {ratio:.2f}x "
                    f"({low:.2f} to {high:.2f}); use the dense network here, or another scheme or "
                    "runtime"
                )
            elif low <= 1.0:
                warnings.append(
                    f"cannot tell faster from slower than {words} in {row.runtime}: {ratio:.2f}x "
                    f"({low:.2f} to {high:.2f}); take more rounds"
                )
        found["warnings"] = tuple(dict.fromkeys(warnings))
        completed.append(row.model_copy(update=found))
    return completed


_LIST = TypeAdapter(list[Measurement])


def write_measurements(path: Path | str, measurements: Iterable[Measurement]) -> Path:
    """Write measurements as a JSON list; the file is whole or not there.

    Raises:
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    text = json.dumps(
        [row.model_dump(mode="json") for row in measurements], indent=1, allow_nan=False
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as wrong:
        partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write measurements to '{path}': {wrong.strerror}; choose a writable place"
        ) from None
    return path


def read_measurements(path: Path | str) -> list[Measurement]:
    """Read what `write_measurements` wrote.

    Raises:
        ArtifactError: the file is missing, or holds something else.
    """
    path = Path(path)
    try:
        return _LIST.validate_json(path.read_bytes())
    except OSError as wrong:
        raise ArtifactError(
            f"cannot read measurements from '{path}': {wrong.strerror}; run the benchmark first"
        ) from None
    except ValidationError as wrong:
        raise ArtifactError(
            f"'{path}' holds no measurements: {_reason(wrong)}; run the benchmark again"
        ) from None


def _reason(wrong: ValidationError) -> str:
    first = wrong.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = " ".join(first["msg"].split())
    return f"{place}: {message}" if place else message
