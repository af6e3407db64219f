"""The demo: a small convolutional network for handwritten digits, and the images it knows.

The images are scikit-learn's copy of the UCI handwritten digits (1,797 real scans of 8x8 pixels,
grey levels 0 to 16), enlarged to 32x32. The split is random over images, so both halves hold digits
of the same writers: the accuracy is that of a demo, not of a digit reader for strangers.

`digits_net`, `calibration_samples` and `test_samples` are factories that the command line takes as
`obc_deploy.demo_network:digits_net` and so on; the samples bring their pre-processing along, while
`calibration_images` and `test_images` are bare pixels and labels.

The checkpoint beside this file was made by `python -m obc_deploy.benchmarks.train_demo_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from obc_deploy.data import Preprocessing, Samples
from obc_deploy.errors import CalibrationError, ModelError

CHECKPOINT = Path(__file__).with_name("demo_network.safetensors")
"""The trained weights; the safetensors metadata says how they were made and what they score."""

CLASSES = 10
IMAGE_SIZE = 32
"""Height and width of an enlarged image, in pixels."""

DIGITS_SCALE = 1.0 / 255.0
DIGITS_MEAN = (0.31,)
DIGITS_STD = (0.32,)
"""Mean and standard deviation of the scaled training pixels, rounded to two digits."""

DIGITS_PREPROCESSING = Preprocessing(DIGITS_SCALE, DIGITS_MEAN, DIGITS_STD)
"""From uint8 pixels to the float32 input the network was trained on."""

TEST_IMAGES_PER_CLASS = 50
SPLIT_SEED = 2208

_SOURCE_SIZE = 8
_SOURCE_MAX = 16


@dataclass(frozen=True)
class DigitsSplit:
    """The handwritten digits, split once and for all.

    Attributes:
        train_images: (1297, 1, 32, 32) uint8; classes take turns, so any prefix can calibrate.
        train_labels: (1297,) int64, 0 to 9.
        test_images: (500, 1, 32, 32) uint8, fifty of each digit, taking turns likewise.
        test_labels: (500,) int64, 0 to 9.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def _enlargement(source: int, size: int) -> NDArray[np.float64]:
    """(size, source) matrix of bilinear weights, pixel centres at half integers, edges repeated."""
    centres = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0.0, source - 1.0)
    left = np.minimum(np.floor(centres).astype(np.int64), source - 2)
    share = centres - left
    weights = np.zeros((size, source))
    weights[np.arange(size), left] = 1.0 - share
    weights[np.arange(size), left + 1] = share
    return weights


def enlarge(scans: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Scans (n, 8, 8) of grey levels 0 to 16 as (n, 1, 32, 32) uint8 pixels, bilinear.

    All weights are multiples of 1/64, so every value before rounding is exact in float64 and the
    pixels are the same bytes on every machine.
    """
    weights = _enlargement(_SOURCE_SIZE, IMAGE_SIZE)
    levels = weights @ scans @ weights.T
    pixels: NDArray[np.uint8] = np.rint(levels * (255.0 / _SOURCE_MAX)).astype(np.uint8)
    return pixels[:, np.newaxis]


def _scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise CalibrationError(
            "the demo's digits come with scikit-learn, which is not installed here; "
            'run: pip install "obc-deploy[demo]"'
        ) from missing
    digits = load_digits()
    return np.asarray(digits.images, np.float64), np.asarray(digits.target, np.int64)


@cache
def load_digits_split() -> DigitsSplit:
    """The 1,297 training and 500 test images, always the same ones in the same order.

    Fifty images of each class are drawn for the test half; the arrays are read-only because every
    caller is given the same ones.

    Raises:
        CalibrationError: scikit-learn, which carries the images, is not installed.
    """
    scans, labels = _scans()
    # RandomState's streams are frozen by NumPy; a Generator's may change from version to version.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    rank_in_class = np.empty(len(labels), np.int64)
    for digit in range(CLASSES):
        members = order[labels[order] == digit]
        rank_in_class[members] = np.arange(len(members))
    # By rank, all classes take turns: a short calibration run sees as many of each.
    order = order[np.argsort(rank_in_class[order], kind="stable")]
    in_test = rank_in_class[order] < TEST_IMAGES_PER_CLASS
    train, test = order[~in_test], order[in_test]
    images = enlarge(scans)
    split = DigitsSplit(images[train], labels[train], images[test], labels[test])
    for array in vars(split).values():
        array.flags.writeable = False
    return split


def calibration_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The training half: images (1297, 1, 32, 32) uint8 and labels (1297,) int64.

    Raises:
        CalibrationError: scikit-learn is not installed.
    """
    split = load_digits_split()
    return split.train_images.copy(), split.train_labels.copy()


def test_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The test half: images (500, 1, 32, 32) uint8 and labels (500,) int64.

    Raises:
        CalibrationError: scikit-learn is not installed.
    """
    split = load_digits_split()
    return split.test_images.copy(), split.test_labels.copy()


def calibration_samples() -> Samples:
    """The training half with labels and the network's pre-processing.

    Raises:
        CalibrationError: scikit-learn is not installed.
    """
    images, labels = calibration_images()
    return Samples({"images": images}, labels, DIGITS_PREPROCESSING, "digits/train")


def test_samples() -> Samples:
    """The test half with labels and the network's pre-processing.

    Raises:
        CalibrationError: scikit-learn is not installed.
    """
    images, labels = test_images()
    return Samples({"images": images}, labels, DIGITS_PREPROCESSING, "digits/test")


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU; "same" padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        activated: torch.Tensor = self.relu(self.norm(self.conv(x)))
        return activated


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))): two convolutions around an identity."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.first = ConvNormRelu(channels, channels, kernel)
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, h, w) to the same shape."""
        activated: torch.Tensor = self.relu(x + self.norm(self.conv(self.first(x))))
        return activated


class DigitsNet(nn.Module):
    """A residual network of 0.84 million weights and 103 million multiply-accumulates an image.

    Input (n, 1, 32, 32) float, output (n, 10) class scores. Channel counts are multiples of 64, and
    no layer problem has more than 1,152 columns, which keeps exact solving (cubic in the columns)
    short. Most of the work is in 3x3 convolutions over 64 to 256 channels at 32x32 to 8x8 pixels,
    so that a runtime's kernels, and not its call overhead, decide the latency.
    """

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = ConvNormRelu(1, 64, 3)
        self.wide = ConvNormRelu(64, 64, 3)
        self.down = ConvNormRelu(64, 128, 3, stride=2)
        self.pool = nn.MaxPool2d(2)
        self.block = ResidualBlock(128, 3)
        self.deep = ConvNormRelu(128, 256, 3)
        self.mix = ResidualBlock(256, 1)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(256, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, 1, 32, 32) to class scores (n, classes)."""
        x = self.pool(self.down(self.wide(self.stem(x))))
        x = self.mix(self.deep(self.block(x)))
        scores: torch.Tensor = self.head(torch.flatten(self.average(x), 1))
        return scores


def digits_net(*, pretrained: bool = True) -> DigitsNet:
    """The demo network in evaluation mode, trained, or with PyTorch's random weights.

    Raises:
        ModelError: the checkpoint is missing or does not fit the network.
    """
    network = DigitsNet()
    if pretrained:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            network.load_state_dict(load_file(CHECKPOINT), strict=True)
        except (OSError, SafetensorError, RuntimeError) as broken:
            reason = str(broken).splitlines()[0]
            raise ModelError(
                f"cannot load the demo network's weights from {CHECKPOINT}: {reason}; reinstall "
                "the package, or train them: python -m obc_deploy.benchmarks.train_demo_model"
            ) from broken
    return network.eval()
