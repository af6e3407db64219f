"""Data: the samples a user brings for calibration and evaluation, and how they become inputs.

A sample set is an image folder, an `.npz` or `.npy` file, a `package.module:factory`, or arrays
already in memory. uint8 images stay uint8 here; `Preprocessing` turns them into what the network
takes, and is measured as a part of the end-to-end latency.
"""

from __future__ import annotations

import hashlib
import importlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from obc_deploy.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"})
LABEL_KEYS = ("labels", "label", "targets", "y")
INPUT_KEYS = ("inputs", "images", "input", "x", "data", "arr_0")


@dataclass(frozen=True)
class Preprocessing:
    """(pixel * scale - mean) / std, channel by channel, as float32.

    Attributes:
        scale: factor from uint8 pixels, 1/255 as a rule.
        mean: one value a channel, or empty for none.
        std: one value a channel, or empty for none.
    """

    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise CalibrationError(
                f"pre-processing has {len(self.mean)} means and {len(self.std)} standard "
                "deviations; give one of each a channel"
            )
        if any(value <= 0 for value in self.std):
            raise CalibrationError(
                f"pre-processing divides by std {self.std}; all must be positive"
            )

    def apply(self, images: Array) -> Array:
        """The float32 input of (batch, channels, ...) images.

        Raises:
            CalibrationError: the number of channels is another than that of the means.
        """
        values = images.astype(np.float32) * np.float32(self.scale)
        if self.mean:
            if images.ndim < 2 or images.shape[1] != len(self.mean):
                raise CalibrationError(
                    f"pre-processing has {len(self.mean)} channel means, the images have shape "
                    f"{images.shape[1:]}; give as many as there are channels"
                )
            shape = (1, -1, *([1] * (images.ndim - 2)))
            values -= np.asarray(self.mean, np.float32).reshape(shape)
            values /= np.asarray(self.std, np.float32).reshape(shape)
        return values

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for manifests and workers."""
        return {"scale": self.scale, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What `as_dict` gave.

        Raises:
            CalibrationError: it gave something else.
        """
        try:
            scale = float(values["scale"])
            mean, std = (tuple(float(item) for item in values[name]) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{dict(values)} is no pre-processing; give scale, mean and std"
            ) from error
        return cls(scale, mean, std)


IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ImageOptions:
    """How the pictures of a folder become arrays of one size.

    Attributes:
        resize: length the shorter side is scaled to, or None to leave it.
        crop: side of the centre crop, or None to leave it.
    """

    resize: int | None = 256
    crop: int | None = 224


@dataclass(frozen=True)
class Samples:
    """Samples in memory.

    Attributes:
        inputs: one array an input of the network, first dimension the samples.
        labels: (samples,) int64 class indices, or None.
        preprocessing: applied to the inputs that are uint8; None for float inputs.
        source: what the user named, for messages and manifests.
    """

    inputs: Mapping[str, Array]
    labels: Array | None = None
    preprocessing: Preprocessing | None = None
    source: str = "memory"
    _digest: list[str] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise CalibrationError(f"'{self.source}' holds no input arrays")
        counts = {
            name: int(array.shape[0]) if array.ndim else 0 for name, array in self.inputs.items()
        }
        if min(counts.values()) == 0:
            raise CalibrationError(f"'{self.source}' is empty: give at least one sample")
        if len(set(counts.values())) > 1:
            raise CalibrationError(
                f"the inputs of '{self.source}' have different numbers of samples: {counts}"
            )
        if self.labels is not None and len(self.labels) != len(self):
            raise CalibrationError(
                f"'{self.source}' has {len(self)} samples and {len(self.labels)} labels"
            )
        for name, array in self.inputs.items():
            if array.dtype.kind not in "fuib":
                raise CalibrationError(
                    f"input '{name}' in '{self.source}' holds {array.dtype} values; give numbers"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = int(np.flatnonzero(~np.isfinite(array.reshape(len(self), -1)).all(axis=1))[0])
                raise CalibrationError(
                    f"sample {bad} of input '{name}' in '{self.source}' holds NaN or Inf; remove it"
                )

    def __len__(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])

    def take(self, count: int | None, seed: int | None = None) -> Samples:
        """The first `count` samples, or a seeded random choice of them; all where None."""
        if count is None or count >= len(self):
            return self
        index = np.arange(count)
        if seed is not None:
            index = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return replace(
            self,
            inputs={name: array[index] for name, array in self.inputs.items()},
            labels=None if self.labels is None else self.labels[index],
            _digest=[],
        )

    def arrays(self, start: int, stop: int) -> tuple[Array, ...]:
        """Samples `start` to `stop` as the network takes them: uint8 pre-processed to float32."""
        return tuple(self._prepared(array[start:stop]) for array in self.inputs.values())

    def _prepared(self, array: Array) -> Array:
        if array.dtype == np.uint8:
            return (self.preprocessing or Preprocessing()).apply(array)
        if array.dtype == np.float64 or array.dtype == np.float16:
            return array.astype(np.float32)
        return array

    def batches(self, size: int, *, exact: bool = False) -> Batches:
        """The samples in batches of `size`; with `exact` a last, smaller batch is left out."""
        return Batches(self, size, exact)

    def sha256(self) -> str:
        """Hash of all inputs and labels, in order."""
        if not self._digest:
            digest = hashlib.sha256()
            for name, array in self.inputs.items():
                digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
            if self.labels is not None:
                digest.update(np.ascontiguousarray(self.labels).tobytes())
            self._digest.append(digest.hexdigest())
        return self._digest[0]


@dataclass(frozen=True)
class Batches:
    """Batches of a sample set as tensors; can be gone through any number of times."""

    samples: Samples
    size: int
    exact: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise CalibrationError(f"batch size {self.size}: give 1 or more")

    def __len__(self) -> int:
        count = len(self.samples)
        return count // self.size if self.exact else -(-count // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        import torch

        for index in range(len(self)):
            start = index * self.size
            arrays = self.samples.arrays(start, start + self.size)
            yield tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def _from_mapping(
    mapping: Mapping[str, Array], source: str, preprocessing: Preprocessing | None
) -> Samples:
    labels = next((np.asarray(mapping[key]) for key in LABEL_KEYS if key in mapping), None)
    inputs = {
        name: np.asarray(array)
        for name, array in mapping.items()
        if name not in LABEL_KEYS and np.asarray(array).dtype.kind in "fui" and np.ndim(array) > 1
    }
    known = [key for key in INPUT_KEYS if key in inputs]
    if known:
        inputs = {known[0]: inputs[known[0]]}
    if not inputs:
        raise CalibrationError(
            f"'{source}' holds the keys {sorted(mapping)} and none is an array of samples; name "
            f"one of them {INPUT_KEYS[0]!r}, or after the network's inputs"
        )
    if labels is not None:
        labels = labels.astype(np.int64)
    return Samples(inputs, labels, preprocessing, source)


def _from_folder(
    folder: Path, images: ImageOptions, preprocessing: Preprocessing | None, limit: int | None
) -> Samples:
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise CalibrationError(
            f"image folder '{folder}' holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    classes = sorted({p.parent.name for p in files if p.parent != folder})
    if limit is not None and limit < len(files):
        # Spread over the whole list, so that sub-folders (classes) all take part.
        files = [files[int(i)] for i in np.linspace(0, len(files) - 1, limit).round()]
    arrays = []
    for path in files:
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise CalibrationError(
                f"cannot read picture '{path}': {error}; remove or replace it"
            ) from error
        if images.resize is not None:
            # As torchvision does it, to the pixel: what trained networks were evaluated with.
            short = min(picture.size)
            width, height = (max(1, images.resize * side // short) for side in picture.size)
            if (width, height) != picture.size:
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        if images.crop is not None:
            left, top = (round((side - images.crop) / 2) for side in picture.size)
            picture = picture.crop((left, top, left + images.crop, top + images.crop))
        arrays.append(np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1))
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise CalibrationError(
            f"the pictures of '{folder}' have {len(shapes)} different sizes; give a crop size"
        )
    labels = None
    if classes and all(p.parent != folder for p in files):
        labels = np.array([classes.index(p.parent.name) for p in files], dtype=np.int64)
    return Samples({"images": np.stack(arrays)}, labels, preprocessing or IMAGENET, str(folder))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, short enough for one line of ours."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]


def call_factory(spec: str, what: str) -> Any:
    """Import `package.module:factory` and return what it is or, where callable, what it returns.

    Raises:
        CalibrationError: it cannot be imported, is not there, or fails.
    """
    module_name, _, attribute = spec.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"cannot import '{module_name}' for {what} '{spec}': {error}; is it on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise CalibrationError(
            f"module '{module_name}' has no '{attribute}' for {what} '{spec}'"
        ) from error
    try:
        return factory() if callable(factory) else factory
    except Exception as error:
        raise CalibrationError(
            f"{what} '{spec}' failed: {type(error).__name__}: {first_line(error)}"
        ) from error


def as_samples(
    data: object, *, preprocessing: Preprocessing | None = None, source: str = "memory"
) -> Samples:
    """Samples from what a Python caller has at hand.

    Args:
        data: Samples; an array or tensor of inputs; an `(inputs, labels)` pair; a mapping of
            arrays; or an iterable (a DataLoader) of batches, each one of these.
        preprocessing: for uint8 inputs.
        source: a name for messages.

    Raises:
        CalibrationError: it is none of these, or is empty.
    """
    if isinstance(data, Samples):
        return data if preprocessing is None else replace(data, preprocessing=preprocessing)
    if isinstance(data, str | Path):
        return load_samples(str(data), preprocessing=preprocessing)
    if isinstance(data, Mapping):
        return _from_mapping({k: _array(v) for k, v in data.items()}, source, preprocessing)
    if _is_array(data):
        return Samples({"images": _array(data)}, None, preprocessing, source)
    if isinstance(data, tuple | list) and data and all(_is_array(item) for item in data):
        first, *rest = (_array(item) for item in data)
        labelled = len(rest) == 1 and rest[0].ndim == 1 and rest[0].dtype.kind in "iu"
        if isinstance(data, tuple) and labelled:
            return Samples({"images": first}, rest[0].astype(np.int64), preprocessing, source)
        if isinstance(data, list):
            return _from_batches(data, source, preprocessing)
        arrays = {f"input_{i}": array for i, array in enumerate((first, *rest))}
        return Samples(arrays, None, preprocessing, source)
    if isinstance(data, Iterable) and not isinstance(data, bytes):
        return _from_batches(data, source, preprocessing)
    raise CalibrationError(
        f"'{source}' is a {type(data).__name__}; give arrays, an (inputs, labels) pair, a mapping "
        "of arrays, or a loader of such batches"
    )


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _from_batches(
    batches: Iterable[object], source: str, preprocessing: Preprocessing | None
) -> Samples:
    parts = [
        as_samples(
            {"images": _array(batch)} if _is_array(batch)
            else tuple(batch) if isinstance(batch, list | tuple)
            else batch,
            preprocessing=preprocessing,
            source=source,
        )
        for batch in batches
    ]  # fmt: skip
    if not parts:
        raise CalibrationError(f"'{source}' is empty: give at least one batch")
    shapes = [{name: array.shape[1:] for name, array in part.inputs.items()} for part in parts]
    odd = next((index for index, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise CalibrationError(
            f"batch {odd} of '{source}' has samples of shape {shapes[odd]}, batch 0 of "
            f"{shapes[0]}; give samples of one shape"
        )
    labels = [part.labels for part in parts if part.labels is not None]
    return Samples(
        {name: np.concatenate([part.inputs[name] for part in parts]) for name in parts[0].inputs},
        np.concatenate(labels) if len(labels) == len(parts) else None,
        preprocessing,
        source,
    )


def _read_numpy(path: Path) -> Array | dict[str, Array]:
    try:
        # NumPy leaves a file open that it cannot read; ours closes.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CalibrationError(
            f"cannot read '{path}': {first_line(error)}; save it anew with numpy"
        ) from error


def load_samples(
    spec: str,
    *,
    preprocessing: Preprocessing | None = None,
    images: ImageOptions | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Samples:
    """Samples from what a user names: an image folder, `.npz`, `.npy` or `package.module:factory`.

    Args:
        spec: the name.
        preprocessing: for uint8 inputs; ImageNet's for folders, division by 255 elsewhere.
        images: sizes for the pictures of a folder.
        limit: most samples to take.
        seed: takes a random choice of `limit` samples instead of the first ones.

    Raises:
        CalibrationError: nothing of that name, or it is empty, damaged or not finite.
    """
    path = Path(spec)
    if path.is_dir():
        options = images or ImageOptions()
        return _from_folder(path, options, preprocessing, limit)
    if path.suffix in {".npz", ".npy"}:
        if not path.is_file():
            raise CalibrationError(f"no file '{spec}'; give the path of an .npz or .npy file")
        arrays = _read_numpy(path)
        if isinstance(arrays, np.ndarray):
            return Samples({"images": arrays}, None, preprocessing, spec).take(limit, seed)
        return _from_mapping(arrays, spec, preprocessing).take(limit, seed)
    if ":" in spec:
        made = call_factory(spec, "calibration data")
        return as_samples(made, preprocessing=preprocessing, source=spec).take(limit, seed)
    raise CalibrationError(
        f"'{spec}' is no image folder, .npz or .npy file, or package.module:factory"
    )
