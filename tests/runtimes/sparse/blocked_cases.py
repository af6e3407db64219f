"""What Hypothesis draws for operators on blocked tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from sparse_models import instruction_sets

from obc_deploy.exporters.frames import Frame

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
SEEDS = st.integers(0, 2**32 - 1)
SETS = st.sampled_from(instruction_sets() or ["portable"])
THREADS = st.sampled_from([1, 2, 3])
CODES = st.integers(0, 255)
CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 17, 32])
SIZES = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 14, 17, 33])

SMALL = st.sampled_from([1, 2, 4, 6, 8])
"""Sides of planes whose rows are neighbours four at a time, or are not."""


def scales(least: float) -> st.SearchStrategy[float]:
    """Numbers of float32, up to 1."""
    return st.floats(least, 1.0).map(lambda scale: float(np.float32(scale)))


SCALES = scales(1e-3)


@dataclass(frozen=True)
class Image:
    """The shape of a tensor [N, C, H, W], and the numbers that fill it."""

    images: int
    channels: int
    height: int
    width: int
    seed: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.images, self.channels, self.height, self.width

    @property
    def blocks(self) -> int:
        return -(-self.channels // 4)

    def codes(self, salt: int = 0) -> np.ndarray:
        random = np.random.default_rng([self.seed, salt])
        return random.integers(0, 256, self.shape).astype(np.uint8)

    def random(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 1000])


FRAMES = st.builds(Frame, st.integers(0, 3), st.sampled_from([0, 0, 1, 2, 9, 15]))
IMAGES = st.builds(Image, st.integers(1, 3), CHANNELS, SIZES, SIZES, SEEDS)


def from_blocks(blocked: np.ndarray, channels: int, frame: Frame, zero_point: int) -> np.ndarray:
    """[N, C, H, W], once borders and spare lanes are known to hold the zero point."""
    border = frame.border
    blocked = blocked[:, :, : blocked.shape[2] - frame.margin]
    images, blocks, height, width, lanes = blocked.shape
    assert (blocks, lanes) == (-(-channels // 4), 4)
    inside = slice(border, height - border), slice(border, width - border)
    around = np.ones((height, width), bool)
    around[inside] = False
    assert (blocked[:, :, around] == zero_point).all()
    plain = blocked[:, :, inside[0], inside[1]].transpose(0, 1, 4, 2, 3)
    plain = plain.reshape(images, blocks * 4, *plain.shape[3:])
    assert (plain[:, channels:] == zero_point).all()
    return plain[:, :channels]


def to_blocks(plain: np.ndarray, frame: Frame, zero_point: int) -> np.ndarray:
    """The blocked tensor of codes [N, C, H, W]; its margins hold codes that nobody may read."""
    images, channels, height, width = plain.shape
    border = frame.border
    sides = ((0, 0), (0, -channels % 4), (border, border), (border, border))
    padded = np.pad(plain, sides, constant_values=zero_point)
    split = padded.reshape(images, -1, 4, height + 2 * border, width + 2 * border)
    blocked = split.transpose(0, 1, 3, 4, 2)
    margin = np.resize(
        np.uint8([91, 7, 255, 0, 130]), (*blocked.shape[:2], frame.margin, *blocked.shape[3:])
    )
    return np.concatenate([blocked, margin], axis=2)
