"""A whole torchvision network with sparse layers, end to end, in every runtime that works here.

    python -m obc_deploy.benchmarks.sparse_network --network resnet50 --scheme block4@0.9+w8a8

Speed depends on where the zeros are and not on the other weights: weights are random, pruned by
magnitude, rounded to nearest, and nothing is said of accuracy. The first convolution and the last
layer keep their weights, in 8 bits where the others have them. All networks are timed in one
interleaved run. Writes `results/sparse-<network>-<scheme>` as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from obc_deploy.benchmarks.comparison import benchmark
from obc_deploy.benchmarks.measurement import Measurement
from obc_deploy.benchmarks.record import RESULTS, say_stages, take_record
from obc_deploy.benchmarks.statistics import speedup
from obc_deploy.benchmarks.table import markdown_table, times
from obc_deploy.errors import ObcDeployError
from obc_deploy.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from obc_deploy.calibrated import Stage
    from obc_deploy.compression import CompressedModel

EDGES = {True: "w8a8", False: "dense"}
"""Scheme of the first and the last layer, by whether the others are quantized."""
SAMPLES = 16


def torchvision_network(name: str, *, size: int, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A torchvision network with random weights, and random images.

    Args:
        name: torchvision's.
        size: of the square images (`SAMPLES`, 3, size, size).
        seed: of both.
    """
    import torch
    import torchvision

    torch.manual_seed(seed)
    network = torchvision.models.get_model(name, weights=None).eval()
    return network, torch.randn(SAMPLES, 3, size, size)


def pruned_by_magnitude(
    network: torch.nn.Module,
    samples: torch.Tensor,
    scheme: str,
    *,
    source: str,
    progress: Stage | None = None,
) -> CompressedModel:
    """A network of the speed that `scheme` gives it; its accuracy means nothing.

    Args:
        network: in eval mode.
        samples: for calibration, (samples, *input).
        scheme: of all layers but the first and the last.
        source: what the network is called.
        progress: told of what is done.
    """
    from obc_deploy.calibrated import calibrate
    from obc_deploy.compression import compress

    calibrated = calibrate(network, samples, source=source, batch_size=8)
    names = [layer.name for layer in calibrated.layers]
    edges = EDGES[Scheme.parse(scheme).quantization is not None]
    return compress(
        calibrated, scheme=scheme, method="magnitude", target="ort-sparse",
        layer_schemes=dict.fromkeys((names[0], names[-1]), edges), fallback=edges,
        progress=progress,
    )  # fmt: skip


def comparisons(rows: Sequence[Measurement]) -> list[tuple[str, str, float]]:
    """Our sparse network beside what else was timed: runtime, variant, how many times faster it is.

    Args:
        rows: one interleaved run's; one of them is compressed and for "ort-sparse".
    """
    ours = next(row for row in rows if row.runtime == "ort-sparse" and row.role == "compressed")
    after = [worker.rounds for worker in ours.processes]
    return [
        (row.runtime, row.variant, speedup([worker.rounds for worker in row.processes], after))
        for row in rows
        if row is not ours and row.error is None and len(row.processes) == len(after)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compress, export, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet50", help="torchvision name")
    parser.add_argument("--scheme", default="block4@0.9+w8a8")
    parser.add_argument("--runtime", action="append", help="target; all that work where not given")
    parser.add_argument("--size", type=int, default=224, help="of the square image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    record = take_record("sparse_network")
    say = say_stages()

    try:
        network, samples = torchvision_network(
            options.network, size=options.size, seed=options.seed
        )
        made = pruned_by_magnitude(
            network, samples, options.scheme, source=options.network, progress=say
        )
        rows = benchmark(
            [made], runtimes=options.runtime, threads=options.threads, rounds=options.rounds,
            batch_size=options.batch_size, samples_per_round=5, processes=2, time_budget_s=60.0,
            seed=options.seed, progress=say,
        )  # fmt: skip
    except ObcDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    faster = comparisons(rows)
    lines = "\n".join(
        f"- {times(ratio)} over `{variant}` in {runtime}" for runtime, variant, ratio in faster
    )
    text = (
        f"# {options.network} with {options.scheme}\n\n{record.head}, {options.threads} thread, "
        f"batch {options.batch_size}, {options.size} pixels, random weights.\n\n"
        f"{markdown_table(rows)}\n\nThe compressed network in ort-sparse, beside all others of the "
        f"run (medians of ratios within rounds):\n\n{lines}\n"
    )
    kept = [
        row.model_dump(mode="json", exclude={"latency_ms": {"samples"}, "end_to_end": {"samples"}})
        for row in rows
    ]
    scheme = re.sub(r"[^a-z0-9.]+", "-", options.scheme)
    record.write(
        options.output, f"sparse-{options.network}-{scheme}".replace("_", "-"),
        {"measurements": kept, "faster_than": faster}, text,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
