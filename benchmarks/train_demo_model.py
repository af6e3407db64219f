"""Train the demo network on handwritten digits, from scratch, on the CPU.

    python -m obc_deploy.benchmarks.train_demo_model

One fixed recipe: stochastic gradient descent with Nesterov momentum, a linear warm-up and a cosine
decay, label smoothing, and small random rotations, shifts and changes of size. The test images are
looked at once, after the last epoch, so their accuracy chose nothing. The same seed, thread count
and PyTorch build on the same kind of CPU give the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save as serialized
from torch import nn
from torch.nn import functional

from obc_deploy.demo_network import (
    CHECKPOINT,
    DIGITS_MEAN,
    DIGITS_PREPROCESSING,
    DIGITS_SCALE,
    DIGITS_STD,
    DigitsNet,
    DigitsSplit,
    load_digits_split,
)

BATCH = 64
PEAK_LEARNING_RATE = 0.1
WARM_UP_EPOCHS = 2
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.05

MAX_ROTATION = math.radians(10.0)
MAX_SHIFT = 0.125
"""Share of half the image's width: 2 of 32 pixels."""
MAX_RESIZE = 0.1


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (n, c, h, w), each turned, shifted and resized a little at random; black comes in."""
    count = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, size = uniform(MAX_ROTATION), 1 + uniform(MAX_RESIZE)
    cosine, sine = torch.cos(angle) * size, torch.sin(angle) * size
    rows = [
        torch.stack([cosine, -sine, uniform(MAX_SHIFT)], dim=1),
        torch.stack([sine, cosine, uniform(MAX_SHIFT)], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (n, 1, h, w) of 0 to 255, as the network's input."""
    return (pixels * DIGITS_SCALE - DIGITS_MEAN[0]) / DIGITS_STD[0]


def learning_rate(progress: float, epochs: int) -> float:
    """Share of the peak rate at `progress` epochs: linear warm-up, then half a cosine to zero."""
    warm_up = min(WARM_UP_EPOCHS, epochs / 2)
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (epochs - warm_up)))


def parameter_groups(network: nn.Module) -> list[dict[str, object]]:
    """Weight matrices decay; biases and batch norm's scales do not."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(split: DigitsSplit, epochs: int, seed: int) -> DigitsNet:
    """The network after `epochs` passes over the training half, in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitsNet().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        parameter_groups(network), lr=PEAK_LEARNING_RATE, momentum=0.9, nesterov=True
    )
    # Pixels, not normalized values, are augmented: black (0) is what comes in at the edges.
    pixels = torch.from_numpy(split.train_images.astype("float32"))
    labels = torch.from_numpy(split.train_labels.copy())
    steps = math.ceil(len(pixels) / BATCH)
    for epoch in range(epochs):
        started, total = time.perf_counter(), 0.0
        order = torch.randperm(len(pixels), generator=generator)
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            rate = PEAK_LEARNING_RATE * learning_rate(epoch + (step + 1) / steps, epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            images = augment(pixels[chosen], generator)
            scores = network(normalize(images).to(memory_format=torch.channels_last))
            loss = functional.cross_entropy(scores, labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() * len(chosen)
        elapsed = time.perf_counter() - started
        print(
            f"epoch {epoch + 1}/{epochs}: training loss {total / len(pixels):.4f}, {elapsed:.1f} s",
            flush=True,
        )
    return network.to(memory_format=torch.contiguous_format).eval()


def correct_predictions(network: nn.Module, split: DigitsSplit) -> int:
    """Test images whose highest score is their label's."""
    inputs = torch.from_numpy(DIGITS_PREPROCESSING.apply(split.test_images))
    with torch.inference_mode():
        predicted = torch.cat([network(part).argmax(1) for part in torch.split(inputs, 100)])
    return int((predicted.numpy() == split.test_labels).sum())


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share `correct / total` (Wilson 1927), as two fractions."""
    share = correct / total
    centre = share + z * z / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def split_digest(split: DigitsSplit) -> str:
    """SHA-256 over all four arrays' bytes: which images the figures were measured on."""
    digest = hashlib.sha256()
    for array in (split.train_images, split.train_labels, split.test_images, split.test_labels):
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(network: nn.Module, output: Path, metadata: dict[str, str]) -> None:
    """Write the state dict with its metadata; the file appears whole or not at all."""
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(serialized(state, metadata))
    partial.replace(output)


def main(arguments: list[str] | None = None) -> None:
    """Train, test once, save."""
    parser = argparse.ArgumentParser(description="Train the demo network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="part of the recipe: sums round")
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.threads < 1:
        parser.error("--epochs and --threads must be 1 or more")

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    split = load_digits_split()
    network = train(split, options.epochs, options.seed)
    correct, total = correct_predictions(network, split), len(split.test_labels)
    low, high = wilson_interval(correct, total)
    save(
        network,
        options.output,
        {
            "accuracy": f"{correct / total:.6f}",
            "accuracy_interval": f"{low:.6f} {high:.6f}",
            "correct": str(correct),
            "test_images": str(total),
            "split_sha256": split_digest(split),
            "epochs": str(options.epochs),
            "seed": str(options.seed),
            "threads": str(options.threads),
            "torch": torch.__version__,
        },
    )
    print(
        f"test accuracy {100 * correct / total:.1f} % ({correct} of {total}; "
        f"95 % interval {100 * low:.1f} to {100 * high:.1f} %), saved in {options.output}"
    )


if __name__ == "__main__":
    main()
