"""Exporters: a compressed model becomes a file that a runtime runs, checked before it is named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.artifacts import Artifact, file_sha256, manifest_path
from obc_deploy.data import first_line
from obc_deploy.errors import ExportError, RuntimeFailedError
from obc_deploy.manifest import ArtifactLayer, ArtifactManifest, write_json
from obc_deploy.targets import EightBit, Format, Precision, Target
from obc_deploy.whole_files import whole_file

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from obc_deploy.compression import CompressedModel

MODEL_FILE = "model.onnx"
CHECKED_SAMPLES = 16
"""Calibration samples that every export is compared on."""


def export(
    model: CompressedModel,
    path: Path,
    target: Target,
    *,
    dynamic_batch: bool = False,
    batch_size: int = 1,
    check: bool = True,
) -> Artifact:
    """Write a compressed model for a target; the file appears only once it has passed its checks.

    Args:
        model: what to export.
        path: an .onnx file, or a folder that gets `model.onnx`.
        target: the target.
        dynamic_batch: leave the batch size open.
        batch_size: the batch size of a static file.
        check: compare outputs with PyTorch's on calibration samples.

    Raises:
        ExportError: the model has no form there, the file is malformed, or its outputs differ.
    """
    import onnx
    import torch

    from obc_deploy.exporters import parity as comparison
    from obc_deploy.exporters.exporter_checksum import exporter_checksum
    from obc_deploy.exporters.onnx_file import build_onnx
    from obc_deploy.exporters.operator_costs import processor_of

    if batch_size < 1:
        raise ExportError(f"batch size {batch_size}: give 1 or more")
    if dynamic_batch and not model.network.dynamic_batch:
        raise ExportError(
            "the model was captured with a fixed batch size; export without --dynamic-batch"
        )
    fixed = model.network.batch_size
    if fixed is not None and batch_size != fixed:
        raise ExportError(
            f"the model was captured with batch size {fixed} and cannot be exported with "
            f"{batch_size}; give --batch-size {fixed}"
        )
    file = path if path.suffix == ".onnx" else path / MODEL_FILE
    if target.runtime == "tensorrt":
        from obc_deploy.exporters.tensorrt import check_bits

        check_bits(model)
    quantized = model.quantized(target.placement)
    size = 2 if dynamic_batch else batch_size
    batches = sample_batches(model, size)
    built = build_onnx(model, quantized, target, batches[0], dynamic_batch=dynamic_batch)
    has_codes = any(form.codes is not None for form in model.forms.values())
    form = target.format if has_codes else Format.FLOAT
    with whole_file(file) as partial:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            onnx.save(built.proto, partial)
        except OSError as error:
            raise ExportError(
                f"cannot write '{file}': {error.strerror}; choose a writable place"
            ) from error
        _check_file(partial, built.proto)
        parity: dict[str, Any] = {}
        if check:
            count = max(1, CHECKED_SAMPLES // size)
            rounding = comparison.ROUNDING[target.precision]
            with (
                _comparable(partial, built.proto, target.precision) as compared,
                _runner(target, compared, size) as (run, runtime),
                torch.no_grad(),
            ):
                parity = comparison.check_parity(
                    run, built.reference, batches[:count],
                    tolerance=comparison.QUANTIZED_TOLERANCE if has_codes else rounding.floats,
                    runtime=runtime, path=compared, codes=built.codes, views=built.views,
                    rounding=rounding, optimized=target.measured,
                ).as_dict()  # fmt: skip
    manifest = ArtifactManifest(
        target=target.name,
        runtime=target.runtime,
        format=form.value,
        file=file.name,
        file_sha256=file_sha256(file),
        size_bytes=file.stat().st_size,
        dense_size_bytes=built.dense_bytes,
        opset=built.opset,
        ir_version=built.ir_version,
        dynamic_batch=dynamic_batch,
        batch_size=None if dynamic_batch else size,
        layers=_artifact_layers(
            model,
            quantized.int8_layers if target.placement.eight_bit is EightBit.INT8 else (),
            built.outputs,
        ),
        parity=parity,
        notes=[
            *([] if target.placement.int4_blocks else _float_notes(quantized.float_layers)),
            *built.notes,
        ],
        precision=target.precision.value,
        processor=processor_of(target),
        exporter=exporter_checksum(target),
        compression=model.manifest,
    )
    write_json(manifest_path(file), manifest)
    return Artifact(file, manifest)


@contextlib.contextmanager
def _comparable(path: Path, proto: Any, precision: Precision) -> Iterator[Path]:
    """The file, or for as long as it is compared a copy that ONNX Runtime has kernels for."""
    import onnx

    from obc_deploy.exporters.precision import in_float32

    if precision is not Precision.BFLOAT16:
        yield path
        return
    copy = path.with_suffix(".float32")
    try:
        onnx.save(in_float32(proto), copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _float_notes(layers: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in layers.items()]


def _artifact_layers(
    model: CompressedModel, int8: Sequence[str], outputs: dict[str, tuple[str, str]]
) -> list[ArtifactLayer]:
    records = {record.name: record for record in model.manifest.layers}
    return [
        ArtifactLayer(
            name=layer.name,
            output=outputs[layer.name][1],
            sparse=records[layer.name].density < 1.0,
            int8=layer.name in int8,
            codes=_codes_name(outputs[layer.name][0]),
        )
        for layer in model.layers
        if layer.name in outputs
    ]


def _codes_name(constant: str) -> str | None:
    return constant if ".weight_codes" in constant else None


def sample_batches(model: CompressedModel, size: int) -> list[tuple[Tensor, ...]]:
    """The model's calibration samples in batches of a size; the first ones again where few."""
    samples = model.samples
    count = max(size, len(samples) // size * size)
    batches = []
    for start in range(0, count, size):
        index = [i % len(samples) for i in range(start, start + size)]
        batches.append(_stack(samples, index))
    return batches


def _stack(samples: Any, index: list[int]) -> tuple[Tensor, ...]:
    import torch

    parts = [samples.arrays(i, i + 1) for i in index]
    return tuple(torch.cat([torch.from_numpy(p[k]) for p in parts]) for k in range(len(parts[0])))


def _check_file(path: Path, proto: Any) -> None:
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(
            f"the ONNX graph of '{path.name}' is malformed: {first_line(error)}"
        ) from error


Run = Callable[["Sequence[npt.NDArray[Any]]"], "list[npt.NDArray[Any]]"]


@contextlib.contextmanager
def _runner(target: Target, path: Path, batch_size: int) -> Iterator[tuple[Run, str]]:
    """What runs the file: the target's own runtime where it is here, else ONNX Runtime."""
    from obc_deploy.runtimes.registry import runtime_info
    from obc_deploy.runtimes.session import open_session

    if target.measured and target.runtime != "onnxruntime" and runtime_info(target.runtime).works:
        try:
            opened = open_session(target.runtime, path, threads=1, batch_size=batch_size)
        except RuntimeFailedError as error:
            fix = "export for another target"
            if target.one_weight_step:
                fix = (
                    f"compress with --target {target.name}, which gives each layer one weight scale"
                )
            raise ExportError(
                f"{target.name} cannot run the exported file; {fix} ({error})"
            ) from error
        with opened as session:
            names = [spec.name for spec in session.inputs]

            def run_there(arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
                return list(session.run(dict(zip(names, arrays, strict=True))).values())

            yield run_there, target.runtime
        return
    import onnx
    import onnxruntime

    from obc_deploy.runtimes.onnxruntime_cpu import libraries

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not target.measured:
        # Its own runtime is to read the file as it stands; so does this one then.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for library in libraries({node.domain for node in onnx.load(path).graph.node}):
        options.register_custom_ops_library(str(library))
    try:
        local = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot load the exported graph: {first_line(error)}"
        ) from error
    inputs = [item.name for item in local.get_inputs()]

    def run_here(arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        outputs: list[npt.NDArray[Any]] = local.run(None, dict(zip(inputs, arrays, strict=True)))
        return outputs

    yield run_here, "onnxruntime"


__all__ = ["Artifact", "export"]
