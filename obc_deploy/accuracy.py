"""Top-1 accuracy in PyTorch, before and after compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from obc_deploy import manifest as manifests
from obc_deploy.calibrated import DEFAULT_BATCH, CalibratedModel, Stage, named_inputs
from obc_deploy.capture import at_batch
from obc_deploy.data import Preprocessing, Samples, as_samples
from obc_deploy.errors import CalibrationError

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel


def predictions(
    module: nn.Module,
    samples: Samples,
    *,
    batch_size: int = DEFAULT_BATCH,
    device: str = "cpu",
    fixed_batch: bool = False,
) -> Tensor:
    """(n,) int64 classes with the largest first output, on the CPU.

    Args:
        module: computes the outputs.
        samples: its inputs.
        batch_size: samples that run at a time.
        device: where they run.
        fixed_batch: the module takes batches of this very size; the last one is filled up.
    """
    found = []
    module = module.to(device)
    with torch.no_grad():
        for batch in samples.batches(batch_size):
            if fixed_batch:
                batch = tuple(at_batch(tensor, batch_size) for tensor in batch)
            output = module(*(tensor.to(device) for tensor in batch))
            first = output[0] if isinstance(output, tuple | list) else output
            found.append(first.flatten(1).argmax(1).cpu())
    return torch.cat(found)[: len(samples)]


def top1(
    module: nn.Module,
    samples: Samples,
    *,
    batch_size: int = DEFAULT_BATCH,
    device: str = "cpu",
    fixed_batch: bool = False,
) -> float:
    """Share of samples whose largest first output is their label; arguments as in `predictions`.

    Raises:
        CalibrationError: the samples have no labels.
    """
    if samples.labels is None:
        raise CalibrationError(f"'{samples.source}' has no labels to measure accuracy against")
    guesses = predictions(
        module, samples, batch_size=batch_size, device=device, fixed_batch=fixed_batch
    )
    return float((guesses == torch.from_numpy(samples.labels)).double().mean())


def evaluation_samples(
    calibrated: CalibratedModel, evaluation: object, preprocessing: Preprocessing | None
) -> Samples | None:
    """The evaluation samples, known to be usable before the work and not after."""
    if evaluation is None:
        return None
    own = isinstance(evaluation, Samples) and evaluation.preprocessing is not None
    usual = None if own else calibrated.samples.preprocessing
    samples = as_samples(evaluation, preprocessing=preprocessing or usual)
    if samples.labels is None:
        raise CalibrationError(f"'{samples.source}' has no labels to measure accuracy against")
    samples = named_inputs(samples, calibrated.network.input_names)
    wanted, given = (
        [array.shape[1:] for array in each.arrays(0, 1)] for each in (calibrated.samples, samples)
    )
    if wanted != given:
        raise CalibrationError(
            f"the evaluation samples in '{samples.source}' have shape {_shapes(given)}, the "
            f"calibration samples {_shapes(wanted)}; give samples of one shape"
        )
    return samples


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, shape)) or "()" for shape in shapes)


def measure_accuracy(
    calibrated: CalibratedModel, made: CompressedModel, samples: Samples, say: Stage
) -> manifests.Accuracy:
    """Accuracies of the dense network and of what was made of it, quantizers simulated.

    Args:
        calibrated: the dense network.
        made: what was made of it.
        samples: labelled ones.
        say: told what is being done.
    """

    def share(module: nn.Module) -> float:
        return top1(
            module, samples, batch_size=calibrated.batch_size, device=calibrated.device,
            fixed_batch=not calibrated.network.dynamic_batch,
        )  # fmt: skip

    say("evaluating the dense model", 0.0)
    dense = share(calibrated.network.module)
    say("evaluating the compressed model", 0.5)
    compressed = share(made.module(made.manifest.settings.target))
    say("evaluating the compressed model", 1.0)
    return manifests.Accuracy(
        dense=dense, compressed=compressed, samples=len(samples), source=samples.source
    )
