"""Measurements: their JSON, their baselines, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timings import measured, one_run, workers_around

from obc_deploy.benchmarks.measurement import (
    Latency,
    Measurement,
    WorkerSamples,
    measurement,
    read_measurements,
    with_speedups,
    write_measurements,
)
from obc_deploy.errors import ArtifactError, MeasurementError

PROMISED_KEYS = {
    "variant", "scheme", "runtime", "threads", "accuracy", "agreement", "macs", "bops",
    "bit_operations", "size_bytes", "latency_ms", "end_to_end_ms", "speedup_vs_dense_fp32",
    "speedup_vs_dense_int8", "predicted_speedup", "layers_accelerated", "layers_total", "warnings",
}  # fmt: skip


def test_json_has_every_promised_key(tmp_path):
    rows = with_speedups(one_run())
    path = write_measurements(tmp_path / "measurements.json", rows)
    found = json.loads(path.read_text())
    assert [row["variant"] for row in found] == [row.variant for row in rows]
    for row in found:
        assert row.keys() >= PROMISED_KEYS
        assert row["latency_ms"].keys() == {"p50", "p90", "p99", "samples"}
        assert row["predicted_speedup"].keys() == {"macs", "bops"}
        assert len(row["latency_ms"]["samples"]) == 80
        assert len(row["warmup_ms"]) == 2
        assert row["end_to_end_ms"] == row["end_to_end"]["p50"]
        assert isinstance(row["end_to_end_ms"], float)
        assert row["batch_size"] == 1
    assert read_measurements(path) == rows
    assert list(tmp_path.iterdir()) == [path]


def test_percentiles_are_numpys_and_samples_are_raw():
    workers = workers_around(3.0)
    row = measured("dense", "dense", "dense-fp32", 3.0)
    row = measurement(variant="v", scheme="dense", runtime="r", processes=workers)
    assert row.latency_ms is not None
    raw = np.array([worker.rounds for worker in workers]).ravel()
    np.testing.assert_allclose(row.latency_ms.samples, raw, atol=1e-6)
    expected = np.percentile(raw, [50, 90, 99])
    np.testing.assert_allclose(
        [row.latency_ms.p50, row.latency_ms.p90, row.latency_ms.p99], expected, atol=1e-6
    )
    assert row.rounds == tuple(worker.rounds for worker in workers)


def test_speedups_are_against_the_same_runtime():
    rows = with_speedups([*one_run("onnxruntime", 2.0), *one_run("deepsparse", 1.0)])
    found = {(row.runtime, row.variant): row for row in rows}
    for runtime, ratio in (("onnxruntime", 4.0), ("deepsparse", 8.0)):
        row = found[runtime, "block4@0.9+w8a8"]
        assert row.speedup_vs_dense_fp32 == pytest.approx(ratio, rel=0.02)
        assert row.speedup_vs_dense_int8 == pytest.approx(ratio / 2, rel=0.02)
        low, high = row.speedup_vs_dense_fp32_interval
        assert low <= row.speedup_vs_dense_fp32 <= high
        assert high - low < 0.1 * ratio
        assert found[runtime, "dense fp32"].speedup_vs_dense_fp32 == 1.0
        assert found[runtime, "dense fp32"].speedup_vs_dense_int8 == pytest.approx(0.5, rel=0.02)
        assert found[runtime, "dense w8a8"].speedup_vs_dense_int8 == 1.0


def test_slower_than_dense_is_said():
    rows = {row.variant: row for row in with_speedups(one_run())}
    slow = rows["unstructured@0.9"]
    assert slow.slower_than_dense
    assert any("slower than dense fp32 in onnxruntime: 0.50x" in text for text in slow.warnings)
    assert any("slower than dense int8 in onnxruntime: 0.25x" in text for text in slow.warnings)
    same = rows["2:4+w8a8"]
    assert not same.slower_than_dense
    assert any("cannot tell faster from slower" in text for text in same.warnings)
    fast = rows["block4@0.9+w8a8"]
    assert not fast.slower_than_dense
    assert not fast.warnings
    # A dense network is slower than another dense one by nature: nobody asked it to be fast.
    assert not rows["dense fp32"].slower_than_dense
    assert not rows["dense fp32"].warnings


def test_speedups_can_be_taken_twice():
    once = with_speedups(one_run())
    assert with_speedups(once) == once


def test_without_a_baseline_or_timings_there_is_no_speedup():
    dense, _, compressed, *_ = one_run()
    failed = Measurement(variant="broken", scheme="w4", runtime="onnxruntime", error="crashed")
    rows = with_speedups([dense, compressed, failed])
    assert rows[1].speedup_vs_dense_fp32 is not None
    assert rows[1].speedup_vs_dense_int8 is None
    assert rows[1].speedup_vs_dense_int8_interval is None
    assert rows[2].speedup_vs_dense_fp32 is None
    for other in ({"threads": 2}, {"batch_size": 8}, {"runtime": "deepsparse"}):
        elsewhere = compressed.model_copy(update=other)
        assert with_speedups([dense, elsewhere])[1].speedup_vs_dense_fp32 is None, other


def test_two_baselines_are_refused():
    dense = one_run()[0]
    with pytest.raises(MeasurementError, match=r"'dense fp32' and 'again'.*keep one"):
        with_speedups([dense, dense.model_copy(update={"variant": "again"})])


def test_accuracy_has_its_interval_and_predictions_come_from_costs():
    row = measured("v", "2:4+w8a8", "compressed", 1.0)
    assert row.accuracy_interval == pytest.approx((0.9485, 0.9827), abs=1e-3)
    assert row.predicted_speedup is not None
    assert (row.predicted_speedup.macs, row.predicted_speedup.bops) == (2.0, 8.0)
    assert (row.macs, row.bops, row.bit_operations) == (500_000, 4_000_000, 32_000_000)


def test_noise_is_warned_of():
    workers = workers_around(1.0, noise=0.5)
    row = measurement(variant="v", scheme="w4", runtime="r", processes=workers, warnings=["first"])
    assert row.warnings[0] == "first"
    assert any(text.startswith("noisy") for text in row.warnings)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"accuracy": 97.0}, "accuracy"),
        ({"agreement": float("nan")}, "agreement"),
        ({"threads": 0}, "threads"),
        ({"size_bytes": -1}, "size_bytes"),
        ({"layers_accelerated": 3, "layers_total": 2}, "3 of 2 layers"),
    ],
)
def test_impossible_values_are_refused_in_one_line(wrong, says):
    with pytest.raises(MeasurementError, match=says) as caught:
        measurement(variant="v", scheme="w4", runtime="r", **wrong)
    assert "'v' in r" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_times_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match=r"rounds|samples|finite"):
        WorkerSamples(rounds=((1.0, bad),))
    with pytest.raises(ValueError, match=r"samples|finite"):
        Latency.of([1.0, bad])


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Measurement,
        variant=st.text(),
        scheme=st.text(),
        runtime=st.text(),
        accuracy=st.none() | st.floats(0, 1),
        macs=st.none() | st.integers(0, 10**15),
        end_to_end_ms=st.none() | st.floats(1e-6, 1e6),
        speedup_vs_dense_fp32=st.none() | st.floats(1e-6, 1e6),
        warnings=st.lists(st.text()).map(tuple),
    )
)
def test_json_round_trip(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("round") / "measurements.json"
    if any("\ud800" <= letter <= "\udfff" for letter in repr(row)):
        return
    write_measurements(path, [row])
    assert read_measurements(path) == [row]
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "holds no measurements"),
        ("{}", "holds no measurements"),
        ('[{"variant": "v"}]', "scheme: Field required"),
    ],
)
def test_files_that_hold_none_are_refused(tmp_path, content, says):
    path = tmp_path / "measurements.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match=says) as caught:
        read_measurements(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_half_written(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="choose a writable place"):
        write_measurements(tmp_path / "taken", one_run())
    with pytest.raises(ArtifactError, match="choose a writable place"):
        write_measurements(tmp_path / "missing" / "measurements.json", one_run())
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
