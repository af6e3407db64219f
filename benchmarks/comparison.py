"""The comparison: compressed networks and their dense baselines, in the runtimes, side by side.

Every variant is exported for every runtime, checked for accuracy and for what the runtime really
ran fast, and then all are timed interleaved in fresh worker processes. Predicted speedups (MACs,
BOPs) stand next to measured ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from obc_deploy.artifacts import Artifact, load_artifact
from obc_deploy.benchmarks.interleaving import Candidate, EndToEnd, measure_interleaved
from obc_deploy.benchmarks.measurement import Measurement, measurement, with_speedups
from obc_deploy.costs import Costs, LayerCost, total
from obc_deploy.data import Preprocessing
from obc_deploy.errors import ArtifactError, MeasurementError, ObcDeployError
from obc_deploy.manifest import Manifest
from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.audit import Expectation, audit, count_accelerated
from obc_deploy.runtimes.registry import require_target, runtime_info
from obc_deploy.runtimes.session import Session, open_session
from obc_deploy.targets import TARGETS, Target, as_target

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel
    from obc_deploy.data import Samples

Stage = Callable[[str, float], None]
Array = npt.NDArray[Any]

DEFAULT_TARGETS = ("onnxruntime", "ort-sparse", "deepsparse")
"""Targets measured where nothing else is asked for, as far as their runtimes work here."""


@dataclass
class _Entry:
    """One variant in one runtime on its way to a measurement."""

    variant: str
    artifact: Artifact
    target: Target
    model: CompressedModel | None
    accuracy: float | None = None
    accuracy_samples: int | None = None
    agreement: float | None = None
    accelerated: int | None = None
    total: int | None = None
    fraction_native: float | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest.compression

    @property
    def key(self) -> tuple[str, str]:
        return (self.variant, self.target.name)


def working_targets() -> list[str]:
    """The default targets whose runtimes, and kernels of ours, are installed here."""
    return [
        name
        for name in DEFAULT_TARGETS
        if runtime_info(TARGETS[name].runtime).works
        and (sparse.is_available() or not TARGETS[name].sparse_operators)
    ]


def costs_of(manifest: Manifest) -> Costs:
    """Operations and bytes of a manifest's layers."""
    return total(
        LayerCost(r.name, r.macs, r.density, r.weight_bits, r.activation_bits, r.weights)
        for r in manifest.layers
    )


def benchmark(
    subjects: Sequence[CompressedModel | Artifact | str | Path],
    *,
    runtimes: Sequence[str] | None = None,
    data: object = None,
    threads: int | None = None,
    batch_size: int = 1,
    rounds: int = 5,
    samples_per_round: int = 10,
    processes: int = 2,
    warmup: int = 10,
    time_budget_s: float = 20.0,
    seed: int = 0,
    artifacts: Path | str | None = None,
    progress: Stage | None = None,
) -> list[Measurement]:
    """Measure compressed networks against their dense selves, in one interleaved run.

    The dense float and dense int8 baselines of the first subject that has them take part too.

    Args:
        subjects: compressed models, run directories, or artifacts.
        runtimes: targets to measure on; every default one that works here where None.
        data: labelled samples for accuracy and agreement; the model's own calibration samples
            (agreement only) where None.
        threads: threads, pinned to as many cores; the machine's physical cores where None.
        batch_size: samples in one inference.
        rounds: rounds in each worker process.
        samples_per_round: timed inferences a round.
        processes: fresh worker processes a variant.
        warmup: inferences of each worker that are not samples.
        time_budget_s: seconds that one variant may be timed for in one runtime.
        seed: of orders and resampling.
        artifacts: folder for the exported files; a temporary one where None.
        progress: called with what is being done and the share of it.

    Returns:
        One measurement a variant and runtime, speedups filled in.

    Raises:
        MeasurementError: nothing to measure, or numbers out of range.
        TargetError: a target that was asked for is not measured.
        RuntimeMissingError: a runtime that was asked for is not installed.
        ArtifactError: an artifact is missing or damaged.
    """
    if not subjects:
        raise MeasurementError("nothing to measure: give at least one model, run or artifact")
    say = progress or (lambda what, share: None)
    chosen = [as_target(name) for name in (runtimes if runtimes is not None else working_targets())]
    if not chosen:
        raise MeasurementError("no runtime works here; 'obc-deploy doctor' says what to install")
    for target in chosen:
        require_target(target)
    models, files = _sort(subjects)
    with ExitStack() as stack:
        folder = (
            Path(artifacts)
            if artifacts is not None
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="obc-deploy-")))
        )
        entries = _exported(models, chosen, folder, batch_size, say)
        entries += [_file_entry(artifact, chosen, batch_size) for artifact in files]
        if not entries:
            raise MeasurementError(
                f"none of the artifacts was made for {', '.join(t.name for t in chosen)}"
            )
        raw = _raw_samples(models, data)
        for index, entry in enumerate(entries):
            say("checking answers", index / len(entries))
            _examine(entry, raw, data is not None, threads, batch_size)
        say("checking answers", 1.0)
        return _timed(
            entries, raw, threads=threads, batch_size=batch_size, rounds=rounds,
            samples_per_round=samples_per_round, processes=processes, warmup=warmup,
            time_budget_s=time_budget_s, seed=seed, say=say,
        )  # fmt: skip


def _sort(
    subjects: Sequence[CompressedModel | Artifact | str | Path],
) -> tuple[dict[str, CompressedModel], list[Artifact]]:
    """Models by variant name, dense baselines first, and the artifacts."""
    from obc_deploy.compression import CompressedModel
    from obc_deploy.run_directory import load_run

    models: list[CompressedModel] = []
    files: list[Artifact] = []
    for subject in subjects:
        if isinstance(subject, Artifact):
            files.append(subject)
        elif isinstance(subject, CompressedModel):
            models.append(subject)
        elif Path(subject).suffix == ".onnx":
            files.append(load_artifact(subject))
        else:
            models.append(load_run(subject))
    roles = {model.role for model in models} | {f.manifest.compression.role for f in files}
    baselines: list[CompressedModel] = []
    for model in models:
        for baseline in model.baselines:
            if baseline.role not in roles:
                roles.add(baseline.role)
                baselines.append(baseline)
    named: dict[str, CompressedModel] = {}
    for model in (*baselines, *models):
        name = model.role if model.role != "compressed" else model.scheme
        unique, number = name, 2
        while unique in named:
            unique, number = f"{name} ({number})", number + 1
        named[unique] = model
    return named, files


def _file_entry(artifact: Artifact, targets: Sequence[Target], batch_size: int) -> _Entry:
    names = [target.name for target in targets]
    target = as_target(artifact.target)
    if target.name not in names:
        raise ArtifactError(
            f"'{artifact.path}' was exported for {target.name}, which is not measured here "
            f"({', '.join(names)}); add --runtime {target.name}"
        )
    fixed = artifact.manifest.batch_size
    if fixed is not None and fixed != batch_size:
        raise ArtifactError(
            f"'{artifact.path}' has batch size {fixed}, not {batch_size}; pass --batch-size {fixed}"
        )
    role = artifact.manifest.compression.role
    return _Entry(role if role != "compressed" else artifact.scheme, artifact, target, None)


def _exported(
    models: Mapping[str, CompressedModel],
    targets: Sequence[Target],
    folder: Path,
    batch_size: int,
    say: Stage,
) -> list[_Entry]:
    entries: list[_Entry] = []
    count = max(1, len(models) * len(targets))
    for target in targets:
        for variant, model in models.items():
            say(f"exporting for {target.name}", len(entries) / count)
            safe = variant.replace(":", "-").replace("@", "-").replace(" ", "")
            file = folder / target.name / safe / f"batch{batch_size}.onnx"
            entries.append(
                _Entry(variant, _artifact(model, file, target, batch_size), target, model)
            )
    if models:
        say("exporting", 1.0)
    return entries


def _artifact(model: CompressedModel, file: Path, target: Target, batch_size: int) -> Artifact:
    """The artifact that is there already if it is of this very model for this machine, or new.

    One that another version of the exporter wrote is not what this one is to be judged by.
    """
    from obc_deploy.exporters.exporter_checksum import exporter_checksum
    from obc_deploy.exporters.operator_costs import processor_of

    if file.is_file():
        try:
            known = load_artifact(file)
        except ArtifactError:
            known = None
        if (
            known is not None
            and known.manifest.compression == model.manifest
            and known.manifest.processor == processor_of(target)
            and known.manifest.exporter == exporter_checksum(target)
        ):
            return known
    return model.export(file, target=target, batch_size=batch_size)


def _raw_samples(models: Mapping[str, CompressedModel], data: object) -> Samples | None:
    from obc_deploy.data import as_samples

    own = next((model.samples for model in models.values()), None)
    if data is None:
        return own
    preprocessing = own.preprocessing if own is not None else None
    found = as_samples(data)
    if found.preprocessing is None and preprocessing is not None:
        found = as_samples(found, preprocessing=preprocessing)
    return found


def _feeds(session: Session, arrays: Sequence[Array]) -> dict[str, Array]:
    return {
        spec.name: np.ascontiguousarray(array)
        for spec, array in zip(session.inputs, arrays, strict=True)
    }


def _batch(samples: Samples, start: int, size: int, *, raw: bool = False) -> tuple[Array, ...]:
    """`size` samples from `start` on, the last one repeated where they run out."""
    index = np.minimum(np.arange(start, start + size), len(samples) - 1)
    if raw:
        return tuple(array[index] for array in samples.inputs.values())
    chunks = [samples.arrays(int(i), int(i) + 1) for i in index]
    return tuple(np.concatenate([chunk[k] for chunk in chunks]) for k in range(len(chunks[0])))


def _artifact_predictions(session: Session, samples: Samples, batch_size: int) -> Array:
    found = []
    for start in range(0, len(samples), batch_size):
        outputs = session.run(_feeds(session, _batch(samples, start, batch_size)))
        first = next(iter(outputs.values()))
        found.append(first.reshape(batch_size, -1).argmax(1))
    return np.concatenate(found)[: len(samples)]


def _examine(
    entry: _Entry, samples: Samples | None, labelled: bool, threads: int | None, batch_size: int
) -> None:
    """Accuracy, agreement with PyTorch, and what the runtime really accelerated."""
    if samples is None:
        entry.warnings.append("no samples at hand: accuracy and agreement were not measured")
        return
    try:
        with open_session(
            entry.target.runtime, entry.artifact.path, threads=threads, batch_size=batch_size
        ) as session:
            guesses = _artifact_predictions(session, samples, batch_size)
            found = audit(session, _feeds(session, _batch(samples, 0, batch_size)))
    except ObcDeployError as error:
        entry.error = str(error)
        return
    if entry.model is not None:
        from obc_deploy.accuracy import predictions

        reference = predictions(entry.model.module(entry.target), samples).numpy()
        entry.agreement = float((guesses == reference).mean())
    if labelled and samples.labels is not None:
        entry.accuracy = float((guesses == samples.labels).mean())
        entry.accuracy_samples = len(samples)
    sparse_runtime = bool(entry.target.sparse_from)
    expected = {
        # Where no runtime skips zeros, an int8 layer got all that there was to get.
        layer.name: Expectation(
            layer.output, layer.sparse and (sparse_runtime or not layer.int8), layer.int8
        )
        for layer in entry.artifact.manifest.layers
    }
    counted = count_accelerated(found, expected)
    entry.accelerated, entry.total = counted.accelerated, counted.total
    entry.fraction_native = found.fraction_native
    if found.fallback:
        entry.warnings.extend(f"fell back: {reason}" for reason in found.reasons)
    reasons: dict[str, list[str]] = {}
    for name, reason in counted.reasons.items():
        reasons.setdefault(reason, []).append(name)
    entry.warnings.extend(
        f"not accelerated: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({reason})"
        for reason, names in reasons.items()
    )


def _preprocessing(samples: Samples) -> Preprocessing:
    """What the worker does to the raw samples, as `Samples.arrays` does it."""
    first = next(iter(samples.inputs.values()))
    if first.dtype != np.uint8:
        return Preprocessing(scale=1.0)
    return samples.preprocessing or Preprocessing()


def _timed(
    entries: Sequence[_Entry],
    samples: Samples | None,
    *,
    threads: int | None,
    batch_size: int,
    rounds: int,
    samples_per_round: int,
    processes: int,
    warmup: int,
    time_budget_s: float,
    seed: int,
    say: Stage,
) -> list[Measurement]:
    candidates = []
    for entry in entries:
        if entry.error is not None:
            continue
        names = list(entry.manifest.model.inputs)
        end_to_end = None
        if samples is not None:
            arrays = _batch(samples, 0, batch_size)
            raw = _batch(samples, 0, batch_size, raw=True)
            end_to_end = EndToEnd(dict(zip(names, raw, strict=True)), _preprocessing(samples))
        else:
            rng = np.random.default_rng(seed)
            arrays = tuple(
                rng.standard_normal((batch_size, *shape)).astype(np.float32)
                for shape in entry.manifest.model.inputs.values()
            )
        inputs = dict(zip(names, arrays, strict=True))
        candidates.append(
            Candidate(entry.key, entry.target.runtime, entry.artifact.path, inputs, end_to_end)
        )
    timed = measure_interleaved(
        candidates, rounds=rounds, samples_per_round=samples_per_round, warmup=warmup,
        threads=threads, batch_size=batch_size, processes=processes, time_budget_s=time_budget_s,
        seed=seed, progress=lambda share: say("timing, interleaved", share),
    )  # fmt: skip
    rows = []
    for entry in entries:
        found = timed.get(entry.key)
        rows.append(
            measurement(
                variant=entry.variant,
                scheme=entry.manifest.scheme,
                runtime=entry.target.name,
                role=entry.manifest.role,
                threads=found.threads if found is not None else threads,
                batch_size=batch_size,
                processes=found.workers if found is not None else (),
                costs=costs_of(entry.manifest),
                accuracy=entry.accuracy,
                accuracy_samples=entry.accuracy_samples,
                agreement=entry.agreement,
                size_bytes=entry.artifact.size_bytes,
                layers_accelerated=entry.accelerated,
                layers_total=entry.total,
                fraction_native=entry.fraction_native,
                warnings=[*entry.warnings, *(found.warnings if found is not None else ())],
                error=entry.error or (found.error if found is not None else None),
            )
        )
    return with_speedups(rows, seed=seed)
