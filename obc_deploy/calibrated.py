"""Calibration of a whole model: capture, samples, Hessians, shared by all that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from obc_deploy.augmentation import augmented
from obc_deploy.calibration import HESSIAN_MEMORY, LayerStatistics, collect_hessians
from obc_deploy.capture import Network, capture, input_names, recapture
from obc_deploy.corrections import Moments
from obc_deploy.data import Batches, Preprocessing, Samples, as_samples
from obc_deploy.device_memory import available_memory, limit_device_memory
from obc_deploy.errors import CalibrationError
from obc_deploy.folding import fold_batch_norms
from obc_deploy.layers import Layer, UnsupportedLayer, find_layers
from obc_deploy.schemes import Scheme, as_scheme
from obc_deploy.solvers.contract import CompressedLayer
from obc_deploy.solvers.dispatch import torch_device

if TYPE_CHECKING:
    from torch.export import ExportedProgram

DEFAULT_BATCH = 64
"""Samples that run through the network at a time."""

Stage = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""


def silent(what: str, share: float) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class CalibratedModel:
    """A captured model with everything that its schemes can share: capture and Hessians.

    Attributes:
        network: the network as captured, batch norms in place.
        layers: its layers.
        unsupported: operators with weights that are left alone.
        folded: the dense network with its batch norms folded.
        folded_layers: the layers of that.
        samples: the calibration samples.
        statistics: Hessians by layer, filled as they are needed.
        source: what the user named.
        weights: which weights the user named.
        device: where calibration and solving run.
        batch_size: samples that run through the network at a time.
        levels: schemes that will be asked for: one trace of a layer serves all of a kind.
        passes: how often the samples show each image, mirrored and shifted from the second on.
        moments: statistics of the dense batch norms' inputs, once they were needed.
        pruned: layers pruned so far, by layer, pattern, method, damping and precision.
    """

    network: Network
    layers: tuple[Layer, ...]
    unsupported: tuple[UnsupportedLayer, ...]
    folded: Network
    folded_layers: tuple[Layer, ...]
    samples: Samples
    statistics: dict[str, LayerStatistics]
    source: str
    weights: str | None
    device: str
    batch_size: int
    levels: tuple[Scheme, ...] = ()
    passes: int = 1
    pruned: dict[tuple[str, str, str | None, float, str], CompressedLayer[Tensor]] = field(
        default_factory=dict, repr=False
    )
    moments: dict[str, Moments] = field(default_factory=dict, repr=False)

    def batches(self, samples: Samples | None = None) -> Batches:
        """Samples as they run through the network; its own, or others."""
        chosen = self.samples if samples is None else samples
        return chosen.batches(self.batch_size, exact=not self.network.dynamic_batch)

    def hessians(
        self, layers: Sequence[Layer], dtype: torch.dtype, progress: Stage
    ) -> Mapping[str, LayerStatistics]:
        """Statistics of the layers, collected now where they are not yet known."""
        missing = [layer for layer in layers if layer.name not in self.statistics]
        if missing:
            collect_hessians(
                self.network,
                missing,
                self.batches(),
                dtype=dtype,
                memory=self._hessian_memory(),
                visit=lambda layer, found: self.statistics.__setitem__(layer.name, found.on_cpu()),
                progress=lambda share: progress("calibrating", share),
            )
        return self.statistics

    def _hessian_memory(self) -> int:
        """Bytes of Hessians to add up at a time: on a GPU at most half of what is left there."""
        device = torch_device(self.device)
        if device.type != "cuda":
            return HESSIAN_MEMORY
        return min(HESSIAN_MEMORY, available_memory(device) // 2)


def _placed(network: Network, device: str) -> Network:
    network.module.to(device)
    return network


def calibrate(
    model: nn.Module | ExportedProgram,
    calibration: object,
    *,
    device: str = "auto",
    device_memory: int | str | None = None,
    limit: int | None = None,
    passes: int = 1,
    preprocessing: Preprocessing | None = None,
    source: str | None = None,
    weights: str | None = None,
    batch_size: int = DEFAULT_BATCH,
    levels: Iterable[Scheme | str] = (),
    seed: int = 0,
) -> CalibratedModel:
    """Capture a model and hold its calibration samples, for one or many calls of `compress`.

    Args:
        model: a module or an exported program; never changed.
        calibration: Samples, arrays, an `(inputs, labels)` pair, a loader, or what `load_samples`
            takes as text.
        device: "cpu", "cuda" or "auto".
        device_memory: most memory that this process may take on a CUDA device, such as "8GiB"; kept
            by torch's allocator from here on.
        limit: most samples to use, chosen at random with `seed`.
        passes: over them, images mirrored and shifted from the second on (`augmented`).
        preprocessing: for uint8 inputs.
        source: the model's name for the manifest.
        weights: the weights' name for the manifest.
        batch_size: samples that run through the network at a time.
        levels: schemes that will be asked for later; layers are then pruned to all of them at once.
        seed: of the choice of samples, and of what changes in later passes.

    Raises:
        CalibrationError: the samples are unusable, or of another shape than the model takes.
        DeviceMemoryError: a limit that cannot be kept, or one without a CUDA device.
        ModelError: the model cannot be captured.
    """
    place = str(torch_device(device))
    if device_memory is not None:
        limit_device_memory(torch_device(device), device_memory)
    if limit is not None and limit < 1:
        raise CalibrationError(f"limit {limit}: give 1 or more calibration samples")
    if batch_size < 1:
        raise CalibrationError(f"batch size {batch_size}: give 1 or more")
    samples = as_samples(calibration, preprocessing=preprocessing).take(limit, seed)
    samples = augmented(samples, passes, seed=seed)
    samples = named_inputs(samples, input_names(model))
    example = tuple(torch.from_numpy(array) for array in samples.arrays(0, 2))
    network = capture(model, example)
    names = network.input_names
    if len(names) != len(samples.inputs):
        raise CalibrationError(
            f"the model takes {len(names)} inputs ({', '.join(names)}), '{samples.source}' has "
            f"{len(samples.inputs)} ({', '.join(samples.inputs)})"
        )
    samples = replace(samples, inputs=dict(zip(names, samples.inputs.values(), strict=True)))
    if network.batch_size is not None:
        batch_size = network.batch_size
        if len(samples) < batch_size:
            raise CalibrationError(
                f"the model takes batches of {batch_size} and '{samples.source}' has "
                f"{len(samples)} samples; give {batch_size} or more, or a model of any batch size"
            )
    layers, unsupported = find_layers(network)
    folded, _, _ = fold_batch_norms(network, layers)
    folded = recapture(folded)
    folded_layers, _ = find_layers(folded)
    return CalibratedModel(
        _placed(network, place),
        tuple(layers),
        tuple(unsupported),
        folded,
        tuple(folded_layers),
        samples,
        {},
        source or type(model).__name__,
        weights,
        place,
        batch_size,
        tuple(as_scheme(level) for level in levels),
        passes,
    )


def named_inputs(samples: Samples, names: Sequence[str]) -> Samples:
    """The samples' inputs in the order of these names, where they are called by them."""
    wanted = names[: len(samples.inputs)]
    if set(wanted) != set(samples.inputs):
        return samples
    return replace(samples, inputs={name: samples.inputs[name] for name in wanted})
