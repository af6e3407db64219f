"""Interleaved timing with real ONNX Runtime workers, and the fitting of sample counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from obc_deploy.benchmarks import interleaving
from obc_deploy.benchmarks.interleaving import Candidate, EndToEnd, measure_interleaved
from obc_deploy.data import Preprocessing
from obc_deploy.errors import MeasurementError
from obc_deploy.runtimes.session import open_session

INPUT = np.ones((1, 3, 8, 8), dtype=np.float32)
RAW = EndToEnd({"x": np.full((1, 3, 8, 8), 200, dtype=np.uint8)}, Preprocessing(scale=1 / 255))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """One convolution and a mean: a network that takes microseconds."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("GlobalAveragePool", ["c"], ["m"]),
            helper.make_node("Flatten", ["m"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(INPUT.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path_factory.mktemp("artifact") / "small.onnx"
    onnx.save(model, path)
    return path


def _candidate(key, path, **more):
    return Candidate(key=key, runtime="onnxruntime", path=path, inputs={"x": INPUT}, **more)


@dataclass
class _Log:
    """What happened to real sessions, in order."""

    events: list = field(default_factory=list)
    pids: dict = field(default_factory=dict)
    kill: tuple | None = None

    def open(self, candidate):
        session = open_session(candidate.runtime, candidate.path, threads=1)
        self.pids.setdefault(candidate.key, []).append(session.pid)
        self.events.append(("open", candidate.key))
        return _Watched(session, candidate.key, self)


class _Watched:
    """A real session that notes when it is asked."""

    def __init__(self, session, key, log):
        self._session, self._key, self._log = session, key, log
        self.version, self.threads, self.facts = session.version, session.threads, session.facts

    def time(self, inputs, *, warmup, samples, end_to_end=None):
        kind = "time" if end_to_end is None else "end to end"
        self._log.events.append((kind, self._key))
        if self._log.kill == (self._key, self._log.events.count((kind, self._key))):
            os.kill(self._session.pid, signal.SIGKILL)
        return self._session.time(inputs, warmup=warmup, samples=samples, end_to_end=end_to_end)

    def close(self):
        self._log.events.append(("close", self._key))
        self._session.close()


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_sample_is_there_and_warmups_are_apart(artifact):
    shares = []
    found = measure_interleaved(
        [_candidate("a", artifact, end_to_end=RAW), _candidate("b", artifact)],
        rounds=3,
        samples_per_round=4,
        warmup=5,
        processes=2,
        progress=shares.append,
    )
    assert list(found) == ["a", "b"]
    for samples in found.values():
        assert samples.error is None
        assert not samples.warnings
        assert (samples.threads, samples.version) == (1, version("onnxruntime"))
        assert len(samples.workers) == 2
        # So fast a network gets more samples than were asked for.
        assert 4 < samples.samples_per_round <= 4 * interleaving.MAX_GROWTH
        for worker in samples.workers:
            assert [len(times) for times in worker.rounds] == [samples.samples_per_round] * 3
            assert len(worker.warmup_ms) == 5 + 3 * interleaving.REWARM
            assert all(time > 0 for times in worker.rounds for time in times)
    for worker in found["a"].workers:
        half = -(-found["a"].samples_per_round // 2)
        assert [len(times) for times in worker.end_to_end_rounds] == [half] * 3
        assert len(worker.end_to_end_warmup_ms) == interleaving.PILOT_SAMPLES + 3
    assert not any(worker.end_to_end_rounds for worker in found["b"].workers)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_rounds_are_interleaved_in_changing_order_by_fresh_workers(artifact):
    keys = ["a", "b", "c"]
    orders = []
    for _ in range(2):
        log = _Log()
        measure_interleaved(
            [_candidate(key, artifact) for key in keys],
            rounds=5,
            samples_per_round=1,
            warmup=0,
            processes=2,
            seed=4,
            open_session=log.open,
        )
        opened = [key for kind, key in log.events if kind == "open"]
        assert sorted(opened) == sorted(keys * 2)
        assert all(len(set(pids)) == 2 for pids in log.pids.values())
        assert not any(_alive(pid) for pids in log.pids.values() for pid in pids)
        # All workers of a generation are closed before the next one starts.
        first_close = next(i for i, (kind, _) in enumerate(log.events) if kind == "close")
        assert sorted(log.events[first_close : first_close + 3]) == [("close", k) for k in keys]
        timed = [key for kind, key in log.events if kind == "time"]
        rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
        assert len(rounds) == 2 * (1 + 5)
        assert all(sorted(order) == keys for order in rounds), "each candidate once a round"
        assert len(set(rounds)) > 2, "the order changes"
        orders.append(rounds)
    assert orders[0] == orders[1], "the same seed gives the same order"


def test_failed_candidates_leave_the_others_alone(artifact, tmp_path):
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(b"no graph")
    wrong = Candidate("wrong input", "onnxruntime", artifact, {"x": INPUT[:, :1]})
    unknown = Candidate("unknown", "no-such-runtime", artifact, {"x": INPUT})
    found = measure_interleaved(
        [
            _candidate("corrupt", corrupt),
            _candidate("good", artifact),
            _candidate("missing", tmp_path / "missing.onnx"),
            wrong,
            unknown,
        ],
        rounds=2,
        samples_per_round=2,
        processes=2,
    )
    for key in ("corrupt", "missing", "wrong input", "unknown"):
        assert found[key].error
        assert "\n" not in found[key].error
        assert not found[key].workers
    assert "corrupt.onnx" in found["corrupt"].error
    assert found["good"].error is None
    assert [len(worker.rounds) for worker in found["good"].workers] == [2, 2]


def test_a_worker_that_dies_keeps_what_it_measured(artifact):
    # The third request is the second round: one warm-up comes first.
    log = _Log(kill=("dying", 3))
    found = measure_interleaved(
        [_candidate("dying", artifact), _candidate("living", artifact)],
        rounds=4,
        samples_per_round=2,
        processes=2,
        open_session=log.open,
    )
    assert "SIGKILL" in found["dying"].error
    assert found["dying"].error.endswith("(worker 1 of 2)")
    assert [len(worker.rounds) for worker in found["dying"].workers] == [1]
    assert found["living"].error is None
    assert [len(worker.rounds) for worker in found["living"].workers] == [4, 4]
    assert len(log.pids["dying"]) == 1, "it is not started again"
    assert not any(_alive(pid) for pids in log.pids.values() for pid in pids)


def test_no_worker_outlives_an_interrupt(artifact):
    log = _Log()
    steps = []

    def interrupt(share):
        steps.append(share)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_interleaved(
            [_candidate("a", artifact), _candidate("b", artifact)],
            progress=interrupt,
            open_session=log.open,
        )
    assert len(log.pids) == 2
    assert not any(_alive(pid) for pids in log.pids.values() for pid in pids)


@given(
    one=st.floats(1e-3, 1e5),
    whole=st.none() | st.floats(1e-3, 1e5),
    wanted=st.integers(1, 50),
    rounds=st.integers(1, 50),
    budget=st.floats(0.1, 100),
)
def test_sample_counts_keep_the_budget(one, whole, wanted, rounds, budget):
    (count, end_to_end), warnings = interleaving._fit_samples(
        [one] * 3,
        [] if whole is None else [whole] * 3,
        samples_per_round=wanted,
        rounds=rounds,
        time_budget_s=budget,
    )
    least = min(interleaving.MIN_SAMPLES_PER_ROUND, wanted)
    assert least <= count <= wanted * interleaving.MAX_GROWTH
    assert (end_to_end == 0) == (whole is None)
    spent_s = rounds * (one * (count + interleaving.REWARM)) / 1000
    assert count == least or spent_s <= budget * (1 + 1e-9)
    assert bool(warnings) == (count < wanted)
    if count > wanted:
        # It grew only to make a round last, not beyond.
        assert one * (count - 1) < interleaving.MIN_ROUND_MS


@pytest.mark.parametrize(
    ("one", "expected"), [(0.5, 40), (0.01, 200), (5.0, 10), (500.0, 3), (100.0, 10)]
)
def test_sample_counts_by_hand(one, expected):
    """10 samples a round, 10 rounds, 20 s: 20 ms a round at least, 2 s a round at most."""
    (count, _), _ = interleaving._fit_samples(
        [one, one, 9 * one], [], samples_per_round=10, rounds=10, time_budget_s=20.0
    )
    assert count == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"samples_per_round": 0}, "samples_per_round is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"processes": 0}, "processes is 0"),
        ({"time_budget_s": 0.0}, "time_budget_s is 0"),
        ({"time_budget_s": float("nan")}, "time_budget_s is nan"),
    ],
)
def test_plans_that_measure_nothing_are_refused(artifact, arguments, says):
    with pytest.raises(MeasurementError, match=says):
        measure_interleaved([_candidate("a", artifact)], **arguments)


def test_keys_must_differ(artifact):
    with pytest.raises(MeasurementError, match="two candidates are called 'a'"):
        measure_interleaved([_candidate("a", artifact), _candidate("a", artifact)])


def test_nothing_to_measure_is_no_error():
    assert measure_interleaved([]) == {}


def test_import_is_light():
    code = (
        "import sys, obc_deploy.benchmarks.interleaving, obc_deploy.benchmarks.report; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'jinja2', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
