"""Independent against sequential mode: accuracy and output divergence on held-out images.

    python -m obc_deploy.benchmarks.sequential --network cifar10_resnet20

needs the trained networks and images that `reference_networks` describes. Each scheme is made in
both modes from the same calibration images, and run on test images in PyTorch, beside the dense
network. Writes `results/sequential-<network>.json` and the same as a table, `.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obc_deploy.benchmarks.record import RESULTS, take_record
from obc_deploy.benchmarks.reference_networks import load_network, load_samples, needed_shared_data
from obc_deploy.benchmarks.statistics import wilson_interval
from obc_deploy.benchmarks.table import percent
from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress
from obc_deploy.errors import ObcDeployError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from obc_deploy.data import Samples

SCHEMES = ("block4@0.7", "block4@0.8", "2:4", "w3")


@dataclass(frozen=True)
class Row:
    """One scheme in one mode.

    Attributes:
        scheme: its text.
        sequential: the mode.
        accuracy: top-1 share on the test images.
        interval: its 95 % Wilson interval.
        agreement: share of images in the dense network's class.
        divergence: mean KL divergence from the dense network's classes, nats.
        seconds: of compression; what the independent mode's schemes share counts in the first.
    """

    scheme: str
    sequential: bool
    accuracy: float
    interval: tuple[float, float]
    agreement: float
    divergence: float
    seconds: float

    @property
    def mode(self) -> str:
        """Its name in tables."""
        return "sequential" if self.sequential else "independent"


def log_probabilities(module: nn.Module, samples: Samples) -> Tensor:
    """(n, classes) float64 log-probabilities."""
    import torch

    with torch.no_grad():
        scores = [module(*batch) for batch in samples.batches(250)]
    return torch.cat(scores).double().log_softmax(1)


def compare(
    network: str, *, schemes: tuple[str, ...], fallback: str, calibration: int, images: int,
    seed: int,
) -> tuple[float, list[Row]]:  # fmt: skip
    """The dense network's accuracy, and every scheme in both modes.

    Raises:
        ObcDeployError: the networks are not here, or a scheme does not fit.
    """
    import torch

    shared = needed_shared_data()
    test = load_samples(network, "test", shared).take(images)
    assert test.labels is not None
    labels = torch.from_numpy(test.labels)
    calibrated = calibrate(
        load_network(network, shared), load_samples(network, "calib", shared), limit=calibration,
        source=network, batch_size=128, levels=schemes, seed=seed,
    )  # fmt: skip
    dense = log_probabilities(calibrated.network.module, test)
    rows = []
    for scheme in schemes:
        for sequential in (False, True):
            start = time.monotonic()
            made = compress(
                calibrated, scheme=scheme, fallback=fallback, sequential=sequential,
                baselines=False, seed=seed,
            )  # fmt: skip
            seconds = time.monotonic() - start
            found = log_probabilities(made.module(), test)
            right = int((found.argmax(1) == labels).sum())
            rows.append(
                Row(
                    scheme,
                    sequential,
                    right / len(labels),
                    wilson_interval(right, len(labels)),
                    float((found.argmax(1) == dense.argmax(1)).double().mean()),
                    float((dense.exp() * (dense - found)).sum(1).mean()),
                    seconds,
                )
            )
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return float((dense.argmax(1) == labels).double().mean()), rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| scheme | mode | accuracy, % | 95 % interval | dense class kept, % | KL, nats | "
        "compression, s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.scheme} | {row.mode} | {percent(row.accuracy)} | {percent(row.interval[0])} to "
        f"{percent(row.interval[1])} | {percent(row.agreement)} | {row.divergence:.4f} | "
        f"{row.seconds:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compare on one network and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="cifar10_resnet20")
    parser.add_argument("--scheme", action="append", help="may be given several times")
    parser.add_argument("--fallback", default="w8", help="scheme of layers that do not divide")
    parser.add_argument("--calibration", type=int, default=512, help="calibration images")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    record = take_record("sequential")
    try:
        accuracy, rows = compare(
            options.network,
            schemes=tuple(options.scheme or SCHEMES),
            fallback=options.fallback,
            calibration=options.calibration,
            images=options.images,
            seed=options.seed,
        )
    except ObcDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    results = {
        "network": options.network,
        "dense_accuracy": accuracy,
        "calibration": options.calibration,
        "images": options.images,
        "rows": [{"mode": row.mode, **vars(row)} for row in rows],
    }
    text = (
        f"# {options.network}: independent and sequential mode\n\n{record.head}, PyTorch, "
        f"{options.calibration} calibration and {options.images} test images; dense "
        f"{percent(accuracy)} %.\n\n{table(rows)}\n"
    )
    record.write(options.output, f"sequential-{options.network}".replace("_", "-"), results, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
