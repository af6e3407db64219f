"""Augmentation: later passes show the same images mirrored and shifted, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from obc_deploy.augmentation import LARGEST_SHIFT, augmented
from obc_deploy.calibrated import calibrate
from obc_deploy.data import Samples
from obc_deploy.errors import CalibrationError


def images(count=6, channels=3, height=16, width=24, dtype=np.uint8):
    made = np.random.default_rng(0)
    if dtype == np.uint8:
        pixels = made.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    else:
        pixels = made.standard_normal((count, channels, height, width)).astype(dtype)
    return Samples({"images": pixels}, np.arange(count))


def variants(image):
    """Every mirroring and shift of an image, by torch's own reflection padding."""
    down, right = (int(side * LARGEST_SHIFT) for side in image.shape[1:])
    given_image = torch.from_numpy(image.astype(np.float64))[None]
    padded = nn.functional.pad(given_image, (right, right, down, down), mode="reflect")[0]
    for top in range(2 * down + 1):
        for left in range(2 * right + 1):
            view = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
            yield view.numpy()
            yield view.flip(-1).numpy()


def test_one_pass_is_the_samples_themselves():
    samples = images()
    assert augmented(samples, 1) is samples


@settings(deadline=None, max_examples=15)
@given(
    passes=st.integers(2, 4),
    seed=st.integers(0, 9),
    height=st.integers(1, 18),
    dtype=st.sampled_from([np.uint8, np.float32]),
)
def test_later_passes_are_mirrored_and_shifted_copies(passes, seed, height, dtype):
    samples = images(3, height=height, dtype=dtype)
    made = augmented(samples, passes, seed=seed)
    before, after = samples.inputs["images"], made.inputs["images"]
    assert after.dtype == dtype
    assert len(made) == 3 * passes
    assert (made.labels == np.tile([0, 1, 2], passes)).all()
    assert (after[:3] == before).all()
    for index, image in enumerate(after[3:]):
        assert any((image == variant).all() for variant in variants(before[index % 3]))


def test_every_mirroring_and_shift_comes_up():
    samples = images(1, channels=1, height=8, width=8)
    made = augmented(samples, 400).inputs["images"]
    seen = {image.tobytes() for image in made[1:]}
    assert seen == {v.astype(np.uint8).tobytes() for v in variants(samples.inputs["images"][0])}


def test_the_seed_decides():
    samples = images()
    first, again, other = (augmented(samples, 2, seed=seed).sha256() for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert samples.sha256() not in (first, other)


def test_other_inputs_are_repeated():
    samples = Samples({"images": images().inputs["images"], "size": np.arange(6.0)})
    made = augmented(samples, 2)
    assert (made.inputs["size"] == np.tile(np.arange(6.0), 2)).all()


@pytest.mark.parametrize(
    ("shape", "passes", "said"),
    [((4, 8), 2, r"2 passes over 'memory' need images .* have \(8,\)"), ((4, 3, 8, 8), 0, "0 pas")],
)
def test_what_cannot_be_augmented_says_so(shape, passes, said):
    with pytest.raises(CalibrationError, match=said):
        augmented(Samples({"x": np.zeros(shape, np.float32)}), passes)


def test_more_passes_fill_a_hessian_short_of_inputs():
    network = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    few = images(2, channels=8, height=4, width=4, dtype=np.float32)

    def rank(passes):
        calibrated = calibrate(network, few, passes=passes)
        (layer,) = calibrated.layers
        found = calibrated.hessians([layer], torch.float64, lambda *_: None)[layer.name]
        return int(torch.linalg.matrix_rank(found.hessian, hermitian=True))

    assert rank(1) <= 2 * 16 < rank(4) <= 8 * 9
