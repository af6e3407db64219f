"""Blocks that two rows share: against brute force, and what pairing promises."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import make_problem, prepared, solve64

from obc_deploy.errors import SchemeError
from obc_deploy.schemes import Block4, Scheme
from obc_deploy.solvers import LayerProblem, solve
from obc_deploy.solvers.magnitude import magnitude_mask
from obc_deploy.solvers.problems import check_problem, damp
from obc_deploy.solvers.shared_blocks import WINDOW, block_costs, pairs_of
from obc_deploy.solvers.staged import quantize_pruned

quick = settings(max_examples=25, deadline=None, derandomize=True)
CPU = torch.device("cpu")


@st.composite
def problems(draw):
    cols = 4 * draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 1, 2]))
    rows = groups * 2 * draw(st.integers(1, 3))
    weight, hessian = make_problem(
        draw(st.integers(0, 2**32 - 1)), rows, cols, groups, draw(st.integers(0, 2))
    )
    return weight, hessian, draw(st.sampled_from([0.001, 0.01]))


def damped_problem(weight, hessian, damping=0.01):
    layer = LayerProblem(torch.as_tensor(weight), torch.as_tensor(hessian), damping=damping)
    return damp(check_problem(layer, needs_hessian=True, device=CPU))


@quick
@given(problems(), st.sampled_from([0.25, 0.5, 0.8]))
def test_shared_blocks_are_brute_force(problem, sparsity):
    weight, hessian, damping = problem
    solved = solve64(weight, hessian, f"block4x2@{sparsity}", damping)
    pairs = pairs_of(
        block_costs(damped_problem(weight, hessian, damping)),
        groups=1 if hessian.ndim == 2 else len(hessian),
    )
    alive, stiff = prepared(weight, hessian, damping)
    expected = oracle.prune_globally(alive, stiff, sparsity, 4, pairs.tolist())
    np.testing.assert_allclose(solved.weight, expected, rtol=1e-6, atol=1e-7)
    for one, other in pairs.tolist():
        np.testing.assert_array_equal(solved.mask[one], solved.mask[other])


def test_twins_are_pruned_as_one_of_them():
    """Two equal rows agree in everything: shared blocks are each one's own."""
    weight, hessian = make_problem(5, 6, 24)
    alone = solve64(weight, hessian, "block4@0.5", 0.01)
    twins = solve64(np.repeat(weight, 2, axis=0), hessian, "block4x2@0.5", 0.01)
    np.testing.assert_allclose(twins.weight[::2], alone.weight, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(twins.weight[1::2], alone.weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [{}, {"method": "magnitude"}])
@pytest.mark.parametrize("scheme", ["block4x2@0.6", "block4x2@0.6+w8a8", "block4x2@0.6+w4"])
def test_what_is_asked_for_is_zero_in_pairs(scheme, method):
    weight, hessian = make_problem(3, 20, 24)
    solved = solve(weight, hessian, scheme, **method)
    blocks = np.asarray(solved.mask).reshape(20, 6, 4)
    assert (blocks.all(2) == blocks.any(2)).all()
    kept = blocks.any(2)
    assert (~kept).sum() == 2 * math.ceil(60 * 0.6)
    assert (np.asarray(solved.weight)[~np.asarray(solved.mask)] == 0.0).all()
    # Every row has one other of its window with the same blocks.
    for first in (0, WINDOW):
        rows = Counter(map(tuple, kept[first : first + WINDOW]))
        assert all(count % 2 == 0 for count in rows.values())


def test_shared_blocks_lose_more_than_each_rows_own_and_less_than_neighbours():
    weight, hessian = make_problem(11, 32, 64)
    own = solve64(weight, hessian, "block4@0.5", 0.01).error
    shared = solve64(weight, hessian, "block4x2@0.5", 0.01).error
    assert own < shared
    alive, stiff = prepared(weight, hessian, 0.01)
    neighbours = np.arange(32).reshape(-1, 2).tolist()
    beside = oracle.prune_globally(alive, stiff, 0.5, 4, neighbours)
    assert shared < oracle.relative_error(weight, beside, hessian)


@quick
@given(st.integers(1, 25), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_pairs_take_each_row_once_within_a_window(half, groups, seed):
    rows = 2 * half
    costs = torch.as_tensor(np.random.default_rng(seed).exponential(size=(groups * rows, 7)))
    pairs = pairs_of(costs, groups=groups)
    assert sorted(pairs.flatten().tolist()) == list(range(groups * rows))
    assert (pairs[:, 0] // rows == pairs[:, 1] // rows).all()
    assert (pairs[:, 0] % rows // WINDOW == pairs[:, 1] % rows // WINDOW).all()
    first = torch.minimum(costs[:, None], costs[None]).sum(-1)[:WINDOW, :WINDOW][:rows, :rows]
    most = first.masked_fill(torch.eye(len(first), dtype=torch.bool), 0.0).max()
    assert first[tuple(pairs[0])] == most


def test_costs_are_those_of_one_block():
    weight, hessian = make_problem(7, 4, 12, 2)
    stack = oracle.row_hessians(oracle.damped(hessian, 0.01), 4)
    expected = [
        [oracle._increase(w, h, list(range(12)), list(range(b, b + 4))) for b in (0, 4, 8)]
        for w, h in zip(weight, stack, strict=True)
    ]
    np.testing.assert_allclose(block_costs(damped_problem(weight, hessian)), expected, rtol=1e-9)


def test_the_window_is_the_kernels():
    bands = Path(__file__).parents[2] / "runtimes" / "sparse" / "bands.hpp"
    found = re.search(r"kBandWindow = (\d+);", bands.read_text())
    assert found is not None
    assert int(found[1]) == WINDOW


def test_codes_are_found_for_some_of_a_layers_rows():
    """Where nothing survives rows are left out, and what remains need not be pairs."""
    weight, hessian = make_problem(2, 6, 16)
    pruned = solve(weight, hessian, "block4x2@0.5")
    some = replace(
        pruned, weight=torch.as_tensor(pruned.weight)[:3], mask=torch.as_tensor(pruned.mask)[:3]
    )
    layer = LayerProblem(torch.as_tensor(weight)[:3], torch.as_tensor(hessian))
    coded = quantize_pruned(layer, some, Scheme.parse("block4x2@0.5+w8"))
    assert torch.equal(coded.mask, some.mask)
    assert (coded.weight[~coded.mask] == 0.0).all()
    torch.testing.assert_close(coded.weight, some.weight.float(), rtol=0, atol=0.05)


def test_an_odd_number_of_rows_is_refused():
    weight, hessian = make_problem(1, 5, 8)
    with pytest.raises(SchemeError, match=r"multiples of 2, but layer 'layer' \(5x8\) has 5"):
        solve64(weight, hessian, "block4x2@0.5", 0.01)
    weight, hessian = make_problem(1, 6, 8, groups=2)
    with pytest.raises(SchemeError, match=r"2 group\(s\) have 3 each: use 'block4@S'"):
        solve64(weight, hessian, "block4x2@0.5", 0.01)


@pytest.mark.parametrize(
    "text", ["block4x3@0.5", "block4x@0.5", "block4x2@1.5", "unstructuredx2@0.5"]
)
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(SchemeError):
        Scheme.parse(text)


def test_the_text_is_read_back():
    scheme = Scheme.parse("block4x2@0.9+w8a8")
    assert scheme.pattern == Block4(0.9, together=2)
    assert str(scheme) == "block4x2@0.9+w8a8"
    assert Block4(0.9) != scheme.pattern
    assert str(Scheme.parse("block4x1@0.9")) == "block4@0.9"


def test_magnitude_keeps_the_pairs_of_most_energy():
    weight = torch.zeros(4, 8, dtype=torch.float64)
    weight[0, :4] = weight[2, :4] = 2.0  # these two agree, and so do the others
    weight[1, 4:] = weight[3, 4:] = 1.0
    mask = magnitude_mask(weight, Block4(0.5, together=2))
    np.testing.assert_array_equal(mask, weight != 0.0)
