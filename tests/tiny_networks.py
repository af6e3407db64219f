"""Networks small enough to capture, compress and export in a second or two."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Residual(nn.Module):
    """conv, ReLU, max pool, conv, residual add, ReLU, global average pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = functional.relu(x + self.third(functional.relu(self.second(x))))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Batch norms, ReLU6, a depthwise and a pointwise convolution, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = functional.relu6(self.norm1(self.first(x)))
        x = self.pointwise(functional.relu6(self.norm2(self.depthwise(x))))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Concatenation(nn.Module):
    """Two branches that meet in a concatenation, then an average pool and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 1)
        self.right = nn.Conv2d(16, 8, 3, padding=1)
        self.merge = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        x = torch.cat([self.left(x), functional.relu(self.right(x))], 1)
        return self.head(functional.avg_pool2d(self.merge(x), 2).flatten(1))


class SharedConvolution(nn.Module):
    """One convolution used twice, on inputs of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = functional.relu(self.twice(functional.relu(self.stem(x))))
        return self.head(functional.relu(self.twice(x * 30)).mean((2, 3)))


class Sequence1d(nn.Module):
    """One-dimensional convolutions with stride, dilation and 'same' padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 16, 5, stride=2, padding=2)
        self.second = nn.Conv1d(16, 16, 3, padding="same", dilation=2)
        self.head = nn.Linear(16 * 8, 10)

    def forward(self, x):
        x = functional.relu(self.second(functional.relu(self.first(x))))
        return self.head(x.flatten(1))


class Upsampling(nn.Module):
    """A transposed convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1)
        self.last = nn.Conv2d(6, 4, 3)

    def forward(self, x):
        return self.last(functional.relu(self.up(functional.relu(self.down(x)))))


class Plain(nn.Module):
    """Two convolutions with batch norms and ReLUs, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Twins(nn.Module):
    """Two equal convolutions without bias, as cloned layers are before training."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.two.load_state_dict(self.one.state_dict())

    def forward(self, x):
        return self.two(functional.relu(self.one(x)))


class FixedBatch(nn.Module):
    """A network that takes one sample at a time, for the shape that it flattens to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(x.view(1, -1))


class Transformer(nn.Module):
    """An encoder block over 8 tokens of 64 features: attention, layer norms, GELU; a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)
        self.norm1 = nn.LayerNorm(64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.norm2 = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        q, k, v = (
            part.view(-1, 8, 4, 16).transpose(1, 2) for part in self.qkv(x).split(64, dim=-1)
        )
        mixed = torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(-1, 8, 64)))
        x = self.norm2(x + self.down(functional.gelu(self.up(x))))
        return self.head(x.mean(1))


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    Residual: (3, 8, 8),
    Depthwise: (3, 8, 8),
    Concatenation: (3, 8, 8),
    SharedConvolution: (3, 8, 8),
    Sequence1d: (3, 16),
    Upsampling: (3, 8, 8),
    Plain: (4, 8, 8),
    Twins: (4, 6, 6),
    FixedBatch: (3, 4),
    Transformer: (8, 64),
}


def build(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose batch norms do something, some with negative gain."""
    torch.manual_seed(seed)
    network = kind()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            with torch.no_grad():
                module.weight[::3] *= -1
            nn.init.normal_(module.bias, 0.0, 0.2)
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


def samples(kind: type[nn.Module], count: int = 32, seed: int = 0) -> np.ndarray:
    """Normal noise of the shape that a network takes, float32."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPES[kind]), dtype=np.float32)
