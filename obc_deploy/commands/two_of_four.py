"""What `obc-deploy audit` says about 2:4: which layers are, and what a sparse kernel would need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.commands.output import Output
from obc_deploy.errors import ArtifactError

if TYPE_CHECKING:
    from obc_deploy.exporters.builder_log import SparseTactics
    from obc_deploy.runtimes.two_of_four import TwoOfFourLayer

_PICKED = {True: "yes", False: "no", None: "?"}


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the GPU in this machine, or None where there is none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def two_of_four(
    out: Output, path: Path, names: Mapping[str, str], *, required: bool
) -> dict[str, Any]:
    """Check a file's layers, print them, and return them JSON-ready under `two_of_four`.

    Args:
        out: where to print.
        path: the ONNX file.
        names: our layers' names, by the value that they compute.
        required: a file without such layers is an error; else nothing is printed or returned.

    Raises:
        ArtifactError: there is no such file, it is damaged or has no layers.
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
    tactics = engine_tactics(path)
    show_two_of_four(out, path, layers, names, tactics)
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
    }


def engine_tactics(path: Path) -> SparseTactics | None:
    """What the builder said of the engine beside an ONNX file; None where there is no engine.

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
    return loaded.tactics


def show_two_of_four(
    out: Output,
    path: Path,
    layers: Sequence[TwoOfFourLayer],
    names: Mapping[str, str],
    tactics: SparseTactics | None = None,
) -> None:
    """Print the layers of a file against the 2:4 rule.

    Args:
        out: where to.
        path: the file, for the title.
        layers: what was found.
        names: our layers' names, by the value that they compute.
        tactics: what the builder of its engine said, where there is one.
    """
    from rich.table import Table

    from obc_deploy.runtimes.two_of_four import summary

    table = Table(
        "layer", "operator", "weights", title=f"{path}: 2:4 along inputs", title_justify="left"
    )
    for title in ("outputs x inputs", "groups 2:4", "2:4"):
        table.add_column(title, justify="right", no_wrap=True)
    if tactics is not None:
        table.add_column("picked", justify="right", no_wrap=True)
    table.add_column("a sparse kernel")
    for layer in layers:
        picked = [] if tactics is None else [_PICKED[tactics.picked(layer.name)]]
        table.add_row(
            names.get(layer.output, layer.name), layer.operator, layer.storage,
            f"{layer.outputs} x {layer.inputs}", f"{layer.share:.1%}",
            "yes" if layer.valid else "no", *picked, "; ".join(layer.obstacles) or "can run it",
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
