"""Percentiles, intervals and noise warnings against SciPy, and on timings of known make."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from obc_deploy.benchmarks.statistics import (
    flatten,
    median,
    noise_warnings,
    percentile,
    speedup,
    speedup_interval,
    wilson_interval,
)
from obc_deploy.errors import MeasurementError

TIMES = st.floats(1e-3, 1e4)


def _timings(
    generator,
    *,
    middle=10.0,
    workers=3,
    rounds=4,
    samples=10,
    worker_noise=0.0,
    round_noise=0.0,
    noise=0.01,
):
    """Timings of a known median with noise at each level: workers -> rounds -> ms."""
    per_worker = generator.normal(0, worker_noise, (workers, 1, 1))
    per_round = generator.normal(0, round_noise, (workers, rounds, 1))
    per_sample = generator.normal(0, noise, (workers, rounds, samples))
    return (middle * np.exp(per_worker + per_round + per_sample)).tolist()


@given(st.lists(TIMES, min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_by_hand(samples, percent):
    ordered = sorted(samples)
    position = percent / 100 * (len(ordered) - 1)
    below = min(int(position), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    expected = ordered[below] + (position - below) * (ordered[above] - ordered[below])
    assert percentile(samples, percent) == pytest.approx(expected, rel=1e-9)


@given(st.lists(TIMES, min_size=1, max_size=50))
def test_percentiles_are_ordered_and_within(samples):
    p50, p90, p99 = (percentile(samples, percent) for percent in (50, 90, 99))
    slack = 1e-9 * max(samples)
    assert min(samples) - slack <= p50 <= p90 + slack
    assert p90 <= p99 + slack
    assert p99 <= max(samples) + slack


@given(correct=st.integers(0, 500), more=st.integers(0, 500), level=st.floats(0.5, 0.999))
def test_wilson_interval_is_scipys(correct, more, level):
    count = correct + more
    if count == 0:
        with pytest.raises(MeasurementError, match="at least one sample"):
            wilson_interval(correct, count)
        return
    low, high = wilson_interval(correct, count, level=level)
    expected = scipy.stats.binomtest(correct, count).proportion_ci(level, method="wilson")
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)
    assert 0.0 <= low <= correct / count <= high <= 1.0


def test_interval_without_structure_is_scipys():
    """One worker and one round leave a plain bootstrap of two samples."""
    generator = np.random.default_rng(5)
    before, after = generator.lognormal(2.0, 0.2, 60), generator.lognormal(1.5, 0.3, 80)
    expected = scipy.stats.bootstrap(
        (before, after),
        lambda x, y, axis: np.median(x, axis=axis) / np.median(y, axis=axis),
        n_resamples=20_000,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(6),
    ).confidence_interval
    found = speedup_interval([[before.tolist()]], [[after.tolist()]], resamples=20_000, seed=7)
    width = expected.high - expected.low
    assert found[0] == pytest.approx(expected.low, abs=0.08 * width)
    assert found[1] == pytest.approx(expected.high, abs=0.08 * width)


@pytest.mark.parametrize(
    ("worker_noise", "round_noise"), [(0.0, 0.0), (0.0, 0.03), (0.03, 0.0), (0.02, 0.02)]
)
def test_interval_covers_the_true_speedup(worker_noise, round_noise):
    """Of intervals made for 95 %, most hold the truth, wherever the noise comes from."""
    generator = np.random.default_rng(11)
    trials, held = 150, 0
    for trial in range(trials):
        noise = {"worker_noise": worker_noise, "round_noise": round_noise, "workers": 6}
        before = _timings(generator, middle=30.0, **noise)
        after = _timings(generator, middle=10.0, **noise)
        low, high = speedup_interval(before, after, resamples=300, seed=trial)
        held += low <= 3.0 <= high
    # Six workers are few for a bootstrap, so somewhat less than 95 % is to be expected.
    assert held / trials >= 0.86


def test_ignoring_rounds_would_be_overconfident():
    """What the structure is for: noise between rounds widens the interval, as it must."""
    generator = np.random.default_rng(3)
    before = _timings(generator, round_noise=0.05, noise=0.002)
    after = _timings(generator, round_noise=0.05, noise=0.002)
    low, high = speedup_interval(before, after)
    flat_low, flat_high = speedup_interval([[flatten(before)]], [[flatten(after)]])
    assert high - low > 1.5 * (flat_high - flat_low)


def test_a_slow_minute_that_hits_both_cancels():
    generator = np.random.default_rng(9)
    before = np.array(_timings(generator, workers=4, rounds=8, noise=0.003))
    after = np.array(_timings(generator, workers=4, rounds=8, noise=0.003)) / 2
    weather = generator.lognormal(0, 0.2, (4, 8, 1))
    paired = speedup_interval((before * weather).tolist(), (after * weather).tolist())
    # The same timings with one round missing cannot be paired.
    unpaired = speedup_interval((before * weather).tolist(), (after * weather)[:, 1:].tolist())
    assert paired[1] - paired[0] < 0.3 * (unpaired[1] - unpaired[0])
    assert paired[0] <= 2.0 <= paired[1]


ROUNDS = st.lists(st.lists(TIMES, min_size=1, max_size=4), min_size=1, max_size=3)
WORKERS = st.lists(ROUNDS, min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(before=WORKERS, after=WORKERS, scale=st.floats(0.1, 10))
def test_interval_properties(before, after, scale):
    """Ragged rounds work; the interval stays within the extremes, scales and repeats."""
    low, high = speedup_interval(before, after, resamples=50, seed=1)
    first, second = flatten(before), flatten(after)
    assert min(first) / max(second) * (1 - 1e-9) <= low <= high
    assert high <= max(first) / min(second) * (1 + 1e-9)
    assert (low, high) == speedup_interval(before, after, resamples=50, seed=1)
    scaled = [[[scale * sample for sample in own] for own in rounds] for rounds in before]
    assert speedup_interval(scaled, after, resamples=50, seed=1) == pytest.approx(
        (scale * low, scale * high), rel=1e-9
    )
    if [len(w) for w in before] == [len(w) for w in after]:
        pairs = zip(itertools.chain(*before), itertools.chain(*after), strict=True)
        expected = median([median(one) / median(other) for one, other in pairs])
    else:
        expected = median(first) / median(second)
    assert speedup(before, after) == pytest.approx(expected)


def test_a_machine_with_two_speeds_does_not_change_the_ratio():
    """Rounds run at one of two speeds; pooled medians fall on one or the other by chance."""
    generator = np.random.default_rng(2)
    pooled, paired = [], []
    for _ in range(40):
        speeds = generator.choice([1.0, 1.6], (2, 3, 6, 1), p=[0.55, 0.45])
        # The machine mostly stays at its speed while a round's candidates take turns.
        speeds[1] = np.where(generator.random((3, 6, 1)) < 0.8, speeds[0], speeds[1])
        before = (
            speeds[0] * np.array(_timings(generator, middle=20.0, workers=3, rounds=6))
        ).tolist()
        after = (
            speeds[1] * np.array(_timings(generator, middle=10.0, workers=3, rounds=6))
        ).tolist()
        pooled.append(abs(median(flatten(before)) / median(flatten(after)) - 2.0))
        paired.append(abs(speedup(before, after) - 2.0))
    assert max(paired) < 0.1
    assert np.mean(paired) < 0.3 * np.mean(pooled)


def test_many_resamples_are_drawn_in_pieces(monkeypatch):
    generator = np.random.default_rng(0)
    before, after = _timings(generator), _timings(generator, middle=5.0)
    whole = speedup_interval(before, after, resamples=4000)
    monkeypatch.setattr("obc_deploy.benchmarks.statistics._CHUNK", 5_000)
    assert speedup_interval(before, after, resamples=4000) == pytest.approx(whole, rel=5e-3)


@pytest.mark.parametrize(
    ("baseline", "says"),
    [
        ([], "no samples"),
        ([[]], "no samples"),
        ([[[]]], "no samples"),
        ([[[1.0, float("nan")]]], "not a finite"),
        ([[[1.0, 0.0]]], "0 ms is not above 0"),
        ([[[1.0, -2.0]]], "-2 ms is not above 0"),
    ],
)
def test_samples_that_say_nothing_are_refused(baseline, says):
    with pytest.raises(MeasurementError, match=says):
        speedup_interval(baseline, [[[1.0]]])


@pytest.mark.parametrize("level", [0.0, 1.0, 2.0, float("nan")])
def test_levels_that_mean_nothing_are_refused(level):
    with pytest.raises(MeasurementError, match="not between 0 and 1"):
        speedup_interval([[[1.0]]], [[[1.0]]], level=level)
    with pytest.raises(MeasurementError, match="not between 0 and 1"):
        wilson_interval(1, 2, level=level)


def test_quiet_timings_raise_no_warning():
    quiet = 0
    for seed in range(50):
        generator = np.random.default_rng(seed)
        quiet += not noise_warnings(_timings(generator, worker_noise=0.01, round_noise=0.01))
    assert quiet >= 48


@pytest.mark.parametrize(
    ("workers", "says"),
    [
        pytest.param(
            _timings(np.random.default_rng(0), workers=1, rounds=2, samples=6),
            "only 12 samples",
            id="few",
        ),
        pytest.param([[[1.0]]], "only 1 sample:", id="one"),
        pytest.param(_timings(np.random.default_rng(1), noise=0.4), "noisy: p90 is", id="spread"),
        pytest.param(
            [[[10.0 + 0.1 * i + 0.01 * (j % 3) for j in range(10)] for i in range(0, 40, 8)]] * 2,
            "drift: the median went from 10.",
            id="drift",
        ),
        pytest.param(
            [[[10.0 + 0.01 * j, 13.0 + 0.01 * j] * 5 for j in range(6)]],
            "two speeds: 50% of the samples lie near 13",
            id="two modes",
        ),
        pytest.param(
            [[[base + 0.01 * j for j in range(20)]] * 2 for base in (10.0, 12.0)],
            "worker processes disagree: their medians run from 10.1 to 12.1 ms",
            id="workers",
        ),
    ],
)
def test_trouble_is_named_with_its_figure(workers, says):
    messages = noise_warnings(workers)
    assert any(message.startswith(says) for message in messages), messages
    for message in messages:
        assert "\n" not in message
        assert "; " in message, "a warning names its remedy"


@given(WORKERS)
def test_warnings_never_fail(workers):
    assert all(isinstance(message, str) for message in noise_warnings(workers))
