"""What a set of timings says, and how sure it is.

Timings of one worker process resemble each other (memory layout), and so do those of one round
(clock frequency, neighbours on the machine). Samples are therefore kept as

    workers -> rounds -> samples, all in ms

and a bootstrap resamples in that order: whole workers, then rounds of a worker, then samples of a
round. Resampling single samples alone would call an interval narrow that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from obc_deploy.errors import MeasurementError

Floats: TypeAlias = npt.NDArray[np.float64]
Workers: TypeAlias = Sequence[Sequence[Sequence[float]]]
"""Samples in ms: worker processes, each a sequence of rounds, each a sequence of samples."""

Interval: TypeAlias = tuple[float, float]

DEFAULT_LEVEL = 0.95
DEFAULT_RESAMPLES = 2000

ENOUGH_SAMPLES = 30
"""Below this a median's interval is a guess."""
WIDE_SPREAD = 1.25
"""p90 / p50 above which a machine counts as noisy."""
DRIFT = 0.10
"""Relative change of the median between halves, or between workers, that is worth a warning."""
TWO_MODES_EXPLAIN = 0.85
"""Share of variance that two clusters must explain to be called two modes.

The best split of a normal distribution explains 0.64, of a uniform one 0.75.
"""

_CHUNK = 4_000_000
"""Resampled values that are held at once."""


def percentile(samples: Iterable[float], percent: float) -> float:
    """The sample below which `percent` of 100 lie, linear between neighbours.

    Raises:
        MeasurementError: no samples, or one that is not finite.
    """
    return float(np.percentile(_finite(samples), percent))


def median(samples: Iterable[float]) -> float:
    """The middle sample, or the mean of the two middle ones."""
    return percentile(samples, 50.0)


def flatten(workers: Workers) -> list[float]:
    """All samples, in the order in which they were taken within each worker."""
    return [sample for rounds in workers for samples in rounds for sample in samples]


def speedup(baseline: Workers, candidate: Workers) -> float:
    """The median over rounds of median(baseline) / median(candidate): above 1 is faster.

    A machine that changes its speed in between slows a whole round, and its ratio stays: so ratios
    are taken within rounds. Timings that were not interleaved, of other numbers of workers or
    rounds, have no such pairs: they are compared by their medians altogether.

    Raises:
        MeasurementError: no samples, or a sample that is not finite or not positive.
    """
    if _shape(baseline) != _shape(candidate):
        return _ratio(median(flatten(baseline)), median(flatten(candidate)))
    pairs = zip(_round_medians(baseline), _round_medians(candidate), strict=True)
    return median(_ratio(before, after) for before, after in pairs)


def _round_medians(workers: Workers) -> list[float]:
    return [median(samples) for rounds in workers for samples in rounds]


def speedup_interval(
    baseline: Workers,
    candidate: Workers,
    *,
    level: float = DEFAULT_LEVEL,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile-bootstrap interval of `speedup`.

    Workers are drawn with replacement, then rounds of each drawn worker, then samples of each drawn
    round. Where both were measured in the same number of workers and rounds they were interleaved,
    and the draws of workers and rounds are shared. Rounds weigh the same whatever their number of
    samples.

    Args:
        baseline: workers -> rounds -> ms.
        candidate: workers -> rounds -> ms.
        level: probability that the interval is made for, between 0 and 1.
        resamples: number of bootstrap draws.
        seed: the draws' seed; the same seed gives the same interval.

    Raises:
        MeasurementError: no samples, a sample that is not finite or not positive, or a level
            outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise MeasurementError(f"interval level {level:g} is not between 0 and 1 (use 0.95)")
    generator = np.random.default_rng(seed)
    shape_before, shape_after = _shape(baseline), _shape(candidate)
    before, after = _Resampler(baseline), _Resampler(candidate)
    step = max(1, _CHUNK // max(before.drawn, after.drawn))
    ratios: list[Floats] = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        draws = before.draw_rounds(generator, count)
        if shape_before == shape_after:
            paired = before.round_medians(generator, *draws) / after.round_medians(
                generator, *draws
            )
            ratios.append(np.median(paired, axis=1))
            continue
        others = after.draw_rounds(generator, count)
        ratios.append(before.medians(generator, *draws) / after.medians(generator, *others))
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(np.concatenate(ratios), [tail, 100.0 - tail])
    return float(low), float(high)


class _Resampler:
    """The samples of one candidate, laid out for draws of many resamples at once."""

    def __init__(self, workers: Workers) -> None:
        rounds = [[_positive(samples) for samples in worker] for worker in workers]
        self.workers = len(rounds)
        self.rounds = np.array([len(worker) for worker in rounds])
        if self.workers == 0 or not self.rounds.all():
            raise MeasurementError("no samples to make an interval of; measure at least one round")
        widest = int(self.rounds.max())
        self.starts = np.zeros((self.workers, widest), dtype=np.int64)
        self.sizes = np.ones((self.workers, widest), dtype=np.int64)
        position = 0
        for worker, own in enumerate(rounds):
            for index, samples in enumerate(own):
                self.starts[worker, index] = position
                self.sizes[worker, index] = samples.size
                position += samples.size
        self.samples = np.concatenate([samples for own in rounds for samples in own])
        self.samples_per_round = max(samples.size for own in rounds for samples in own)
        self.drawn = self.workers * widest * self.samples_per_round

    def draw_rounds(
        self, generator: np.random.Generator, count: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Indices of workers (count, workers, 1) and of their rounds (count, workers, rounds)."""
        workers = generator.integers(0, self.workers, size=(count, self.workers, 1))
        uniform = generator.random((count, self.workers, int(self.rounds.max())))
        return workers, (uniform * self.rounds[workers]).astype(np.int64)

    def medians(
        self,
        generator: np.random.Generator,
        workers: npt.NDArray[np.int64],
        rounds: npt.NDArray[np.int64],
    ) -> Floats:
        """Median of each resample, (count,)."""
        drawn = self._draw(generator, workers, rounds)
        medians: Floats = np.median(drawn.reshape(len(drawn), -1), axis=1)
        return medians

    def round_medians(
        self,
        generator: np.random.Generator,
        workers: npt.NDArray[np.int64],
        rounds: npt.NDArray[np.int64],
    ) -> Floats:
        """Median of each drawn round, (count, workers · rounds)."""
        medians: Floats = np.median(self._draw(generator, workers, rounds), axis=-1)
        return medians.reshape(len(medians), -1)

    def _draw(
        self,
        generator: np.random.Generator,
        workers: npt.NDArray[np.int64],
        rounds: npt.NDArray[np.int64],
    ) -> Floats:
        """Samples (count, workers, rounds, samples) of drawn rounds."""
        starts = self.starts[workers, rounds][..., None]
        sizes = self.sizes[workers, rounds][..., None]
        uniform = generator.random((*rounds.shape, self.samples_per_round))
        drawn: Floats = self.samples[starts + (uniform * sizes).astype(np.int64)]
        return drawn


def wilson_interval(correct: int, count: int, *, level: float = DEFAULT_LEVEL) -> Interval:
    """Wilson's score interval of a share, such as an accuracy of `correct` of `count` samples.

    Stays within 0 and 1 and is of use near them, where the normal approximation is not.

    Raises:
        MeasurementError: `count` is not positive, or `correct` is not within 0 and `count`.
    """
    if count < 1 or not 0 <= correct <= count:
        raise MeasurementError(
            f"{correct} correct of {count} samples is no accuracy; evaluate on at least one sample"
        )
    if not 0.0 < level < 1.0:
        raise MeasurementError(f"interval level {level:g} is not between 0 and 1 (use 0.95)")
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share = correct / count
    scale = 1.0 + z * z / count
    centre = (share + z * z / (2.0 * count)) / scale
    half = z / scale * math.sqrt(share * (1.0 - share) / count + z * z / (4.0 * count * count))
    # At the ends the bound is the share itself; rounding must not push it past.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == count else min(1.0, centre + half)
    return low, high


_NOISE = ("only ", "noisy:", "drift:", "two speeds:", "worker processes", "cannot tell")


def is_noise(message: str) -> bool:
    """Whether a warning is about the timings' spread, not about what was measured."""
    return message.startswith(_NOISE)


def noise_warnings(workers: Workers, *, enough: int = ENOUGH_SAMPLES) -> list[str]:
    """What makes these timings less than trustworthy, each with its figure and its remedy.

    Looks for too few samples, a wide spread, a drift from the first to the second half, two modes,
    and worker processes that disagree. An empty list means none of these.
    """
    samples = _positive(flatten(workers))
    messages: list[str] = []
    middle, high = (float(value) for value in np.percentile(samples, [50, 90]))
    if samples.size < enough:
        messages.append(
            f"only {samples.size} sample{'s' * (samples.size != 1)}: fewer than {enough} make the "
            "percentiles a guess; take more rounds or more samples a round"
        )
    if samples.size < 4:
        return messages
    if high > WIDE_SPREAD * middle:
        messages.append(
            f"noisy: p90 is {high / middle:.2f} times p50 ({high:.3g} against {middle:.3g} ms); "
            "stop other work on this machine, pin fewer threads than it has cores, or take more "
            "rounds"
        )
    messages.extend(_drift(workers))
    modes = _two_modes(samples)
    if modes is not None:
        low, upper, share = modes
        messages.append(
            f"two speeds: {share:.0%} of the samples lie near {upper:.3g} ms, the others near "
            f"{low:.3g} ms; look for a changing clock frequency or a neighbour on the machine, "
            "and do not trust the median alone"
        )
    middles = [median(flatten([worker])) for worker in workers if flatten([worker])]
    if len(middles) > 1 and max(middles) > (1.0 + DRIFT) * min(middles):
        messages.append(
            f"worker processes disagree: their medians run from {min(middles):.3g} to "
            f"{max(middles):.3g} ms; start more of them, so that the luck of one process's memory "
            "layout averages out"
        )
    return messages


def _drift(workers: Workers) -> list[str]:
    """A change of speed within the workers, between the first and the second half of each."""
    early: list[float] = []
    late: list[float] = []
    for worker in workers:
        own = flatten([worker])
        early.extend(own[: len(own) // 2])
        late.extend(own[(len(own) + 1) // 2 :])
    if len(early) < 8:
        return []
    first, second = median(early), median(late)
    # Two medians differ by chance too: ask for more than about three standard errors, estimated
    # from the quartiles (1.35 standard deviations apart for a normal distribution).
    spread = max(
        float(np.subtract(*np.percentile(early, [75, 25]))),
        float(np.subtract(*np.percentile(late, [75, 25]))),
    )
    chance = 3.0 * 1.2533 * (spread / 1.349) * math.sqrt(2.0 / len(early))
    if abs(second - first) <= max(DRIFT * first, chance):
        return []
    return [
        f"drift: the median went from {first:.3g} ms in the first half to {second:.3g} ms in the "
        "second; warm up longer, and let the machine reach a steady temperature and load"
    ]


def _two_modes(samples: Floats) -> tuple[float, float, float] | None:
    """The two centres and the share of the upper one, where two clusters explain the samples."""
    ordered = np.sort(samples)
    ordered = ordered[: max(1, int(0.98 * ordered.size))]
    size = ordered.size
    if size < 20:
        return None
    variance = float(ordered.var())
    if variance <= 0.0:
        return None
    below = np.arange(1, size)
    sums = np.cumsum(ordered)
    low = sums[:-1] / below
    upper = (sums[-1] - sums[:-1]) / (size - below)
    share = below / size
    between = share * (1.0 - share) * (upper - low) ** 2
    best = int(np.argmax(between))
    if (
        between[best] < TWO_MODES_EXPLAIN * variance
        or not 0.1 <= share[best] <= 0.9
        or upper[best] < (1.0 + DRIFT) * low[best]
    ):
        return None
    above = float(np.mean(samples > ordered[best]))
    return float(low[best]), float(upper[best]), above


def _shape(workers: Workers) -> tuple[int, ...]:
    return tuple(len(rounds) for rounds in workers)


def _ratio(baseline: float, candidate: float) -> float:
    if not (baseline > 0.0 and candidate > 0.0):
        raise MeasurementError(
            f"latencies {baseline:g} and {candidate:g} ms give no speedup; both must be above 0"
        )
    return baseline / candidate


def _finite(samples: Iterable[float]) -> Floats:
    values = np.asarray(list(samples), dtype=np.float64)
    if values.size == 0:
        raise MeasurementError("no samples to summarize; measure at least one")
    if not np.isfinite(values).all():
        raise MeasurementError("a sample is not a finite number; drop it and measure again")
    return values


def _positive(samples: Iterable[float]) -> Floats:
    values = _finite(samples)
    if values.min() <= 0.0:
        raise MeasurementError(
            f"a latency of {values.min():g} ms is not above 0; measure with a finer clock"
        )
    return values
