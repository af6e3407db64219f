"""What regions gain: the same networks with our operators one by one, and joined.

    python -m obc_deploy.benchmarks.regions

Whole networks with sparse layers, exported for `ort-sparse`; the same file with its regions taken
apart is timed in turns with it, on one thread and on two. Speed depends on where the zeros are and
not on the other weights: layers are pruned by magnitude, the torchvision networks' weights are
random, and nothing is said of accuracy. Outputs must be the same, bit for bit. Writes
`results/regions` as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.benchmarks.record import RESULTS, say_stages, take_record
from obc_deploy.benchmarks.reference_networks import REFERENCE_NETWORKS, SHARED_VARIABLE
from obc_deploy.benchmarks.sparse_network import SAMPLES, pruned_by_magnitude, torchvision_network
from obc_deploy.errors import MeasurementError, ObcDeployError

if TYPE_CHECKING:
    import torch

    from obc_deploy.benchmarks.timed_files import TimedFile

NETWORKS = (
    "fashion_cnn", "cifar10_resnet20", "cifar10_resnet32", "imagenet_mobilenet_v1_075",
    "torchvision:mobilenet_v2", "torchvision:resnet50",
)  # fmt: skip


def _network(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network, and images for it."""
    import torch

    from obc_deploy.benchmarks import reference_networks

    prefix, _, model = name.rpartition(":")
    if prefix:
        return torchvision_network(model, size=224, seed=0)
    shared = reference_networks.needed_shared_data()
    images, _ = reference_networks.load_images(name, "calib", shared, SAMPLES)
    return reference_networks.load_network(name, shared), torch.from_numpy(images)


def export_both(name: str, scheme: str, folder: Path) -> tuple[Path, Path]:
    """The network's file, and the one whose operators are nodes of their own.

    Args:
        name: one of `REFERENCE_NETWORKS`, or "torchvision:NAME".
        scheme: of all layers but the first and the last.
        folder: where they go.

    Raises:
        MeasurementError: none of its operators are joined.
    """
    from obc_deploy.runtimes.regions import separated_copy

    network, images = _network(name)
    made = pruned_by_magnitude(network, images, scheme, source=name)
    joined = made.export(folder / "joined.onnx", target="ort-sparse", check=False).path
    apart = folder / "apart"
    apart.mkdir()
    copy = separated_copy(joined, apart)
    if copy is None:
        raise MeasurementError(f"no operators of '{name}' with {scheme} are joined")
    return joined, copy


def _row(name: str, timed: Sequence[TimedFile]) -> dict[str, Any]:
    apart, joined = timed
    for each in timed:
        if each.error is not None:
            raise MeasurementError(f"'{name}': {each.error}")
    if joined.difference != 0.0:
        raise MeasurementError(f"the outputs of '{name}' change by {joined.difference} when joined")
    assert apart.latency_ms is not None
    assert joined.latency_ms is not None
    return {
        "network": name,
        "threads": joined.threads,
        "apart_ms": apart.latency_ms.p50,
        "joined_ms": joined.latency_ms.p50,
        "speedup": joined.speedup,
        "interval": joined.interval,
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| network | threads | nodes, ms | regions, ms | faster |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['network']} | {row['threads']} | {row['apart_ms']:.3f} | "
            f"{row['joined_ms']:.3f} | {row['speedup']:.2f}x ({low:.2f}-{high:.2f}) |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Export, time in turns, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network", action="append",
        help=f"torchvision:NAME, or one of {', '.join(REFERENCE_NETWORKS)} (these need "
        f"{SHARED_VARIABLE}); default {', '.join(NETWORKS)}",
    )  # fmt: skip
    parser.add_argument("--scheme", default="block4@0.9+w8a8")
    parser.add_argument("--threads", type=int, action="append", help="default 1 and 2")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    record = take_record("regions")
    say = say_stages()

    from obc_deploy.benchmarks.timed_files import FileInRuntime, time_files

    rows = []
    try:
        for name in options.network or NETWORKS:
            with tempfile.TemporaryDirectory(prefix="obc-regions-") as folder:
                say(f"export {name}", 0.0)
                joined, apart = export_both(name, options.scheme, Path(folder))
                for threads in options.threads or (1, 2):
                    say(f"time {name}, {threads} threads", 0.0)
                    timed = time_files(
                        [FileInRuntime(file, "onnxruntime") for file in (apart, joined)],
                        threads=threads, rounds=options.rounds, samples_per_round=20,
                        processes=3, time_budget_s=30.0,
                    )  # fmt: skip
                    rows.append(_row(name, timed))
    except ObcDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = (
        f"# Operators as nodes, and joined to regions\n\n{record.head}, batch 1, "
        f"{options.scheme}, pruned by magnitude. The same numbers, bit for bit; medians of paired "
        f"rounds, 95 % intervals.\n\n{_table(rows)}\n"
    )
    record.write(options.output, "regions", {"rows": rows}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
