"""What calibration costs beside what it cannot do without: forward passes and products X Xᵀ.

    python -m obc_deploy.benchmarks.calibration --network resnet18 --images 1024 --size 64

Random images through a torchvision network with random weights: values do not change the time.
Writes `results/calibration-<network>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obc_deploy.benchmarks.record import RESULTS, take_record
from obc_deploy.calibrated import calibrate
from obc_deploy.calibration import collect_hessians
from obc_deploy.data import Batches, Samples
from obc_deploy.layers import Layer, input_vectors


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class _VectorCounts:
    """Vectors of each layer in one batch, seen by running it."""

    def __init__(self, module: torch.fx.GraphModule, layers: tuple[Layer, ...]) -> None:
        self._sites = {site: layer for layer in layers for site in layer.call_sites}
        self.counts: dict[str, int] = {}
        self._module = module

    def run(self, batch: Tensor) -> dict[str, int]:
        counts = self.counts
        sites = self._sites

        class Watcher(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                layer = sites.get(n.name)
                if layer is not None:
                    arguments, _ = self.fetch_args_kwargs_from_env(n)
                    seen = sum(v.shape[-1] for v in input_vectors(layer, arguments[0]))
                    counts[layer.name] = counts.get(layer.name, 0) + seen
                return super().run_node(n)

        with torch.no_grad():
            Watcher(self._module).run(batch)
        return counts


def measure(network: str, *, images: int, size: int, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of calibration, of the forward passes and of the products, in turn."""
    import torchvision

    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, 3, size, size, generator=generator).numpy()
    model = torchvision.models.get_model(network, weights=None).eval()
    calibrated = calibrate(model, Samples({"images": pixels}), batch_size=batch, device="cpu")
    module, layers = calibrated.network.module, calibrated.layers
    batches = Batches(calibrated.samples, batch)

    def forward() -> None:
        with torch.no_grad():
            for tensors in batches:
                module(*tensors)

    first = next(iter(batches))[0]
    counts = _VectorCounts(module, layers).run(first)
    columns = {
        layer.name: torch.rand(layer.groups, layer.cols, counts[layer.name], generator=generator)
        for layer in layers
    }

    def products() -> None:
        for _ in range(len(batches)):
            for x in columns.values():
                x @ x.transpose(1, 2)

    def hessians() -> None:
        collect_hessians(calibrated.network, layers, batches, visit=lambda *_: None)

    parts = {"forward": forward, "products": products, "calibration": hessians}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            seconds[name].append(_seconds(part))
    needed = [f + p for f, p in zip(seconds["forward"], seconds["products"], strict=True)]
    ratios = [c / n for c, n in zip(seconds["calibration"], needed, strict=True)]
    return {"seconds": seconds, "ratio": statistics.median(ratios), "layers": len(layers)}


def main(arguments: list[str] | None = None) -> int:
    """Measure one network and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    measured = measure(
        options.network, images=options.images, size=options.size, batch=options.batch,
        repeats=options.repeats,
    )  # fmt: skip
    record = take_record("calibration")
    rows = "\n".join(
        f"| {name} | {statistics.median(times):.2f} | {', '.join(f'{t:.2f}' for t in times)} |"
        for name, times in measured["seconds"].items()
    )
    text = (
        f"# Calibration of {options.network}\n\n{record.head}, "
        f"{torch.get_num_threads()} threads; {options.images} images of {options.size}x"
        f"{options.size}, {measured['layers']} layers.\n\n"
        f"| part | median, s | all, s |\n|---|---|---|\n{rows}\n\n"
        f"Calibration takes **{measured['ratio']:.2f} times** the forward passes and the products "
        "alone.\n"
    )
    name = f"calibration-{options.network.replace('_', '-')}"
    record.write(options.output, name, {"threads": torch.get_num_threads()} | measured, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
