"""Networks whose dense and sparse layers take turns, and the cost that is laid on their changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from obc_deploy.benchmarks.latency import count_networks
from obc_deploy.benchmarks.mixed_networks import LONGEST_RUN, cost_of_a_change, mixed_networks
from obc_deploy.latency import TimedNetwork, neighbours
from obc_deploy.schemes import Scheme, changes_between
from obc_deploy.targets import DEEPSPARSE, ONNXRUNTIME_QOPERATOR

DENSE = Scheme.parse("w8a8")
SPARSE = [Scheme.parse(f"block4@{sparsity}+w8a8") for sparsity in (0.7, 0.8, 0.9)]
LEVELS = {"first": [DENSE], **{f"layer{n}": [DENSE, *SPARSE] for n in range(9)}, "last": [DENSE]}


def test_layers_take_turns_in_runs_of_each_length() -> None:
    found = mixed_networks(LEVELS)
    assert len(found) == 2 * LONGEST_RUN
    inner = {
        name: [schemes[f"layer{n}"].skips_zeros for n in range(9)]
        for name, schemes in found.items()
    }
    assert inner["every 1"] == [n % 2 == 0 for n in range(9)]
    assert inner["every 1, one later"] == [n % 2 == 1 for n in range(9)]
    assert inner["every 3"] == [True] * 3 + [False] * 3 + [True] * 3
    assert inner["every 3, one later"] == [True] * 2 + [False] * 3 + [True] * 3 + [False]
    for schemes in found.values():
        assert list(schemes) == list(LEVELS)
        assert schemes["first"] == schemes["last"] == DENSE
        assert set(schemes.values()) == {DENSE, SPARSE[1]}


def test_where_nothing_can_change_nothing_is_mixed() -> None:
    assert mixed_networks({"a": [DENSE], "b": [DENSE, *SPARSE], "c": [DENSE]}) == {}
    assert mixed_networks({"a": SPARSE, "b": SPARSE}) == {}
    assert mixed_networks({"a": [DENSE, *SPARSE], "b": [DENSE], "c": [DENSE, *SPARSE]}) == {}


def test_only_targets_that_fuse_neighbours_time_them() -> None:
    uniform = count_networks(LEVELS, ONNXRUNTIME_QOPERATOR)
    assert uniform == 1 + len(SPARSE)
    assert count_networks(LEVELS, DEEPSPARSE) == uniform + 2 * LONGEST_RUN


def test_neighbours_are_layers_that_could_be_either() -> None:
    assert neighbours(LEVELS) == tuple((f"layer{n}", f"layer{n + 1}") for n in range(8))


@given(
    st.floats(0.0, 3.0),
    st.floats(0.0, 2.0),
    st.lists(st.tuples(st.integers(0, 30), st.floats(0.1, 9.0)), max_size=8),
)
def test_the_cost_of_a_change_is_found_again(change, fixed, networks) -> None:
    timed = [
        TimedNetwork(scheme="", ms=fixed + layers + count * change, layers_ms=layers, changes=count)
        for count, layers in networks
    ]
    wanted = change if any(count for count, _ in networks) else 0.0
    assert cost_of_a_change(timed, fixed) == pytest.approx(wanted, abs=1e-9)


def test_the_cost_of_a_change_is_of_least_squares_and_never_below_zero() -> None:
    random = np.random.default_rng(0)
    counts, beyond = random.integers(1, 20, 12), random.normal(0.5, 0.2, 12)
    timed = [
        TimedNetwork(scheme="", ms=1.0 + float(y), layers_ms=1.0, changes=int(n))
        for n, y in zip(counts, counts * beyond, strict=True)
    ]
    expected = np.linalg.lstsq(counts[:, None].astype(float), counts * beyond, rcond=None)[0][0]
    assert cost_of_a_change(timed, 0.0) == pytest.approx(expected)
    faster = [TimedNetwork(scheme="", ms=1.0, layers_ms=2.0, changes=3)]
    assert cost_of_a_change(faster, 0.0) == 0.0


def test_changes_are_counted_along_the_network() -> None:
    assert changes_between([]) == 0
    assert changes_between([DENSE, SPARSE[0], SPARSE[2], DENSE, DENSE]) == 2
