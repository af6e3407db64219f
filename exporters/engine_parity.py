"""An engine, run: its outputs against the PyTorch model's, and its speed as its device says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from obc_deploy.exporters.parity import QUANTIZED_TOLERANCE, Parity, relative_error, torch_outputs

if TYPE_CHECKING:
    from torch import Tensor

    from obc_deploy.compression import CompressedModel
    from obc_deploy.runtimes.session import Session
    from obc_deploy.targets import Target

WARMUP = 20
TIMED = 200


@dataclass(frozen=True)
class DeviceLatency:
    """Medians of what CUDA events said, in milliseconds.

    Attributes:
        batch_size: samples in one inference.
        compute_ms: the engine alone.
        with_copies_ms: with its inputs copied to the device and its outputs back.
    """

    batch_size: int
    compute_ms: float
    with_copies_ms: float


def compare_outputs(
    session: Session, model: CompressedModel, target: Target, batches: Sequence[tuple[Tensor, ...]]
) -> Parity:
    """How far an open artifact or engine is from the simulated network, whatever that is.

    Engines fuse and round as they see fit, and one step of a grid early on moves later ones: the
    tolerance is what a reader may compare with, and nothing is raised beyond it.

    Args:
        session: of the engine.
        model: what it was made from.
        target: what that was exported for.
        batches: inputs, each of a batch size that the session takes.

    Raises:
        RuntimeFailedError: a run failed.
    """
    module = model.quantized(target.placement).module
    names = [spec.name for spec in session.inputs]
    found, wanted = [], []
    same = count = 0
    for batch in batches:
        arrays = [tensor.numpy() for tensor in batch]
        outputs = list(session.run(dict(zip(names, arrays, strict=True))).values())
        references = torch_outputs(module, batch)
        found += outputs
        wanted += references
        guesses, truths = (
            first.reshape(first.shape[0], -1).argmax(1) for first in (outputs[0], references[0])
        )
        same += int((guesses == truths).sum())
        count += len(truths)
    error = relative_error(found, wanted)
    return Parity(error, same / max(count, 1), count, QUANTIZED_TOLERANCE, session.runtime)


def device_latency(session: Session, batch: tuple[Tensor, ...]) -> DeviceLatency:
    """Time one batch on the device.

    Raises:
        RuntimeFailedError: a run failed, or the runtime computes on the CPU.
    """
    inputs = {spec.name: part.numpy() for spec, part in zip(session.inputs, batch, strict=True)}
    taken = session.time_on_device(inputs, warmup=WARMUP, samples=TIMED)
    return DeviceLatency(
        len(batch[0]), float(np.median(taken.compute_ms)), float(np.median(taken.with_copies_ms))
    )
