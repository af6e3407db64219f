"""What a GPU benchmark has found so far, and what it could not find."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from obc_deploy.data import first_line
from obc_deploy.errors import ObcDeployError

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel

FLOAT_BITS = 16


@dataclass(frozen=True)
class Missing:
    """Something that has no time, and why.

    Attributes:
        what: part and case.
        reason: what is lacking, went wrong, or that the time was up.
    """

    what: str
    reason: str


@dataclass
class Findings:
    """What has been found so far.

    Attributes:
        ends: when the whole run is to be over, on the monotonic clock.
        seconds: the whole run's time.
        solver: a row a task and solver.
        products: a row a shape and kind.
        networks: a row a network and variant.
        engines: a row a network and variant that TensorRT ran.
        missing: what has no time.
    """

    ends: float
    seconds: float
    solver: list[dict[str, Any]] = field(default_factory=list)
    products: list[dict[str, Any]] = field(default_factory=list)
    networks: list[dict[str, Any]] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def has_time(self, what: str, share: float = 1.0) -> bool:
        """Whether something may start before that share of the time is over; else it is named."""
        if time.monotonic() < self.ends - (1.0 - share) * self.seconds:
            return True
        self.miss(what, "the time was up")
        return False

    def miss(self, what: str, reason: str) -> None:
        """Name what has no time."""
        self.missing.append(Missing(what, reason))

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """Name what fails instead of failing."""
        try:
            yield
        except (ObcDeployError, RuntimeError, NotImplementedError, AttributeError) as error:
            self.miss(what, f"{type(error).__name__}: {first_line(error)}")


def promised(model: CompressedModel, variant: str) -> dict[str, float]:
    """What MACs and BOPs promise over dense 16-bit floats."""
    sparse, integer = variant.startswith("2:4"), variant.endswith("int8")
    dense = macs = bops = 0.0
    for record in model.manifest.layers:
        left = record.macs * (record.density if sparse else 1.0)
        quantized = integer and record.weight_bits <= 8 and record.activation_bits <= 8
        dense += record.macs
        macs += left
        bops += left * (8 if quantized else FLOAT_BITS)
    return {"predicted_macs": dense / macs, "predicted_bops": FLOAT_BITS * dense / bops}


def repeated_inputs(model: CompressedModel, batch: int) -> dict[str, np.ndarray[Any, Any]]:
    """Calibration samples, repeated up to a batch, by input name."""
    sample = model.samples.arrays(0, 1 << 20)
    arrays = [np.ascontiguousarray(np.resize(a, (batch, *a.shape[1:]))) for a in sample]
    return dict(zip(model.network.input_names, arrays, strict=True))


def timed_row(
    model: CompressedModel,
    variant: str,
    rounds_ms: Sequence[float],
    with_copies_ms: Sequence[float],
    dense_ms: Sequence[float] | None,
) -> dict[str, Any]:
    """What a network's times come to, with what was promised.

    Args:
        model: what was timed.
        variant: its name.
        rounds_ms: a median a round.
        with_copies_ms: the same with inputs and outputs copied from and to the host.
        dense_ms: of the dense variant in the same rounds; None where it was not timed.
    """
    ratios = [d / t for d, t in zip(dense_ms, rounds_ms, strict=True)] if dense_ms else []
    return {
        "variant": variant,
        "ms": statistics.median(rounds_ms),
        "ms_with_copies": statistics.median(with_copies_ms),
        "rounds_ms": list(rounds_ms),
        "speedup": statistics.median(ratios) if ratios else None,
        **promised(model, variant),
    }
