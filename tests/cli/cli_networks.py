"""Small networks and data that the tests of the command line name as `cli_networks:FACTORY`."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from obc_deploy.data import Preprocessing, Samples


def small_network(channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def three_channels() -> nn.Module:
    return small_network(channels=3)


def nan_network() -> nn.Module:
    network = small_network()
    with torch.no_grad():
        network[3].weight[1, 2, 0, 0] = float("nan")
    return network


def slow_network() -> nn.Module:
    """A layer that the exact solver works on for minutes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1536, 1024), nn.ReLU(), nn.Linear(1024, 4))


def no_network() -> str:
    return "a string"


def prepared_samples() -> Samples:
    """uint8 pictures with a pre-processing of their own."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 8, 8), dtype=np.uint8)
    return Samples({"x": pixels}, None, Preprocessing(0.5, (1.0,) * 4, (2.0,) * 4), "ours")
