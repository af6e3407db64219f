"""Augmentation: more passes over the calibration images, mirrored and shifted as in training.

The Hessian of a wide layer behind small planes has fewer independent inputs than columns: 1,024
images of 2x2 positions are 4,096 for the 4,608 columns of a 3x3 convolution over 512 channels. More
passes fill it, as the paper does with ten of them over ImageNet's (OBC, arXiv 2208.11580, section
6).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from obc_deploy.data import Array, Samples
from obc_deploy.errors import CalibrationError

LARGEST_SHIFT = 1 / 8
"""Pixels that an image moves by at most, as a share of its side: 4 of CIFAR's 32."""


def augmented(samples: Samples, passes: int, *, seed: int = 0) -> Samples:
    """The samples, then `passes` - 1 times the same with each image mirrored or not, and shifted.

    Shifts are uniform in whole pixels, up to LARGEST_SHIFT of each side; what they uncover mirrors
    what lies inside. Inputs that are no (channels, height, width) images are repeated as they are.

    Args:
        samples: images, with labels or without.
        passes: how often each is seen in all; 1 leaves the samples as they are.
        seed: of mirrorings and shifts.

    Raises:
        CalibrationError: passes below 1, or more than one over samples without images.
    """
    if passes < 1:
        raise CalibrationError(f"{passes} passes over the calibration samples: give 1 or more")
    if passes == 1:
        return samples
    images = {name for name, array in samples.inputs.items() if array.ndim == 4}
    if not images:
        shapes = ", ".join(str(array.shape[1:]) for array in samples.inputs.values())
        raise CalibrationError(
            f"{passes} passes over '{samples.source}' need images to mirror and shift, of shape "
            f"(channels, height, width), and its samples have {shapes}; give 1 pass"
        )
    made = np.random.default_rng(seed)
    return replace(
        samples,
        inputs={
            name: np.concatenate(
                [array, *(_changed(array, made) if name in images else array
                          for _ in range(passes - 1))]
            )
            for name, array in samples.inputs.items()
        },
        labels=None if samples.labels is None else np.tile(samples.labels, passes),
        _digest=[],
    )  # fmt: skip


def _changed(images: Array, made: np.random.Generator) -> Array:
    count, _, height, width = images.shape
    down, right = int(height * LARGEST_SHIFT), int(width * LARGEST_SHIFT)
    padded = np.pad(images, ((0, 0), (0, 0), (down, down), (right, right)), mode="reflect")
    tops = made.integers(0, 2 * down, (count,), endpoint=True)
    lefts = made.integers(0, 2 * right, (count,), endpoint=True)
    mirrored = made.integers(0, 2, (count,))
    changed = np.empty_like(images)
    for index, (top, left, mirror) in enumerate(zip(tops, lefts, mirrored, strict=True)):
        view = padded[index, :, top : top + height, left : left + width]
        changed[index] = view[..., ::-1] if mirror else view
    return changed
