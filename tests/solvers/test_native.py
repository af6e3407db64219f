"""The compiled row solvers against brute force, against the torch solver, and under interrupts."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import INSTRUCTION_SETS, using
from test_exact import make_problem, problems

from obc_deploy import native
from obc_deploy.errors import ProblemError
from obc_deploy.schemes import NM, Block4, Quantization, Scheme
from obc_deploy.solvers import LayerProblem, SolverSettings, native_rows, solve_levels
from obc_deploy.solvers.best_weights import best_weight
from obc_deploy.solvers.exact_obs import trace_blocks, trace_shared_blocks, trace_weights
from obc_deploy.solvers.grids import find_grid
from obc_deploy.solvers.obq import obq_codes, obq_codes_of_survivors
from obc_deploy.solvers.problems import check_problem, damp
from obc_deploy.solvers.settings import torch_threads

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"the compiled solvers are missing: {native.why_missing()}"
)

DAMPING = 0.01
CPU = torch.device("cpu")
FLOAT64 = SolverSettings(torch.float64)
TORCH64 = SolverSettings(torch.float64, native=False)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    with using(request.param):
        yield request.param


@functools.cache
def case(rows, cols, groups=1, dead=0, zero_rows=0, seed=0):
    """Weight and Hessian of a seeded problem; the first `zero_rows` rows have zero weights."""
    weight, hessian = make_problem(seed + 100 * rows + cols, rows, cols, groups, dead)
    weight[:zero_rows] = 0.0
    return weight, hessian


def layer(weight, hessian, damping=DAMPING):
    return LayerProblem(torch.from_numpy(weight), torch.from_numpy(hessian), damping=damping)


def damped(weight, hessian, damping=DAMPING):
    """What the row solvers themselves take."""
    checked = check_problem(layer(weight, hessian, damping), needs_hessian=True, device=CPU)
    return damp(checked)


def silent(share):
    pass


# Widths below, at and above a vector and a tile of every instruction set; single rows and columns;
# a Hessian for each row or for half of them; dead inputs; rows of zeros.
ANY_WIDTH = [
    (1, 1), (3, 1), (1, 5), (4, 5), (3, 7, 3), (3, 7, 1, 2), (4, 9, 4), (2, 16), (1, 17),
    (3, 12, 1, 0, 1), (2, 33), (1, 49),
]  # fmt: skip
WHOLE_BLOCKS = [(1, 4), (5, 8, 5), (3, 12, 1, 2), (4, 20, 2), (3, 12, 1, 0, 1), (2, 36), (1, 52)]
EIGHTS = [(1, 8), (2, 24, 2), (3, 40, 1, 3), (2, 16, 1, 0, 1)]
TASKS = [
    *((shape, f"unstructured@{level}") for shape in ANY_WIDTH for level in (0.3, 0.9)),
    *((shape, f"block4@{level}") for shape in WHOLE_BLOCKS for level in (0.5, 0.9)),
    *((shape, text) for shape in WHOLE_BLOCKS for text in ("2:4", "1:4", "3:4")),
    *((shape, text) for shape in EIGHTS for text in ("4:8", "1:8", "7:8")),
    *((shape, f"w{bits}") for shape in ANY_WIDTH for bits in (2, 4)),
    *((shape, f"w{bits}-asym") for shape in ANY_WIDTH for bits in (3, 8)),
    *((shape, text) for shape in WHOLE_BLOCKS for text in ("w4g4", "w3g2-asym", "w8g4-asym")),
    *(
        (shape, text)
        for shape in WHOLE_BLOCKS
        for text in ("2:4+w4", "1:4+w2-asym", "block4@0.5+w8", "unstructured@0.8+w3g4-asym")
    ),
    *((shape, "unstructured@0.5+w4-asym") for shape in ANY_WIDTH),
]  # fmt: skip


@functools.cache
def brute_force(shape, text):
    """Weight, error and codes by the plain loops; codes are None without quantization."""
    weight, hessian = case(*shape)
    scheme = Scheme.parse(text)
    alive, stiff = oracle.without_dead(weight, hessian), oracle.damped(hessian, DAMPING)
    pruned, codes = alive, None
    if isinstance(scheme.pattern, NM):
        pruned = oracle.prune_nm(alive, stiff, scheme.pattern.n, scheme.pattern.m)
    elif scheme.pattern is not None:
        width = 4 if isinstance(scheme.pattern, Block4) else 1
        pruned = oracle.prune_globally(alive, stiff, scheme.pattern.sparsity, width)
    found = pruned
    if scheme.quantization is not None:
        grid = scheme.quantization
        # A survivor of weight zero has no correlations here: to leave it out changes nothing.
        codes, scales, zeros = oracle.quantize(
            pruned, stiff, pruned, grid.weight_bits, grid.asymmetric, grid.group,
            None if scheme.pattern is None else pruned != 0,
        )  # fmt: skip
        width = weight.shape[1] // scales.shape[1]
        scales, zeros = np.repeat(scales, width, axis=1), np.repeat(zeros, width, axis=1)
        found = (codes - zeros) * scales
    return found, oracle.relative_error(weight, found.astype(np.float32), hessian), codes


@functools.cache
def by_torch(shape, texts):
    return solve_levels(layer(*case(*shape)), list(texts), settings=TORCH64)


def is_regular(shape):
    """Whether no two columns cost the same nothing: then all masks are one."""
    return len(shape) < 4


@pytest.mark.parametrize(("shape", "text"), TASKS, ids=str)
def test_every_kind_is_brute_force_and_the_torch_solver(shape, text, instruction_set):
    problem = layer(*case(*shape))
    solved = solve_levels(problem, [text], settings=FLOAT64)[0]
    weight, error, codes = brute_force(shape, text)
    np.testing.assert_allclose(solved.weight, weight, rtol=1e-6, atol=1e-7)
    assert solved.error == pytest.approx(error, rel=1e-9, abs=1e-12)
    if codes is not None:
        np.testing.assert_array_equal(solved.codes, codes)

    other = by_torch(shape, (text,))[0]
    torch.testing.assert_close(solved.weight, other.weight, rtol=1e-6, atol=1e-7)
    assert solved.error == pytest.approx(other.error, rel=1e-9, abs=1e-12)
    if codes is not None:
        assert torch.equal(solved.codes, other.codes)
        assert torch.equal(solved.scale, other.scale)
        assert torch.equal(solved.zero_point, other.zero_point)
    if is_regular(shape):
        assert torch.equal(solved.mask, other.mask)

    # In single precision rounding may lead the greedy order astray, so far and no further.
    single = solve_levels(problem, [text], settings=SolverSettings())[0]
    assert single.error == pytest.approx(error, rel=0.003 if codes is None else 0.03, abs=1e-7)


WIDE_TASKS = [
    ((3, 100), ["unstructured@0.6", "2:4", "block4@0.6", "3:4", "w4g20", "w3-asym", "2:4+w4"]),
    ((2, 130, 2), ["unstructured@0.9", "w4", "w2-asym", "w8g13", "unstructured@0.5+w4-asym"]),
    ((1, 257), ["unstructured@0.7", "w3", "unstructured@0.7+w4"]),
    ((2, 264, 1, 5), ["4:8", "block4@0.8", "block4@0.8+w4g8-asym", "w8"]),
]


@pytest.mark.parametrize(("shape", "texts"), WIDE_TASKS, ids=str)
@pytest.mark.parametrize("lazy", [None, 4, 12, 64])
def test_many_updates_are_the_torch_solver(shape, texts, lazy, instruction_set):
    """Wide rows: the inverse is updated and its gaps closed many times."""
    problem = layer(*case(*shape))
    found = solve_levels(problem, texts, settings=replace(FLOAT64, lazy=lazy))
    expected = by_torch(shape, tuple(texts))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-7)
        assert one.error == pytest.approx(other.error, rel=1e-9)
        assert one.codes is None or torch.equal(one.codes, other.codes)
    single = solve_levels(problem, texts, settings=SolverSettings(lazy=lazy))
    for one, other in zip(single, expected, strict=True):
        allowed = 0.003 if one.codes is None else 0.03
        assert one.error == pytest.approx(other.error, rel=allowed)


quick = settings(max_examples=40, deadline=None, derandomize=True)
PATTERNS = ["", "unstructured@0.4", "unstructured@0.9", "block4@0.6", "2:4", "1:4", "3:4"]
GRIDS = ["", "w2", "w3-asym", "w4g4", "w8g2-asym"]


@quick
@given(problems(multiple=4), st.sampled_from(PATTERNS), st.sampled_from(GRIDS))
def test_random_problems_are_the_torch_solver(problem, pattern, grid):
    weight, hessian, damping = problem
    text = "+".join(part for part in (pattern, grid) if part) or "dense"
    one, other = (
        solve_levels(layer(weight, hessian, damping), [text], settings=each)[0]
        for each in (FLOAT64, TORCH64)
    )
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-7)
    assert one.error == pytest.approx(other.error, rel=1e-9, abs=1e-12)
    if grid:
        assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("width", native_rows.BLOCK_WIDTHS)
@pytest.mark.parametrize("lazy", [None, 4, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_any_width_are_brute_force(width, lazy, dtype, instruction_set):
    """Also where a block has more columns than an update has vectors."""
    weight, hessian = case(3, 48, 3)
    order, increase = native_rows.prune_blocks(
        damped(weight, hessian), SolverSettings(dtype, lazy=lazy), silent, width=width
    )
    near = 1e-9 if dtype == torch.float64 else 1e-3
    for row in range(3):
        costs, expected = _brute_force_blocks(row, width)
        assert order[row].tolist() == expected
        np.testing.assert_allclose(increase[row], costs, rtol=near)


@functools.cache
def _brute_force_blocks(row, width):
    weight, hessian = case(3, 48, 3)
    stiff = oracle.damped(hessian, DAMPING)[row]
    costs, after = oracle._trace(weight[[row]], stiff, width)
    gone = [np.flatnonzero((w.reshape(-1, width) == 0).all(1)) for (w,) in after]
    order = [int(np.setdiff1d(*pair)[0]) for pair in zip(gone[1:], gone, strict=False)]
    return costs, order


@pytest.mark.parametrize("shape", [(2, 4), (6, 20), (8, 136, 2), (40, 48), (4, 72, 1, 4)])
@pytest.mark.parametrize("lazy", [None, 4, 8])
def test_rows_that_share_blocks_are_the_torch_solver(shape, lazy, instruction_set):
    problem = damped(*case(*shape))
    compiled = trace_shared_blocks(problem, replace(FLOAT64, lazy=lazy), silent)
    plain = trace_shared_blocks(problem, TORCH64, silent)
    assert torch.equal(compiled.together, plain.together)
    torch.testing.assert_close(compiled.increase, plain.increase, rtol=1e-7, atol=1e-10)
    if is_regular(shape):
        assert torch.equal(compiled.order.long(), plain.order.long())


@pytest.mark.parametrize(("cols", "width"), [(48, 3), (48, 32), (12, 8)])
def test_blocks_that_do_not_fit_are_named(cols, width):
    with pytest.raises(ProblemError, match=f"blocks of {width} columns do not fit {cols} columns"):
        native_rows.prune_blocks(damped(*case(2, cols)), FLOAT64, silent, width=width)


LEVELS = [1 - 0.8**k for k in range(1, 21)]
BLOCK_LEVELS = [1 - 0.75**k for k in range(1, 11)]


@pytest.mark.parametrize("shape", [(6, 44), (4, 100, 4), (3, 72, 1, 4), (2, 8), (4, 36, 1, 0, 1)])
@pytest.mark.parametrize(
    ("trace", "levels"), [(trace_weights, LEVELS), (trace_blocks, BLOCK_LEVELS)]
)
@pytest.mark.parametrize("lazy", [None, 4])
def test_levels_at_once_are_the_best_for_their_masks(shape, trace, levels, lazy, instruction_set):
    problem = damped(*case(*shape))
    chosen = replace(FLOAT64, lazy=lazy)
    traced = trace(problem, chosen, silent)
    counts = torch.stack([traced.counts(level) for level in [0.0, *levels, 1.0]], 1)
    found = native_rows.best_weights(problem, traced.columns, counts * traced.width, chosen, silent)
    for weight, count in zip(found, counts.unbind(1), strict=True):
        mask = traced.mask(count)
        assert torch.all(weight[~mask] == 0)
        best = best_weight(problem, mask, TORCH64)
        torch.testing.assert_close(weight, best, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 60), (4, 36, 2, 2)])
def test_a_database_of_levels_in_any_order(shape, instruction_set):
    texts = [f"unstructured@{level:.6f}" for level in LEVELS]
    texts += [f"block4@{level:.6f}" for level in BLOCK_LEVELS]
    mixed = np.random.default_rng(3).permutation(texts * 2).tolist()
    problem = layer(*case(*shape))
    shares = []
    found = solve_levels(problem, mixed, settings=FLOAT64, progress=shares.append)
    expected = dict(zip(texts, solve_levels(problem, texts, settings=TORCH64), strict=True))
    for text, one in zip(mixed, found, strict=True):
        assert one.scheme == Scheme.parse(text)
        torch.testing.assert_close(one.weight, expected[text].weight, rtol=1e-6, atol=1e-6)
        assert one.error == pytest.approx(expected[text].error, rel=1e-6)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def uneven_mask(rows, cols):
    """A row that keeps nothing, one that keeps everything, one single survivor, then any."""
    mask = torch.from_numpy(np.random.default_rng(1).random((rows, cols)) < 0.5)
    mask[0], mask[1], mask[2] = False, True, False
    mask[2, cols // 2] = True
    return mask


@pytest.mark.parametrize("shape", [(6, 1), (6, 7), (6, 33, 2), (6, 100), (8, 130, 1, 3)])
def test_best_weights_of_any_mask_are_numpys(shape, instruction_set):
    problem = damped(*case(*shape))
    mask = uneven_mask(*shape[:2])
    found = best_weight(problem, mask, FLOAT64)
    for row, (keep, weight) in enumerate(zip(mask.numpy(), problem.weight.numpy(), strict=True)):
        matrix = problem.hessian[problem.group_of_row[row]].numpy()
        expected = np.zeros_like(weight)
        expected[keep] = np.linalg.solve(matrix[np.ix_(keep, keep)], (matrix @ weight)[keep])
        np.testing.assert_allclose(found[row], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 1), (6, 12), (6, 33, 2), (4, 100)])
@pytest.mark.parametrize("quantization", [Quantization(4), Quantization(3, asymmetric=True)])
def test_rows_that_keep_nothing_or_everything(shape, quantization, instruction_set):
    problem = damped(*case(*shape))
    mask = uneven_mask(*shape[:2])
    best = best_weight(problem, mask, FLOAT64)
    torch.testing.assert_close(best, best_weight(problem, mask, TORCH64), rtol=1e-9, atol=1e-12)
    grid = find_grid(best, quantization)
    found, expected = (
        obq_codes_of_survivors(problem, best, mask, grid, each, silent)
        for each in (FLOAT64, TORCH64)
    )
    assert torch.equal(found, expected)
    assert torch.equal(found[0], grid.zero_point[0].expand_as(found[0]))
    dense = find_grid(problem.weight, quantization)
    everything = torch.ones_like(mask)
    assert torch.equal(
        obq_codes_of_survivors(problem, problem.weight, everything, dense, FLOAT64, silent),
        obq_codes(problem, dense, FLOAT64, silent),
    )


@pytest.mark.parametrize("shape", [(5, 24), (6, 48, 2), (4, 72, 1, 4), (1, 8)])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4)])
@pytest.mark.parametrize(("lazy", "memory"), [(None, 1 << 29), (4, 1), (12, 1 << 14)])
def test_what_n_m_pruning_leaves_is_quantized(shape, pattern, lazy, memory, instruction_set):
    """Memory of one byte is one row at a time; the torch solver inverts what survives anew."""
    given = layer(*case(*shape))
    texts = [f"{pattern}", f"{pattern}+w4", f"{pattern}+w3-asym", f"{pattern}+w4g8a8"]
    shares = []
    found = solve_levels(
        given, texts, settings=replace(FLOAT64, lazy=lazy, memory=memory), progress=shares.append
    )
    expected = solve_levels(given, texts, settings=TORCH64)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-7)
        if other.codes is not None:
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scale, other.scale)
            assert torch.equal(one.zero_point, other.zero_point)


def test_rows_of_zeros_are_pruned_to_the_pattern_and_quantized_to_zero(instruction_set):
    weight, hessian = case(4, 32, 1, 0, 2)
    found = solve_levels(layer(weight, hessian), ["4:8+w4-asym"])[0]
    assert torch.all(found.mask.reshape(4, 4, 8).sum(2) == 4)
    assert torch.all(found.weight[:2] == 0)


@pytest.mark.parametrize("shape", [(5, 24), (6, 48, 2), (16, 400), (4, 72, 1, 4)])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4)])
def test_weights_left_in_single_precision_are_refined(shape, pattern, instruction_set):
    """The loss of the weights that down-dating leaves is the least for their mask, to 1e-9."""
    problem = damped(*case(*shape))
    left = native_rows.LeftInverses.room(*problem.weight.shape, pattern, torch.float32)
    mask, weight = native_rows.prune_and_weigh(
        problem, pattern, SolverSettings(), silent, left=left
    )
    alone = native_rows.prune_and_weigh(problem, pattern, SolverSettings(), silent)
    assert torch.equal(mask, alone[0])
    assert torch.equal(weight, alone[1])
    best = best_weight(problem, mask, TORCH64)
    assert torch.equal(left.columns.sort(1)[0].flatten(), mask.nonzero()[:, 1].int())

    def loss(weights):
        lost = problem.weight - weights
        return torch.einsum("ri,rij,rj->", lost, problem.hessian[problem.group_of_row], lost)

    assert torch.all(weight[~mask] == 0)
    assert float(loss(weight)) == pytest.approx(float(loss(best)), rel=1e-9)
    torch.testing.assert_close(weight, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("samples", [500, 150])
def test_weights_are_the_best_where_single_precision_is_not_enough(
    damping, samples, instruction_set
):
    """Inputs with a mean far beyond their spread, or fewer of them than columns."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, samples)) + 30 * rng.standard_normal((200, 1))
    hessian, weight = inputs @ inputs.T / samples, rng.standard_normal((6, 200))
    problem = damp(
        check_problem(
            layer(weight, hessian, damping), needs_hessian=True, device=torch.device("cpu")
        )
    )
    mask, found = native_rows.prune_and_weigh(problem, NM(2, 4), SolverSettings(), silent)
    best = best_weight(problem, mask, TORCH64)
    lost, least = problem.weight - found, problem.weight - best
    hessian = problem.hessian[0]
    assert torch.all(
        (lost @ hessian * lost).sum(1) <= (least @ hessian * least).sum(1) * (1 + 1e-6)
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("rows", "cols", "group"), [(5, 1, None), (7, 33, None), (3, 600, 24)])
def test_grids_are_the_torch_search(
    bits, asymmetric, rows, cols, group, instruction_set, monkeypatch
):
    weight = torch.randn(rows, cols, dtype=torch.float64) * torch.logspace(-6, 6, rows)[:, None]
    weight[0] = 0.0
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    quantization = Quantization(bits, group=group, asymmetric=asymmetric)
    for given_weight in (weight, weight.to(torch.float32)):
        for shrink in (True, False):
            found = find_grid(given_weight, quantization, shrink=shrink)
            with monkeypatch.context() as without:
                without.setattr(native, "is_available", lambda: False)
                expected = find_grid(given_weight, quantization, shrink=shrink)
            assert torch.equal(found.scale, expected.scale)
            assert torch.equal(found.zero_point, expected.zero_point)


LARGE = (96, 224)
LARGE_TEXTS = [
    "unstructured@0.5", "unstructured@0.8", "block4@0.3", "block4@0.9", "2:4", "w4-asym",
    "block4@0.9+w4g8", "4:8+w4",
]  # fmt: skip


def test_threads_change_no_bit():
    """The layer is large enough to be worth threads."""
    shares = []

    def by_threads(threads):
        with torch_threads(threads):
            return solve_levels(layer(*case(*LARGE)), LARGE_TEXTS, progress=shares.append)

    alone = by_threads(1)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[0] >= 0.0
    for _ in range(2):
        for one, other in zip(alone, by_threads(2), strict=True):
            assert torch.equal(one.weight, other.weight)
            assert torch.equal(one.mask, other.mask)
            assert one.codes is None or torch.equal(one.codes, other.codes)


@pytest.mark.parametrize(("cols", "torch_uses"), [(32, 1), (648, 2)])
def test_torch_works_alone_on_layers_of_few_columns(monkeypatch, cols, torch_uses):
    """The rows have all threads nevertheless, and torch has them back in the end."""
    seen, layers = [], []
    made = native.Layer

    def recorded(*values):
        layers.append(made(*values))
        return layers[-1]

    monkeypatch.setattr(native, "Layer", recorded)
    problem = layer(*case(1 + (1 << 22) // cols**2, cols))
    with torch_threads(2):
        solve_levels(problem, ["2:4"], progress=lambda _: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError):
            solve_levels(problem, ["2:4"], progress=lambda share: {}[share])
        assert torch.get_num_threads() == 2
    assert set(seen) == {torch_uses}
    assert {each.threads for each in layers} == {2}


@pytest.fixture
def controls(monkeypatch):
    """Every control that is made, in order."""
    made = []

    class Recorded(native.Control):
        def __init__(self, *values):
            super().__init__(*values)
            made.append(self)

    monkeypatch.setattr(native, "Control", Recorded)
    return made


@pytest.fixture(scope="module")
def long_problem():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((1500, 2000))
    return damped(rng.standard_normal((64, 1500)), inputs @ inputs.T / 1000)


class GivenUpError(Exception):
    pass


LONG_RUNS = {
    "columns": lambda problem, progress: trace_weights(problem, FLOAT64, progress),
    "blocks": lambda problem, progress: trace_blocks(problem, FLOAT64, progress),
    "left": lambda problem, progress: native_rows.prune_and_weigh(
        problem, NM(2, 4), FLOAT64, progress
    ),
    "codes": lambda problem, progress: obq_codes(
        problem, find_grid(problem.weight, Quantization(4)), FLOAT64, progress
    ),
    "weights": lambda problem, progress: native_rows.best_weights(
        problem, torch.arange(1500).repeat(64, 1), torch.tensor([[700, 800]]).repeat(64, 1),
        FLOAT64, progress,
    ),
}  # fmt: skip


def check_stopped(controls, problem):
    """The run ended in the middle, no thread of it lives on, and the library still works."""
    rows, cols = problem.weight.shape
    assert controls[-1].stop == 1
    assert controls[-1].done < 0.9 * rows * cols**3
    assert all(thread.name != "native solver" for thread in threading.enumerate())
    found, expected = (
        solve_levels(layer(*case(2, 36)), ["2:4+w4"], settings=each)[0]
        for each in (FLOAT64, TORCH64)
    )
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("run", LONG_RUNS)
def test_an_exception_of_the_progress_stops_the_run(run, long_problem, controls):
    def give_up(share):
        raise GivenUpError

    with pytest.raises(GivenUpError):
        LONG_RUNS[run](long_problem, give_up)
    check_stopped(controls, long_problem)


def test_an_interrupt_stops_the_run(long_problem, controls):
    """Ctrl-C raises in the main thread while native code is at work in another."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        # Rows begin once the inverse has been copied; the timer starts with the first report.
        def arm(share):
            if share > 0.0 and signal.getitimer(signal.ITIMER_REAL)[0] == 0.0:
                signal.setitimer(signal.ITIMER_REAL, 0.05)

        with pytest.raises(KeyboardInterrupt):
            trace_weights(long_problem, FLOAT64, arm)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    check_stopped(controls, long_problem)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_memory_that_is_not_there_is_an_error():
    """In a process of its own, which gets 24 MiB more than it has; the inverse alone takes 32."""
    code = """
        import resource, torch
        from obc_deploy.solvers import SolverSettings, native_rows
        from obc_deploy.solvers.problems import DampedProblem
        eye = torch.eye(2000, dtype=torch.float64)[None]
        problem = DampedProblem(torch.ones(1, 2000).double(), eye, eye, torch.zeros(1).long())
        settings = SolverSettings(torch.float64)
        native_rows.prune_columns(problem, settings, print, group=4, zeros=2)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (24 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            native_rows.prune_columns(problem, settings, print, group=4, zeros=2)
        except MemoryError as error:
            print("caught:", error)
    """
    code = re.sub("^ {8}", "", code, flags=re.MULTILINE)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "caught: the native solver could not get its memory" in answer.stdout


HARD_TEXTS = [
    "unstructured@0.5", "unstructured@0.95", "block4@0.5", "2:4", "1:4", "w2", "w4-asym", "w8g4",
    "2:4+w3-asym", "block4@0.5+w8",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["near singular", "huge", "tiny", "far apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_that_defeat_the_precision(seed, kind, dtype, instruction_set):
    """Nothing crashes or hangs; masks keep their counts, codes their range, weights stay finite."""
    rng = np.random.default_rng(seed)
    rows, cols = 4, 72
    few = rng.standard_normal((cols, 6)) @ rng.standard_normal((6, 400))
    inputs = few + 1e-6 * rng.standard_normal(few.shape)
    weight = rng.standard_normal((rows, cols))
    if kind == "huge":
        weight *= 1e30
    elif kind == "tiny":
        weight *= 1e-38
    elif kind == "far apart":
        inputs *= np.logspace(-6, 6, cols)[:, None]
        weight *= np.logspace(8, -8, cols)
    hessian = inputs @ inputs.T
    problem = layer(weight, hessian, 1e-12 if kind != "far apart" else 1e-7)
    for solved in solve_levels(problem, HARD_TEXTS, settings=SolverSettings(dtype)):
        scheme = solved.scheme
        if isinstance(scheme.pattern, NM):
            kept = solved.mask.reshape(-1, scheme.pattern.m).sum(1)
            assert torch.all(kept == scheme.pattern.n)
        if isinstance(scheme.pattern, Block4):
            blocks = solved.mask.reshape(-1, 4)
            assert torch.equal(blocks.all(1), blocks.any(1))
            assert int((~blocks[:, 0]).sum()) == rows * cols // 8
        assert torch.all(solved.weight[~solved.mask] == 0)
        if solved.codes is not None:
            assert int(solved.codes.min()) >= scheme.quantization.code_min
            assert int(solved.codes.max()) <= scheme.quantization.code_max
            assert torch.isfinite(solved.weight).all()


def test_numbers_that_are_none_are_given_back_in_range(instruction_set):
    """Should an inverse be no inverse at all, each column is still taken once."""
    problem = damped(*case(3, 40))
    broken = replace(problem, inverse=torch.full_like(problem.inverse, torch.nan))
    for dtype in (torch.float32, torch.float64):
        chosen = SolverSettings(dtype)
        order = trace_weights(broken, chosen, silent).order
        assert torch.equal(order.sort(1).values, torch.arange(40, dtype=torch.int32).repeat(3, 1))
        blocks = trace_blocks(broken, chosen, silent).order
        assert torch.equal(blocks.sort(1).values, torch.arange(10, dtype=torch.int32).repeat(3, 1))
        grid = find_grid(problem.weight, Quantization(3, asymmetric=True))
        codes = obq_codes(broken, grid, chosen, silent)
        assert int(codes.min()) >= grid.code_min
        assert int(codes.max()) <= grid.code_max


def test_an_unknown_instruction_set_is_refused():
    best = native.instruction_set()
    with (
        pytest.raises(ValueError, match="'mmx' does not work here"),
        native.use_instruction_set("mmx"),
    ):
        pass
    with native.use_instruction_set("portable"):
        assert native.instruction_set() == "portable"
    assert native.instruction_set() == best
