"""What `obc-deploy audit` says of 2:4: which layers are, what a sparse kernel needs and gains."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.commands.output import Output
from obc_deploy.errors import ArtifactError

if TYPE_CHECKING:
    from obc_deploy.benchmarks.sparsity_trial import SparsityTrial
    from obc_deploy.exporters.builder_log import SparseTactics
    from obc_deploy.exporters.engine import Engine
    from obc_deploy.runtimes.two_of_four import TwoOfFourLayer

_PICKED = {True: "yes", False: "no", None: "?"}


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the GPU in this machine, or None where there is none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def two_of_four(
    out: Output, path: Path, names: Mapping[str, str], *, required: bool, trial: bool = False
) -> dict[str, Any]:
    """Check a file's layers, print them, and return them JSON-ready under `two_of_four`.

    Args:
        out: where to print.
        path: the ONNX file.
        names: our layers' names, by the value that they compute.
        required: a file without such layers is an error; else nothing is printed or returned.
        trial: time its engine with and without sparse kernels, too.

    Raises:
        ArtifactError: there is no such file, it is damaged or has no layers.
        ExportError: an engine for the trial could not be built.
        RuntimeFailedError: an engine of the trial does not load or run.
    """
    from obc_deploy.runtimes.onnx_graph import read_onnx_graph
    from obc_deploy.runtimes.stored_weights import stored_weights
    from obc_deploy.runtimes.two_of_four import check_layer

    stored = stored_weights(path)
    if not stored and (required or not read_onnx_graph(path).layers):
        raise ArtifactError(
            f"'{path}' has no Conv, Gemm or MatMul with a constant weight; name the file of a "
            "whole network, in float or with QuantizeLinear and DequantizeLinear"
        )
    if not stored:
        return {}
    capability = gpu_capability()
    layers = [check_layer(weight, capability=capability) for weight in stored]
    engine, timed = engine_beside(path), None
    if trial:
        engine, timed = _tried(out, path, engine, [layer.name for layer in layers])
    tactics = None if engine is None else engine.tactics
    show_two_of_four(out, path, layers, names, tactics, timed)
    return {
        "two_of_four": [
            {
                "layer": names.get(layer.output, layer.name),
                **layer.as_dict(),
                "picked": None if tactics is None else tactics.picked(layer.name),
            }
            for layer in layers
        ],
        "sparse_tactics": None if tactics is None else asdict(tactics),
        "compute_capability": None if capability is None else list(capability),
        "trial": None if timed is None else timed.as_dict(),
    }


def _tried(
    out: Output, path: Path, beside: Engine | None, nodes: Sequence[str]
) -> tuple[Engine, SparsityTrial]:
    """The engine beside a file, else one built now, against one without sparse kernels."""
    from obc_deploy.benchmarks.sparsity_trial import counterpart, run_trial
    from obc_deploy.exporters.engine import build_engine
    from obc_deploy.runtimes.audit import random_inputs
    from obc_deploy.runtimes.session import open_session

    with tempfile.TemporaryDirectory(prefix="obc-trial-") as folder, out.working() as say:
        place = Path(folder)
        engine = beside or build_engine(path, place / "with.engine", progress=say)
        other = counterpart(engine, path, place / "without.engine", progress=say)
        profile = next(iter(engine.manifest.profiles.values()), None)
        batch_size = 1 if profile is None else profile.optimum[0]
        with (
            open_session("tensorrt", engine.path, threads=1) as allowed,
            open_session("tensorrt", other.path, threads=1) as forbidden,
        ):
            inputs = random_inputs(allowed.inputs, batch_size)
            return engine, run_trial(allowed, forbidden, inputs, nodes, progress=say)


def engine_beside(path: Path) -> Engine | None:
    """The engine beside an ONNX file, with its builder's account; None where there is none.

    Raises:
        ArtifactError: the engine is damaged, or was built from another file.
    """
    from obc_deploy.artifacts import file_sha256
    from obc_deploy.exporters.engine import load_engine
    from obc_deploy.runtimes.engine_file import engine_manifest_path

    engine = path.with_suffix(".engine")
    if not engine_manifest_path(engine).is_file():
        return None
    loaded = load_engine(engine)
    if loaded.manifest.onnx_sha256 != file_sha256(path):
        raise ArtifactError(
            f"'{engine}' was built from another file than '{path.name}' is now; build it again, or "
            "remove it"
        )
    return loaded


def show_two_of_four(
    out: Output,
    path: Path,
    layers: Sequence[TwoOfFourLayer],
    names: Mapping[str, str],
    tactics: SparseTactics | None = None,
    trial: SparsityTrial | None = None,
) -> None:
    """Print the layers of a file against the 2:4 rule.

    Args:
        out: where to.
        path: the file, for the title.
        layers: what was found.
        names: our layers' names, by the value that they compute.
        tactics: what the builder of its engine said, where there is one.
        trial: what sparse kernels gained, where that was timed.
    """
    from rich.table import Table

    from obc_deploy.benchmarks.table import milliseconds
    from obc_deploy.runtimes.two_of_four import summary

    table = Table(
        "layer", "operator", "weights", title=f"{path}: 2:4 along inputs", title_justify="left"
    )
    for title in ("outputs x inputs", "groups 2:4", "2:4"):
        table.add_column(title, justify="right", no_wrap=True)
    if tactics is not None:
        table.add_column("picked", justify="right", no_wrap=True)
    if trial is not None:
        for title in ("ms", "ms without", "faster"):
            table.add_column(title, justify="right", no_wrap=True)
    table.add_column("a sparse kernel")
    for layer in layers:
        measured = [] if tactics is None else [_PICKED[tactics.picked(layer.name)]]
        if trial is not None:
            own = trial.layers[layer.name]
            gain = "?" if own.speedup is None else f"{own.speedup:.2f}x"
            measured += [milliseconds(own.with_ms), milliseconds(own.without_ms), gain]
        table.add_row(
            names.get(layer.output, layer.name), layer.operator, layer.storage,
            f"{layer.outputs} x {layer.inputs}", f"{layer.share:.1%}",
            "yes" if layer.valid else "no", *measured, "; ".join(layer.obstacles) or "can run it",
        )  # fmt: skip
    out.show(table)
    out.line(summary(layers))
    if tactics is not None and tactics.chosen_count is not None:
        found = "?" if tactics.found_count is None else tactics.found_count
        out.line(
            f"the engine beside it: sparse kernels for {tactics.chosen_count} layers of {found} "
            "that could have one"
        )
    elif tactics is not None:
        out.line("the engine beside it: its builder's log does not say which kernels are sparse")
    if trial is not None:
        low, high = trial.interval
        verdict = {True: "faster", False: "slower", None: "no faster or slower that could be told"}
        out.line(
            f"{trial.device}: {milliseconds(trial.with_ms)} ms with sparse kernels, "
            f"{milliseconds(trial.without_ms)} ms without: {verdict[trial.faster]} "
            f"({trial.speedup:.2f}x, {low:.2f} to {high:.2f})"
        )
