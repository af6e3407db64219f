"""Manifests: what a run or an artifact is, how it was made, and from what.

One schema for run directories and artifacts; reports are drawn from manifests and measurements
alone. Unknown fields of a newer version are refused, not guessed at.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from obc_deploy.errors import RunDirectoryError
from obc_deploy.targets import Processor
from obc_deploy.whole_files import whole_file

SCHEMA_VERSION: Literal[1] = 1
FILE_NAME = "manifest.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSource(_Part):
    """Where the model came from."""

    source: str
    weights: str | None = None
    parameters: int
    inputs: dict[str, list[int]]


class DataSource(_Part):
    """Where samples came from."""

    source: str
    samples: int
    sha256: str
    passes: int = 1
    preprocessing: dict[str, Any] | None = None


class LayerRecord(_Part):
    """One layer: what was asked for and what came of it.

    `error` is tr((W-Ŵ)H(W-Ŵ)ᵀ)/tr(WHWᵀ); None where the layer is dense or no Hessian was collected.
    """

    name: str
    kind: str
    shape: list[int]
    scheme: str
    macs: int
    weights: int
    density: float
    weight_bits: int
    activation_bits: int
    error: float | None = None
    shared_step: bool = False
    note: str | None = None


class Accuracy(_Part):
    """Top-1 accuracies in PyTorch, on labelled evaluation samples, as fractions."""

    dense: float
    compressed: float
    samples: int
    source: str


class Settings(_Part):
    """The options that a run was made with."""

    method: str
    target: str | None
    device: str
    damping: float
    range_method: str
    bn_reestimate: bool
    batch_size: int
    seed: int
    sequential: bool = False


class PlanRecord(_Part):
    """How a plan was found for a budget.

    Losses are of the network's outputs on calibration samples: `loss` the sum over layers that the
    knapsack minimised, `start_loss` and `calibration_loss` the stitched network's before and after
    the search. Factors are dense over plan; latencies are predictions of a measured table.
    """

    budgets: str
    method: str
    loss: float
    gap: float | None = None
    calibration_loss: float | None = None
    start_loss: float | None = None
    evaluations: int = 0
    factors: dict[str, float] = Field(default_factory=dict)
    edges: list[str] = Field(default_factory=list)
    predicted_ms: float | None = None
    dense_ms: float | None = None


class Manifest(_Part):
    """A run directory's manifest."""

    schema_version: Literal[1] = SCHEMA_VERSION
    role: Literal["dense-fp32", "dense-int8", "compressed"]
    scheme: str
    model: ModelSource
    calibration: DataSource
    layers: list[LayerRecord]
    unsupported: dict[str, str] = Field(default_factory=dict)
    activations: dict[str, tuple[float, float]] = Field(default_factory=dict)
    settings: Settings
    batch_norms_reestimated: int = 0
    accuracy: Accuracy | None = None
    predicted_speedup: dict[str, float] | None = None
    plan: PlanRecord | None = None
    notes: list[str] = Field(default_factory=list)
    seconds: float | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    command: str = ""
    created: str = ""


class ArtifactLayer(_Part):
    """What a layer became in an artifact: names of its node's output and of its weight codes."""

    name: str
    output: str
    sparse: bool
    int8: bool
    codes: str | None = None


class ArtifactManifest(_Part):
    """The manifest beside an exported file."""

    schema_version: Literal[1] = SCHEMA_VERSION
    target: str
    runtime: str
    format: Literal["float", "qdq", "qoperator"]
    file: str
    file_sha256: str
    size_bytes: int
    dense_size_bytes: int | None = None
    """Size of the same network with every weight stored, where the file leaves zeros out."""
    opset: int
    ir_version: int
    precision: str = "float32"
    """What computes where nothing is quantized."""
    processor: Processor | None = None
    """Whose costs decided between kernels; None where there was no choice."""
    exporter: str = ""
    """Checksum of what wrote it, and of our own kernels where it has them."""
    dynamic_batch: bool
    batch_size: int | None
    layers: list[ArtifactLayer]
    parity: dict[str, Any]
    notes: list[str] = Field(default_factory=list)
    compression: Manifest


class EngineProfile(_Part):
    """Sizes of one input of an engine."""

    minimum: list[int]
    optimum: list[int]
    maximum: list[int]


class EngineManifest(_Part):
    """The manifest beside an engine of TensorRT or TensorRT-RTX.

    Engines run on one GPU (or those built for ahead of time) with one version of one library. The
    layers with sparse kernels are the builder's own account, None where its log does not say.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    gpu: str
    capabilities: list[str] = Field(default_factory=list)
    onnx_file: str
    onnx_sha256: str
    file: str
    file_sha256: str
    size_bytes: int
    sparse: bool
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    profiles: dict[str, EngineProfile] = Field(default_factory=dict)
    sparse_found: list[str] | None = None
    sparse_chosen: list[str] | None = None
    sparse_found_count: int | None = None
    sparse_chosen_count: int | None = None
    warnings: list[str] = Field(default_factory=list)
    seconds: float
    created: str = ""


def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on."""
    found = {"python": platform.python_version()}
    for package in (
        "obc-deploy",
        "torch",
        "torchvision",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "numpy",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command this process was started with, without the path of its interpreter."""
    name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return " ".join([name, *sys.argv[1:]]).strip()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def write_json(path: Path, content: BaseModel | Mapping[str, Any]) -> None:
    """Write a JSON file so that it is either whole or not there.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    if isinstance(content, BaseModel):
        text = content.model_dump_json(indent=2)
    else:
        text = json.dumps(content, indent=2)
    try:
        with whole_file(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"cannot write '{path}': {error.strerror}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run directory.

    Raises:
        RunDirectoryError: there is none, or it is damaged or of another version.
    """
    path = folder / FILE_NAME
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"'{folder}' is no run directory: it has no {FILE_NAME}; make one with "
            "'obc-deploy compress'"
        ) from error
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise RunDirectoryError(
            f"'{path}' cannot be read ({first}); compress the model again"
        ) from error
