"""`obc-deploy export` and `audit`: an artifact for a runtime, and what the runtime makes of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obc_deploy.commands import options as o
from obc_deploy.commands.bench import ARTIFACTS
from obc_deploy.commands.engine import (
    USUAL_BATCHES,
    EngineRequest,
    PrecisionName,
    make_engine,
    with_precision,
)
from obc_deploy.commands.output import Output, Stage
from obc_deploy.commands.two_of_four import two_of_four
from obc_deploy.errors import ArtifactError, ExportError, RuntimeFailedError
from obc_deploy.targets import TARGETS, EightBit, Processor, Target, as_target

if TYPE_CHECKING:
    from obc_deploy.artifacts import Artifact
    from obc_deploy.compression import CompressedModel
    from obc_deploy.exporters.rewritten_file import RewrittenFile
    from obc_deploy.runtimes.audit import AcceleratedLayers, Audit

MODEL_FILE = "model.onnx"
_TENSORRT = "TensorRT"


def artifact_file(run: Path, target: Target) -> Path:
    """Where a run's artifact for a target lies."""
    return run / ARTIFACTS / target.name / MODEL_FILE


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FILE",
            help="A run directory; or an .onnx file with integer or sparse layers, for "
            "--target ort-sparse.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            metavar="TARGET",
            help=f"Where it will run: {', '.join(TARGETS)}.",
            show_default="the run's own, else onnxruntime",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="An .onnx file, or a folder for model.onnx.",
            show_default="RUN/artifacts/TARGET/model.onnx, or FILE with its target's name",
        ),
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch size open.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="Samples in one inference.")
    ] = 1,
    no_check: Annotated[
        bool,
        typer.Option("--no-check", help="Do not compare the file's outputs with PyTorch's."),
    ] = False,
    no_timing: Annotated[
        bool,
        typer.Option(
            "--no-timing",
            help="Do not time what becomes of an .onnx file from elsewhere beside that file.",
        ),
    ] = False,
    threads: o.Threads = None,
    processor: Annotated[
        Processor | None,
        typer.Option(
            "--processor",
            help="Processor that it ships to, or the most like it: it decides which layers run on "
            "our kernels (--target ort-sparse).",
            show_default="this machine's kind",
        ),
    ] = None,
    precision: Annotated[
        PrecisionName | None,
        typer.Option(
            "--precision",
            help="What computes where nothing is quantized.",
            show_default="fp16",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8",
            help="Layers with 8-bit activations multiply E4M3 floats in place of int8, for GPUs "
            "that have them (compute capability 8.9 or newer).",
            rich_help_panel=_TENSORRT,
        ),
    ] = False,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine",
            help="Build the engine too, where TensorRT or TensorRT-RTX is installed; the command "
            "to build it elsewhere is printed where not.",
            rich_help_panel=_TENSORRT,
        ),
    ] = False,
    batches: Annotated[
        str | None,
        typer.Option(
            "--batches",
            metavar="MIN:USUAL:MAX",
            help="Batch sizes of an engine with --dynamic-batch.",
            show_default=USUAL_BATCHES,
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            "--optimization-level",
            min=0,
            max=5,
            metavar="N",
            help="How long the builder looks for kernels, 0 to 5.",
            show_default="the builder's own",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option(
            "--workspace",
            min=1,
            metavar="MIB",
            help="Most scratch memory that kernels may take on the device.",
            show_default="no limit",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            metavar="FILE",
            help="Keep the builder's timings there for the next build.",
            show_default="none",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    no_sparsity: Annotated[
        bool,
        typer.Option(
            "--no-sparsity",
            help="Build with dense kernels alone, to compare.",
            rich_help_panel=_TENSORRT,
        ),
    ] = False,
    json: o.JsonFile = None,
) -> None:
    """Write a run's compressed network as an ONNX file, checked against PyTorch."""
    out = Output(json)
    request = EngineRequest(
        engine, batches, optimization_level, workspace, timing_cache, not no_sparsity
    )
    if run.suffix == ".onnx":
        request.check(as_target(target or "ort-sparse"), dynamic_batch)
        if dynamic_batch or batch_size != 1:
            raise ExportError(
                f"'{run}' keeps its own batch size; leave out --dynamic-batch and --batch-size"
            )
        goal = with_processor(as_target(target or "ort-sparse"), processor)
        _rewrite(out, run, goal, output, check=not no_check, timed=not no_timing, threads=threads)
        return
    if threads is not None:
        raise ExportError(
            f"--threads {threads} is for timing an .onnx file from elsewhere; of '{run}' name it "
            "to 'obc-deploy bench'"
        )
    goal = target_of(run, target)
    goal = with_processor(with_precision(goal, precision, fp8=fp8), processor)
    request.check(goal, dynamic_batch)
    model, artifact, library = export_run(
        out, run, goal, output, dynamic_batch=dynamic_batch, batch_size=batch_size,
        check=not no_check,
    )  # fmt: skip
    made = artifact.manifest
    notes = _notes(model, goal, made.notes)
    for note in notes:
        out.warn(note)
    built = {}
    if goal.runtime == "tensorrt":
        built = make_engine(out, model, goal, artifact, request)
    out.results(
        {
            "path": os.fspath(artifact.path),
            "library": library,
            **made.model_dump(mode="json"),
            "preflight": notes,
            **built,
        }
    )


def target_of(run: Path, named: str | None = None) -> Target:
    """Where a run directory's network is to run: as named, else where it was made for.

    Raises:
        RunDirectoryError: there is no such run.
        TargetError: there is no such target.
    """
    from obc_deploy.manifest import read_manifest

    own = read_manifest(run).settings.target
    return as_target(named or own or "onnxruntime")


def export_run(
    out: Output,
    run: Path,
    goal: Target,
    output: Path | None = None,
    *,
    dynamic_batch: bool = False,
    batch_size: int = 1,
    check: bool = True,
) -> tuple[CompressedModel, Artifact, str | None]:
    """Write a run's network for a target, with the library where it needs ours, and say so.

    Returns:
        The network, its artifact, and where the library lies.
    """
    from obc_deploy.benchmarks.table import percent, size

    file = output or artifact_file(run, goal)
    with out.working() as say:
        say("loading the run", 0.0)
        from obc_deploy.run_directory import load_run

        model = load_run(run, baselines=False)
        say(f"exporting for {goal.name}", 0.3)
        artifact = model.export(
            file, goal, dynamic_batch=dynamic_batch, batch_size=batch_size, check=check
        )
    made = artifact.manifest
    integer = sum(layer.int8 for layer in made.layers)
    bits = f"{integer} of {len(made.layers)} layers int8"
    if goal.placement.eight_bit is EightBit.FP8:
        bits = "8-bit layers in fp8"
    out.line(
        f"{artifact.path}: {size(made.size_bytes)}, {made.format} graph for {made.target}, {bits}"
    )
    if made.dense_size_bytes is not None:
        out.line(_smaller(made.size_bytes, made.dense_size_bytes))
    library = _library_beside(out, artifact.path) if goal.sparse_operators else None
    parity = made.parity
    if parity:
        out.line(
            f"outputs in {parity['runtime']} against PyTorch's on {parity['samples']} samples: "
            f"relative error {parity['relative_error']:.1e} (at most {parity['tolerance']:.0e}), "
            f"{percent(parity['agreement'])} % same answer"
        )
    else:
        out.warn("outputs were not compared with PyTorch's (--no-check)")
    return model, artifact, library


def with_processor(goal: Target, processor: Processor | None) -> Target:
    """The target with the processor that was asked for.

    Raises:
        ExportError: the target has no choice between kernels.
    """
    if processor is None:
        return goal
    if not goal.sparse_operators:
        raise ExportError(
            f"--processor {processor.value} is for --target ort-sparse; files for '{goal.name}' "
            "are the same for all processors"
        )
    return replace(goal, processor=processor)


def _smaller(found: int, dense: int) -> str:
    from obc_deploy.benchmarks.table import size

    ratio = f"{dense / found:.2f}"
    than = f"with every int8 weight stored ({size(dense)})"
    return f"{ratio}x smaller than {than}" if float(ratio) > 1.0 else f"no smaller than {than}"


def _rewrite(
    out: Output,
    source: Path,
    goal: Target,
    output: Path | None,
    *,
    check: bool,
    timed: bool,
    threads: int | None,
) -> None:
    """An ONNX file from elsewhere, on our operators."""
    from obc_deploy.benchmarks.table import size
    from obc_deploy.exporters.operator_costs import processor_of
    from obc_deploy.exporters.rewritten_file import rewrite_onnx

    file = output or source.with_name(f"{source.stem}.{goal.name}.onnx")
    with out.working() as say:
        say(f"rewriting for {goal.name}", 0.0)
        made = rewrite_onnx(source, file, goal, check=check)
    skipping = sum(zeros > 0.0 for _, zeros in made.layers)
    without = f", {skipping} of them without their zeros" if skipping else ""
    out.line(
        f"{made.path}: {size(made.size_bytes)}, {len(made.layers)} of {made.integer_layers} "
        f"layers on our kernels{without}"
    )
    out.line(_smaller(made.size_bytes, made.dense_size_bytes))
    if made.relative_error is None:
        out.warn("outputs were not compared with the original's (--no-check)")
    else:
        out.line(f"outputs differ from the original's by {made.relative_error:.1e} (relative)")
    library = _library_beside(out, made.path)
    timing = _time_beside(out, source, made, goal, threads) if timed else None
    out.results(
        {
            "path": os.fspath(made.path),
            "library": library,
            "target": goal.name,
            "processor": processor_of(goal),
            "size_bytes": made.size_bytes,
            "dense_size_bytes": made.dense_size_bytes,
            "layers": dict(made.layers),
            "integer_layers": made.integer_layers,
            "relative_error": made.relative_error,
            "timing": timing,
        }
    )


def _library_beside(out: Output, file: Path) -> str | None:
    """Put what runs our operators beside a file that has some; where it lies.

    Raises:
        ExportError: the folder cannot be written to.
    """
    from obc_deploy.runtimes import sparse
    from obc_deploy.runtimes.onnx_graph import read_onnx_graph

    if sparse.DOMAIN not in read_onnx_graph(file).domains:
        return None
    try:
        library = sparse.copy_library(file.parent)
    except OSError as error:
        raise ExportError(f"cannot put the sparse operators beside '{file}': {error}") from error
    out.line(f"{library}: ship it too; hosts load it by register_custom_ops_library")
    return os.fspath(library)


def _time_beside(
    out: Output, source: Path, made: RewrittenFile, goal: Target, threads: int | None
) -> dict[str, Any] | None:
    """Say whether the new file is faster here; None where one of the two could not be timed."""
    from obc_deploy.benchmarks.table import milliseconds, span, thread_count, times
    from obc_deploy.benchmarks.timed_files import FileInRuntime, time_files

    with out.working() as say:
        before, after = time_files(
            [FileInRuntime(path, goal.runtime) for path in (source, made.path)],
            inputs=made.sample, threads=threads,
            progress=lambda share: say("timing both files in turns", share),
        )  # fmt: skip
    if before.latency_ms is None or after.latency_ms is None or after.speedup is None:
        failed = after if before.error is None else before
        out.warn(f"'{failed.path}' could not be timed: {failed.error}")
        return None
    out.line(
        f"{times(after.speedup)} as fast as the original here ({span(after.interval)}): "
        f"{milliseconds(after.latency_ms.p50)} ms, not {milliseconds(before.latency_ms.p50)} ms, "
        f"at batch {after.batch_size} on {thread_count(after.threads)}"
    )
    noisy = before.noisy or after.noisy
    if noisy:
        out.warn("timings are noisy: stop other work on this machine and export again")
    if after.speedup < 1.0:
        out.warn(
            "it is no faster here: keep the original, or name the processor that it ships to "
            "(--processor)"
        )
    return {
        "before_ms": before.latency_ms.p50,
        "after_ms": after.latency_ms.p50,
        "speedup": after.speedup,
        "interval": after.interval,
        "threads": after.threads,
        "batch_size": after.batch_size,
        "noisy": noisy,
    }


def _notes(model: Any, goal: Target, notes: list[str]) -> list[str]:
    """What will not speed up there, and what stays in float."""
    from obc_deploy.runtimes.fingerprint import take_fingerprint
    from obc_deploy.schemes import Scheme
    from obc_deploy.targets import preflight

    features = take_fingerprint().cpu_features
    schemes = {record.name: Scheme.parse(record.scheme) for record in model.manifest.layers}
    return [*preflight(goal, model.layers, schemes, cpu_features=features), *notes]


def audit(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FILE", help="A run directory, or an .onnx file.", show_default=False
        ),
    ],
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            "-r",
            metavar="NAME",
            help=f"One of {', '.join(TARGETS)}.",
            show_default="the run's or the file's own, else onnxruntime",
        ),
    ] = None,
    threads: o.Threads = None,
    trial: Annotated[
        bool,
        typer.Option(
            "--trial",
            help="With --runtime tensorrt, on a GPU: time the engine beside the file (built now "
            "where there is none) against one without sparse kernels, as a whole and by layers.",
        ),
    ] = False,
    json: o.JsonFile = None,
) -> None:
    """Say which layers a runtime really ran in int8, of which it skipped the zeros, which are 2:4.

    Nothing is run for `--runtime tensorrt` without `--trial`: its file is checked layer by layer
    for 2:4 as TensorRT reads it. A file from elsewhere, without `--runtime`, is checked and run.
    """
    from obc_deploy.runtimes.registry import require_runtime

    out = Output(json)
    goal, artifact = None, None
    if path.suffix == ".onnx":
        artifact = _artifact(path)
        file, batch_size = path, (artifact.manifest.batch_size or 1) if artifact else 1
        goal = as_target(runtime or (artifact.target if artifact else "onnxruntime"))
    else:
        goal = target_of(path, runtime)
    if trial and goal.runtime != "tensorrt":
        raise ArtifactError(
            f"--trial is for --runtime tensorrt; '{goal.name}' has no sparse kernels to leave out"
        )
    if goal.measured or trial:
        require_runtime(goal.runtime)
    if path.suffix != ".onnx":
        with out.working() as say:
            artifact = _artifact_of(path, goal, say)
        file, batch_size = artifact.path, artifact.manifest.batch_size or 1
    names = {}
    if artifact is not None:
        names = {layer.output: layer.name for layer in artifact.manifest.layers}
    checked: dict[str, Any] = {}
    if not goal.measured or (runtime is None and artifact is None):
        checked = two_of_four(out, file, names, required=not goal.measured, trial=trial)
    if not goal.measured:
        out.results({"path": os.fspath(file), "target": goal.name, **checked})
        return
    with out.working() as say:
        say(f"running {file.name} in {goal.runtime}", 0.0)
        try:
            found = _audit(goal.runtime, file, threads, batch_size)
        except RuntimeFailedError as error:
            if checked:
                raise RuntimeFailedError(
                    f"{error}; for its 2:4 layers alone add --runtime tensorrt"
                ) from error
            raise
    counted = None if artifact is None else _count(found, artifact)
    _show_audit(out, file, found, counted, names)
    out.results(
        {
            "path": os.fspath(file),
            **found.as_dict(),
            "layers_accelerated": None if counted is None else counted.accelerated,
            "layers_total": None if counted is None else counted.total,
            "shortfalls": {} if counted is None else counted.reasons,
            **checked,
        }
    )


def _artifact(path: Path) -> Artifact | None:
    """The artifact of a file; a plain ONNX file, from elsewhere, has no manifest."""
    from obc_deploy.artifacts import load_artifact, manifest_path

    if not path.is_file():
        raise ArtifactError(f"no file '{path}'; make one with 'obc-deploy export'")
    return load_artifact(path) if manifest_path(path).is_file() else None


def _artifact_of(run: Path, goal: Target, say: Stage) -> Artifact:
    """The run's artifact for a target; exported now where there is none."""
    from obc_deploy.artifacts import load_artifact
    from obc_deploy.run_directory import load_run

    file = artifact_file(run, goal)
    if file.is_file():
        return load_artifact(file)
    say(f"exporting for {goal.name}", 0.0)
    return load_run(run, baselines=False).export(file, goal)


def _audit(runtime: str, file: Path, threads: int | None, batch_size: int) -> Audit:
    from obc_deploy.runtimes.audit import audit as audit_session
    from obc_deploy.runtimes.audit import random_inputs
    from obc_deploy.runtimes.session import open_session

    with open_session(runtime, file, threads=threads, batch_size=batch_size) as session:
        return audit_session(session, random_inputs(session.inputs, batch_size))


def _count(found: Audit, artifact: Artifact) -> AcceleratedLayers:
    from obc_deploy.runtimes.audit import Expectation, count_accelerated

    return count_accelerated(
        found,
        {
            layer.name: Expectation(layer.output, layer.sparse, layer.int8)
            for layer in artifact.manifest.layers
        },
    )


def _show_audit(
    out: Output,
    file: Path,
    found: Audit,
    counted: AcceleratedLayers | None,
    names: Mapping[str, str],
) -> None:
    from rich.table import Table

    from obc_deploy.benchmarks.table import milliseconds

    table = Table(
        "layer", "operator", "ran as", title=f"{file} in {found.runtime} {found.version}",
        title_justify="left",
    )  # fmt: skip
    for title in ("int8", "zeros skipped", "own engine", "ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in found.layers:
        skipped = "?" if layer.kernel_sparsity is None else f"{layer.kernel_sparsity:.0%}"
        name = next((names[value] for value in layer.outputs if value in names), layer.name)
        table.add_row(
            name, layer.operator, layer.kind or "-", "yes" if layer.int8 else "no", skipped,
            "yes" if layer.native else "no", milliseconds(layer.ms),
        )  # fmt: skip
    out.show(table)
    for region, count in Counter(layer.region for layer in found.layers if layer.region).items():
        out.line(
            f"{count} of these layers run as one node, '{region}', with what stands between them; "
            "their times are of the same operators one by one"
        )
    if counted is not None and counted.total:
        out.line(
            f"{counted.accelerated} of {counted.total} compressed layers ran as they were made to "
            f"({counted.int8} in int8, {counted.sparse} without their zeros)"
        )
        for name, reason in counted.reasons.items():
            out.warn(f"{name}: {reason}")
    for reason in found.reasons:
        out.warn(reason)
    if found.fallback:
        out.line(f"{found.runtime} fell back: see the notes above", style="bold red")
