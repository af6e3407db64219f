"""Plain PyTorch architectures for trained networks and images that lie beside the checkout.

The weights are somebody's real training results (CIFAR-10 ResNets and VGG, ImageNet MobileNets, a
Fashion-MNIST network) in a folder outside this repository, so whoever uses them asks `shared_data`
first. Each network is written down here only as far as its state dict needs: it loads strictly.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from obc_deploy.data import IMAGENET, Preprocessing, Samples
from obc_deploy.errors import CalibrationError, ModelError

SHARED_VARIABLE = "OBC_DEPLOY_SHARED"
"""Environment variable that names the folder of `weights`, `cifar10`, `imagenet` and `fashion`."""

SPLITS = ("calib", "test")


class OptionABlock(nn.Module):
    """CIFAR residual block of two 3x3 convolutions with a shortcut that has no weights.

    Where the shape changes, the shortcut takes every second pixel and pads the channels with zeros,
    half of them before and half after (He et al. 2015, option A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        branch = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(branch + x)


class CifarResNet(nn.Module):
    """Residual network for 32x32 images: three stages of 16, 32 and 64 channels.

    Depth is `6 * blocks + 2`: 3 blocks a stage make ResNet-20, 5 make ResNet-32.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (OptionABlock(outputs, outputs, 1) for _ in range(blocks - 1))
        return nn.Sequential(OptionABlock(inputs, outputs, stride), *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, 32, 32) to class scores (n, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.adaptive_avg_pool2d(x, 1)
        scores: torch.Tensor = self.linear(torch.flatten(x, 1))
        return scores


class CifarVgg16(nn.Module):
    """VGG-16 with batch norm for 32x32 images: thirteen 3x3 convolutions, three linear layers."""

    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    """Channels and convolutions between one max pooling and the next."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channels, convolutions in self.STAGES:
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(inputs, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                inputs = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(512, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, 32, 32) to class scores (n, classes)."""
        scores: torch.Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return scores


class MobileNetV1(nn.Module):
    """MobileNet v1 (Howard et al. 2017): depthwise-separable convolutions, ReLU6."""

    WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

    def __init__(self, multiplier: float, classes: int = 1000) -> None:
        super().__init__()
        channels = int(32 * multiplier)
        layers = self._convolution(3, channels, 3, stride=2)
        for width, stride in zip(self.WIDTHS, self.STRIDES, strict=True):
            layers += self._convolution(channels, channels, 3, stride, groups=channels)
            outputs = int(width * multiplier)
            layers += self._convolution(channels, outputs, 1)
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    @staticmethod
    def _convolution(
        inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> list[nn.Module]:
        padding = kernel // 2
        return [
            nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3),
            nn.ReLU6(),
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, 224, 224) to class scores (n, classes)."""
        scores: torch.Tensor = self.classifier(self.features(x).mean((2, 3)))
        return scores


def fashion_cnn() -> nn.Sequential:
    """Two convolutions and two linear layers for (n, 1, 28, 28) images of clothes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    network: nn.Module = mobilenet_v2(weights=None)
    return network


@dataclass(frozen=True)
class ReferenceNetwork:
    """A trained network, the images it is tested on, and what it is published to score on them.

    Attributes:
        build: makes the architecture with random weights.
        dataset: folder of its images.
        input_shape: (channels, height, width) of one image.
        preprocessing: from uint8 pixels to the float32 input.
        test_accuracy: top-1 fraction on all of the dataset's test images.
        half_turn: the network reads images turned by 180 degrees (its kernels are stored turned,
            so that plain padding does what TensorFlow's "same" padding did).
    """

    build: Callable[[], nn.Module]
    dataset: str
    input_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    test_accuracy: float
    half_turn: bool = False


_CIFAR = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
_FASHION = Preprocessing(mean=(0.2860,), std=(0.3530,))
_MINUS_ONE_TO_ONE = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

REFERENCE_NETWORKS: dict[str, ReferenceNetwork] = {
    "cifar10_resnet20": ReferenceNetwork(
        lambda: CifarResNet(3), "cifar10", (3, 32, 32), IMAGENET, 0.9166
    ),
    "cifar10_resnet32": ReferenceNetwork(
        lambda: CifarResNet(5), "cifar10", (3, 32, 32), IMAGENET, 0.923
    ),
    "cifar10_vgg16_bn": ReferenceNetwork(
        CifarVgg16,
        "cifar10",
        (3, 32, 32),
        _CIFAR,
        0.906,
    ),
    "imagenet_mobilenet_v1_075": ReferenceNetwork(
        lambda: MobileNetV1(0.75),
        "imagenet",
        (3, 224, 224),
        _MINUS_ONE_TO_ONE,
        0.762,
        half_turn=True,
    ),
    "imagenet_mobilenet_v2": ReferenceNetwork(
        _mobilenet_v2, "imagenet", (3, 224, 224), _MINUS_ONE_TO_ONE, 0.812, half_turn=True
    ),
    "fashion_cnn": ReferenceNetwork(fashion_cnn, "fashion", (1, 28, 28), _FASHION, 0.918),
}
"""Every network by the name of its weights file."""


def shared_data() -> Path | None:
    """The folder with real weights and images, or None where there is none.

    `$OBC_DEPLOY_SHARED` names it; otherwise it is looked for as `../shared/data` beside the
    repository.

    Raises:
        CalibrationError: the variable is set, but names no folder with weights.
    """
    named = os.environ.get(SHARED_VARIABLE)
    if named:
        folder = Path(named)
        if not (folder / "weights").is_dir():
            raise CalibrationError(
                f"{SHARED_VARIABLE}={named} has no folder 'weights'; name the folder that holds "
                "'weights' and the images, or unset the variable"
            )
        return folder
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if (folder / "weights").is_dir() else None


def needed_shared_data() -> Path:
    """The same folder, for what cannot do without it.

    Raises:
        CalibrationError: there is none.
    """
    folder = shared_data()
    if folder is None:
        raise CalibrationError(
            "the trained networks and images are not here; set OBC_DEPLOY_SHARED to their folder"
        )
    return folder


def reference_network(name: str) -> ReferenceNetwork:
    """The network of this name.

    Raises:
        ModelError: there is none.
    """
    if name not in REFERENCE_NETWORKS:
        raise ModelError(
            f"no reference network is called '{name}'; there are {', '.join(REFERENCE_NETWORKS)}"
        )
    return REFERENCE_NETWORKS[name]


def load_network(name: str, shared: Path) -> nn.Module:
    """The trained network in evaluation mode, all floating-point tensors float32.

    Args:
        name: a key of `REFERENCE_NETWORKS`.
        shared: the folder that `shared_data` finds.

    Raises:
        ModelError: the name is unknown, or the weights are missing or do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = reference_network(name).build()
    file = shared / "weights" / f"{name}.safetensors"
    try:
        stored = load_file(file)
        # Some files are stored in half precision; copying into the float32 parameters widens them.
        network.load_state_dict(stored, strict=True)
    except (OSError, SafetensorError, RuntimeError) as broken:
        reason = str(broken).splitlines()[0]
        raise ModelError(
            f"cannot load network '{name}' from {file}: {reason}; check the folder against its "
            "SHA256SUMS"
        ) from broken
    return network.float().eval()


def _spread(total: int, limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of `total` indices, evenly spaced, in order."""
    if limit is None or limit >= total:
        return np.arange(total)
    if limit < 1:
        raise CalibrationError(f"limit {limit} asks for no images; ask for 1 or more")
    return np.arange(limit) * total // limit


def _arrays(file: Path, limit: int | None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with np.load(file) as stored:
        images, labels = stored["images"], stored["labels"]
    chosen = _spread(len(labels), limit)
    return images[chosen], labels[chosen].astype(np.int64)


def _photographs(
    folder: Path, split: str, limit: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from PIL import Image

    with (folder / f"labels_{split}.csv").open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    rows = [rows[index] for index in _spread(len(rows), limit)]
    images = []
    for row in rows:
        with Image.open(folder / row["file"]) as photograph:
            images.append(np.asarray(photograph.convert("RGB")).transpose(2, 0, 1))
    return np.stack(images), np.array([int(row["class_index"]) for row in rows], np.int64)


def load_pixels(
    name: str, split: str, shared: Path, limit: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images as the network's pre-processing takes them, and their labels.

    Args:
        name: a key of `REFERENCE_NETWORKS`.
        split: "calib" or "test"; they share no image.
        shared: the folder that `shared_data` finds.
        limit: at most so many images, evenly spaced over the split; all without it.

    Returns:
        Images (n, channels, height, width) uint8, already turned by 180 degrees where the network
        wants that, and class labels (n,) int64.

    Raises:
        ModelError: the name is unknown.
        CalibrationError: the split is unknown, the images are missing, or `limit` is below 1.
    """
    network = reference_network(name)
    if split not in SPLITS:
        raise CalibrationError(f"'{split}' is no split of {network.dataset}; use 'calib' or 'test'")
    folder = shared / network.dataset
    try:
        if network.dataset == "imagenet":
            images, labels = _photographs(folder, split, limit)
        else:
            images, labels = _arrays(folder / f"{split}.npz", limit)
    except OSError as missing:
        raise CalibrationError(
            f"cannot read the {split} images of {network.dataset} in {folder}: {missing}; check "
            "the folder against its SHA256SUMS"
        ) from missing
    if network.half_turn:
        images = images[:, :, ::-1, ::-1]
    return np.ascontiguousarray(images), labels


def load_images(
    name: str, split: str, shared: Path, limit: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`load_pixels`, pre-processed: inputs (n, channels, height, width) float32 and labels (n,).

    Raises:
        ModelError: the name is unknown.
        CalibrationError: the split is unknown, the images are missing, or `limit` is below 1.
    """
    pixels, labels = load_pixels(name, split, shared, limit)
    return reference_network(name).preprocessing.apply(pixels), labels


def load_samples(name: str, split: str, shared: Path, limit: int | None = None) -> Samples:
    """`load_pixels` with the network's pre-processing, as the rest of the package takes data.

    Raises:
        ModelError: the name is unknown.
        CalibrationError: the split is unknown, the images are missing, or `limit` is below 1.
    """
    pixels, labels = load_pixels(name, split, shared, limit)
    network = reference_network(name)
    return Samples({"images": pixels}, labels, network.preprocessing, f"{network.dataset}/{split}")
