"""Run directories: a compressed model on disk, with what is needed to export and measure it again.

    manifest.json        what was done, to what, with what result
    network.pt2          the folded float network (torch.export)
    layers.safetensors   codes, scales, zero points and masks of the compressed layers
    samples.npz          a few calibration samples, to check exports on
    baselines/           the dense float and dense int8 networks, in the same form

A run directory is written beside its place and moved there when it is complete, so that an
interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from obc_deploy.activations import ActivationRange
from obc_deploy.data import Preprocessing, Samples, first_line
from obc_deploy.errors import RunDirectoryError
from obc_deploy.manifest import FILE_NAME, Manifest, read_manifest, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from obc_deploy.compression import CompressedModel
    from obc_deploy.solvers.contract import CompressedLayer

NETWORK = "network.pt2"
LAYERS = "layers.safetensors"
SAMPLES = "samples.npz"
BASELINES = "baselines"


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Make sure that a run can be written there, before hours of work.

    Raises:
        RunDirectoryError: it is in use already, or not writable.
    """
    try:
        _check_place(folder, overwrite)
    except OSError as error:
        # Only trying tells: what a user may do and what a file system allows differ.
        raise RunDirectoryError(
            f"cannot write run directory '{folder}' ({error.strerror}); choose another place"
        ) from error


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunDirectoryError(f"'{folder}' is a file; choose another name for the run directory")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise RunDirectoryError(
                f"run directory '{folder}' is in use already; choose another, or pass --overwrite"
            )
        if not (folder / FILE_NAME).is_file():
            raise RunDirectoryError(
                f"'{folder}' holds files but no {FILE_NAME}: it is no run directory and is left "
                "alone; choose another name"
            )
    parent = folder.resolve().parent
    while not parent.exists():
        parent = parent.parent
    Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent)).rmdir()


def save_run(model: CompressedModel, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a compressed model as a run directory.

    Raises:
        RunDirectoryError: it is in use already, or cannot be written.
    """
    check_free(folder, overwrite=overwrite)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced.partial")
    made = _missing_parents(folder)
    try:
        for abandoned in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
            shutil.rmtree(abandoned, ignore_errors=True)
        _write(model, partial)
        for baseline in model.baselines:
            _write(baseline, partial / BASELINES / baseline.role)
        if folder.exists():
            # Deleting takes a while: at no time is there half of a run under its name.
            folder.replace(replaced)
        partial.replace(folder)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write run directory '{folder}' ({error.strerror or error}); make room, or "
            "choose another place"
        ) from error
    finally:
        if replaced.exists() and not folder.exists():
            replaced.replace(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        if not folder.exists():
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
    return folder


def _missing_parents(folder: Path) -> list[Path]:
    """Folders above it that are not there yet, the innermost first."""
    return [parent for parent in folder.parents if not parent.exists()]


def _write(model: CompressedModel, folder: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    network = model.network
    shapes = (
        tuple({0: torch.export.Dim.AUTO} for _ in network.example)
        if network.dynamic_batch
        else None
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(network.module, network.example, dynamic_shapes=shapes)
    tensors: dict[str, Tensor] = {}
    for name, form in model.forms.items():
        tensors[f"{name}/mask"] = form.mask.cpu().contiguous()
        if form.codes is not None and form.scale is not None and form.zero_point is not None:
            tensors[f"{name}/codes"] = form.codes.cpu().contiguous()
            tensors[f"{name}/scale"] = form.scale.cpu().contiguous()
            tensors[f"{name}/zero_point"] = form.zero_point.cpu().contiguous()
    schema = {"schema": str(model.manifest.schema_version)}
    # torch's own file writer ends the process when the disk is full: it throws once more while it
    # is destroyed. In memory it cannot fail.
    archive = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, archive)
    (folder / NETWORK).write_bytes(archive.getbuffer())
    try:
        save_file(tensors, folder / LAYERS, metadata=schema)
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    arrays = {f"input:{name}": array for name, array in model.samples.inputs.items()}
    if model.samples.labels is not None:
        arrays["labels"] = model.samples.labels
    np.savez_compressed(folder / SAMPLES, **arrays)  # type: ignore[arg-type]
    write_json(folder / FILE_NAME, model.manifest)


def load_run(folder: Path | str, *, baselines: bool = True) -> CompressedModel:
    """A compressed model from its run directory, with its baselines unless they are not wanted.

    Raises:
        RunDirectoryError: it is no run directory, or is damaged.
    """
    folder = Path(folder)
    model = _read(folder)
    if not baselines:
        return model
    found = tuple(
        _read(folder / BASELINES / role)
        for role in ("dense-fp32", "dense-int8")
        if (folder / BASELINES / role).exists()
    )
    return replace(model, baselines=found)


def _read(folder: Path) -> CompressedModel:
    import torch
    from safetensors.torch import load_file

    from obc_deploy.capture import capture
    from obc_deploy.compression import CompressedModel
    from obc_deploy.layers import find_layers

    manifest = read_manifest(folder)
    try:
        # A file that NumPy opens itself stays open where it turns out to be no archive.
        with (folder / SAMPLES).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            inputs = {
                name.removeprefix("input:"): stored[name]
                for name in stored.files
                if name.startswith("input:")
            }
            labels = stored["labels"] if "labels" in stored.files else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(folder / NETWORK)
        tensors = load_file(folder / LAYERS)
    except Exception as error:
        raise RunDirectoryError(
            f"run directory '{folder}' is damaged ({first_line(error)}); compress again"
        ) from error
    settings = manifest.calibration.preprocessing
    preprocessing = None if settings is None else Preprocessing.from_dict(settings)
    samples = Samples(inputs, labels, preprocessing, manifest.calibration.source)
    example = tuple(torch.from_numpy(array) for array in samples.arrays(0, 2))
    network = capture(program, example)
    layers, _ = find_layers(network)
    forms = _forms(manifest, tensors, {layer.name: layer for layer in layers}, network, folder)
    return CompressedModel(
        network=network,
        layers=tuple(layers),
        forms=forms,
        ranges={name: ActivationRange(*pair) for name, pair in manifest.activations.items()},
        samples=samples,
        manifest=manifest,
    )


def _forms(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, object],
    network: object,
    folder: Path,
) -> dict[str, CompressedLayer[Tensor]]:
    from obc_deploy.capture import Network, get_tensor
    from obc_deploy.layers import Layer, weight_to_matrix
    from obc_deploy.schemes import Scheme
    from obc_deploy.solvers.contract import CompressedLayer

    assert isinstance(network, Network)
    forms: dict[str, CompressedLayer[Tensor]] = {}
    for record in manifest.layers:
        scheme = Scheme.parse(record.scheme)
        if scheme.is_dense:
            continue
        layer = layers.get(record.name)
        if not isinstance(layer, Layer) or f"{record.name}/mask" not in tensors:
            raise RunDirectoryError(
                f"run directory '{folder}': layer '{record.name}' of the manifest is not in its "
                "files; compress again"
            )
        matrix = weight_to_matrix(layer, get_tensor(network.module, layer.weight_name))
        form = CompressedLayer(
            scheme=scheme,
            weight=matrix,
            mask=tensors[f"{record.name}/mask"],
            codes=tensors.get(f"{record.name}/codes"),
            scale=tensors.get(f"{record.name}/scale"),
            zero_point=tensors.get(f"{record.name}/zero_point"),
            error=record.error if record.error is not None else float("nan"),
            method=manifest.settings.method,
        )
        if not _is_consistent(form):
            raise RunDirectoryError(
                f"run directory '{folder}' is damaged: the codes or the mask of layer "
                f"'{record.name}' in {LAYERS} are not those of its weights in {NETWORK}; compress "
                "again"
            )
        forms[record.name] = form
    return forms


def _is_consistent(form: CompressedLayer[Tensor]) -> bool:
    """Whether a layer's weight is what its mask allows and what its codes stand for."""
    weight, mask, codes = form.weight, form.mask, form.codes
    if mask.shape != weight.shape or bool((weight[~mask] != 0).any()):
        return False
    if form.scheme.quantization is None:
        return codes is None
    if codes is None or form.scale is None or form.zero_point is None:
        return False
    rows, cols = weight.shape
    if codes.shape != weight.shape or form.scale.dim() != 2:
        return False
    groups = form.scale.shape[1]
    one_each = form.scale.shape == form.zero_point.shape == (rows, groups)
    if not one_each or groups < 1 or cols % groups:
        return False
    grouped = codes.float().reshape(rows, groups, -1)
    values = (grouped - form.zero_point.float()[:, :, None]) * form.scale[:, :, None]
    return bool((values.reshape(rows, cols) == weight).all())
