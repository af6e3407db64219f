"""`obc-deploy bench FILE...` of ONNX files from elsewhere: timed beside the first of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from obc_deploy.commands.output import Output
from obc_deploy.errors import ArtifactError, MeasurementError
from obc_deploy.targets import as_target

if TYPE_CHECKING:
    from obc_deploy.benchmarks.timed_files import FileInRuntime, TimedFile
    from obc_deploy.commands.bench import MeasuringPlan

DEFAULT_RUNTIME = "onnxruntime"


def are_plain(runs: Sequence[Path]) -> bool:
    """Whether there is an ONNX file without a manifest among them, and nothing but files.

    Raises:
        MeasurementError: such a file beside a run directory.
    """
    from obc_deploy.artifacts import manifest_path

    files = [run for run in runs if run.suffix == ".onnx"]
    plain = [file for file in files if file.is_file() and not manifest_path(file).is_file()]
    if plain and len(files) < len(runs):
        others = next(run for run in runs if run not in files)
        raise MeasurementError(
            f"'{plain[0]}' has no manifest, so it is measured beside other .onnx files alone, and "
            f"not beside '{others}': name that run's exported file in its place"
        )
    return bool(plain)


def bench_files(out: Output, files: Sequence[Path], plan: MeasuringPlan) -> None:
    """Time files in their runtimes, beside the first; print the table and write JSON.

    Raises:
        ArtifactError: one of them is not there.
        MeasurementError: the first could not be timed, or none of the others.
    """
    from obc_deploy.benchmarks.timed_files import time_files

    for file in files:
        if not file.is_file():
            raise ArtifactError(f"no file '{file}'; name an ONNX file")
    with out.working() as say:
        rows = time_files(
            _in_runtimes(files, plan.targets),
            threads=plan.threads,
            batch_size=plan.batch_size,
            rounds=plan.rounds,
            samples_per_round=plan.samples,
            processes=plan.processes,
            time_budget_s=plan.seconds,
            seed=plan.seed,
            progress=lambda share: say("timing files in turns", share),
        )
    _show(out, rows)
    out.results([row.model_dump(mode="json") for row in rows])
    timed = [row for row in rows if row.error is None]
    if rows[0] not in timed or len(timed) < min(2, len(rows)):
        failed = next(row for row in rows if row not in timed)
        raise MeasurementError(
            f"'{failed.path}' could not be timed in {failed.runtime}: {failed.error}"
        )


def _in_runtimes(files: Sequence[Path], targets: Sequence[str] | None) -> list[FileInRuntime]:
    """Each file in each runtime asked for, else in the one that it was exported for."""
    from obc_deploy.artifacts import load_artifact, manifest_path
    from obc_deploy.benchmarks.timed_files import FileInRuntime

    def runtimes(file: Path) -> list[str]:
        if targets:
            return [as_target(name).runtime for name in targets]
        known = manifest_path(file).is_file()
        return [load_artifact(file).runtime if known else DEFAULT_RUNTIME]

    return list(dict.fromkeys(FileInRuntime(f, name) for f in files for name in runtimes(f)))


def _show(out: Output, rows: Sequence[TimedFile]) -> None:
    """The table, and what is to be said of single files; it fits a terminal of 80 columns."""
    from rich import box
    from rich.table import Table

    from obc_deploy.benchmarks.table import NONE, milliseconds, size, span, thread_count, times

    first = rows[0]
    runtimes = list(dict.fromkeys(row.runtime for row in rows))
    where = [
        *runtimes[: len(runtimes) == 1],
        f"batch {first.batch_size}",
        thread_count(first.threads),
    ]
    table = Table(
        title=f"{', '.join(where)}; outputs on one random input", title_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
    )  # fmt: skip
    table.add_column("file", overflow="fold", min_width=12)
    if len(runtimes) > 1:
        table.add_column("runtime", overflow="fold", min_width=8)
    for title in ("p50,\nms", "p90,\nms", "vs the first", "outputs\ndiffer", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for row, name in zip(rows, _names([row.path for row in rows]), strict=True):
        latency = row.latency_ms
        faster = times(row.speedup)
        if row is not first and row.interval is not None:
            faster = f"{faster} ({span(row.interval)})"
        differ = NONE if row is first or row.difference is None else f"{row.difference:.1e}"
        table.add_row(
            name, *([row.runtime] if len(runtimes) > 1 else []),
            milliseconds(latency.p50 if latency else None),
            milliseconds(latency.p90 if latency else None), faster, differ, size(row.size_bytes),
        )  # fmt: skip
    out.show(table)
    for row in rows:
        if row.error is not None:
            out.warn(f"'{row.path}' in {row.runtime}: {row.error}")
    noisy = sum(row.noisy for row in rows)
    if noisy:
        out.warn(
            f"{noisy} of {len(rows)} rows have noisy timings: stop other work on this machine, or "
            "take more rounds"
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """What tells files apart: their paths without the folders that all are in."""
    if len(set(paths)) == 1:
        return [path.name for path in paths]
    shared = os.path.commonpath([path.absolute().parent for path in paths])
    return [os.path.relpath(path.absolute(), shared) for path in paths]
