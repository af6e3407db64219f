"""The exact solvers against brute force, and the properties every solver keeps."""

from __future__ import annotations

import importlib.util
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obc_deploy.schemes import Scheme
from obc_deploy.solvers import METHODS, LayerProblem, SolverSettings, solve, solve_levels

quick = settings(max_examples=25, deadline=None, derandomize=True)


def make_problem(seed, rows, cols, groups=1, dead=0):
    """Correlated inputs, weights of unequal rows, some inputs that are always zero."""
    rng = np.random.default_rng(seed)
    hessians = []
    for _ in range(groups):
        mixed = rng.standard_normal((cols, cols)) @ rng.standard_normal((cols, 3 * cols))
        mixed = mixed / cols**0.5 + 0.5 * rng.standard_normal(mixed.shape)
        if dead:
            mixed[rng.choice(cols, dead, replace=False)] = 0.0
        hessians.append(2 / mixed.shape[1] * mixed @ mixed.T)
    weight = rng.standard_normal((rows, cols)) * np.exp(0.5 * rng.standard_normal((rows, 1)))
    return weight, np.array(hessians) if groups > 1 else hessians[0]


@st.composite
def problems(draw, multiple=1):
    cols = multiple * draw(st.integers(math.ceil(4 / multiple), 16 // multiple))
    groups = draw(st.sampled_from([1, 1, 2]))
    rows = groups * draw(st.integers(1, 4 // groups))
    dead = draw(st.integers(0, 2))
    weight, hessian = make_problem(draw(st.integers(0, 2**32 - 1)), rows, cols, groups, dead)
    return weight, hessian, draw(st.sampled_from([0.0, 0.01]))


def solve64(weight, hessian, scheme, damping):
    return solve(weight, hessian, scheme, dtype="float64", damping=damping)


def prepared(weight, hessian, damping):
    return oracle.without_dead(weight, hessian), oracle.damped(hessian, damping)


@quick
@given(problems(), st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.9]))
def test_unstructured_is_brute_force(problem, sparsity):
    weight, hessian, damping = problem
    solved = solve64(weight, hessian, f"unstructured@{sparsity}", damping)
    alive, stiff = prepared(weight, hessian, damping)
    expected = oracle.prune_globally(alive, stiff, sparsity, 1)
    np.testing.assert_allclose(solved.weight, expected, rtol=1e-6, atol=1e-7)
    error = oracle.relative_error(weight, expected, hessian)
    assert solved.error == pytest.approx(error, rel=1e-6, abs=1e-12)


@quick
@given(problems(multiple=4), st.sampled_from([0.25, 0.5, 0.8]))
def test_block4_is_brute_force(problem, sparsity):
    weight, hessian, damping = problem
    solved = solve64(weight, hessian, f"block4@{sparsity}", damping)
    alive, stiff = prepared(weight, hessian, damping)
    expected = oracle.prune_globally(alive, stiff, sparsity, 4)
    np.testing.assert_allclose(solved.weight, expected, rtol=1e-6, atol=1e-7)


@quick
@given(problems(multiple=4), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2)]))
def test_nm_is_brute_force(problem, pattern):
    weight, hessian, damping = problem
    n, m = pattern
    solved = solve64(weight, hessian, f"{n}:{m}", damping)
    expected = oracle.prune_nm(*prepared(weight, hessian, damping), n, m)
    np.testing.assert_allclose(solved.weight, expected, rtol=1e-6, atol=1e-7)


@quick
@given(
    problems(multiple=4),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from([None, 2, 4]),
)
def test_obq_is_brute_force(problem, bits, asymmetric, group):
    weight, hessian, damping = problem
    text = f"w{bits}{f'g{group}' if group else ''}{'-asym' if asymmetric else ''}"
    solved = solve64(weight, hessian, text, damping)
    alive, stiff = prepared(weight, hessian, damping)
    codes, scales, zeros = oracle.quantize(alive, stiff, alive, bits, asymmetric, group)
    np.testing.assert_array_equal(solved.codes, codes)
    np.testing.assert_allclose(solved.scale, scales, rtol=1e-7)
    np.testing.assert_array_equal(solved.zero_point, zeros)


@quick
@given(
    problems(multiple=4),
    st.sampled_from(["2:4", "unstructured@0.5", "unstructured@0.8", "block4@0.5"]),
    st.sampled_from([(4, False, None), (4, True, None), (3, False, 4), (8, True, 2)]),
)
def test_compound_is_brute_force(problem, pattern, grid):
    weight, hessian, damping = problem
    bits, asymmetric, group = grid
    quantization = f"w{bits}{f'g{group}' if group else ''}{'-asym' if asymmetric else ''}"
    solved = solve64(weight, hessian, f"{pattern}+{quantization}", damping)
    alive, stiff = prepared(weight, hessian, damping)
    if pattern == "2:4":
        pruned = oracle.prune_nm(alive, stiff, 2, 4)
    else:
        kind, sparsity = pattern.split("@")
        width = 4 if kind == "block4" else 1
        pruned = oracle.prune_globally(alive, stiff, float(sparsity), width)
    codes, _, zeros = oracle.quantize(pruned, stiff, pruned, bits, asymmetric, group, solved.mask)
    np.testing.assert_array_equal(solved.weight[~solved.mask], 0.0)
    np.testing.assert_array_equal(solved.codes, codes)
    np.testing.assert_array_equal(solved.zero_point, zeros)


@quick
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_depthwise_rows_have_their_own_hessian(seed, rows):
    weight, hessian = make_problem(seed, rows, 9, groups=rows)
    solved = solve64(weight, hessian, "w4", 0.0)
    for row in range(rows):
        alone = solve64(weight[row : row + 1], hessian[row], "w4", 0.0)
        np.testing.assert_array_equal(solved.codes[row], alone.codes[0])


@pytest.mark.parametrize("scheme", ["unstructured@0.6", "block4@0.6", "2:4", "w4", "2:4+w4-asym"])
@pytest.mark.parametrize("lazy", [4, 8, 32])
@pytest.mark.parametrize("memory", [1, 1 << 14, 1 << 30])
def test_batches_and_lazy_updates_change_nothing(scheme, lazy, memory):
    """Compaction happens at every `lazy` steps; memory of one byte is one row at a time."""
    weight, hessian = make_problem(7, 6, 40, groups=2)
    problem = LayerProblem(torch.from_numpy(weight), torch.from_numpy(hessian))
    limits = SolverSettings(torch.float64, memory=memory, lazy=lazy)
    solved = solve_levels(problem, [scheme], settings=limits)[0]
    plain = SolverSettings(torch.float64, lazy=40)
    expected = solve_levels(problem, [scheme], settings=plain)[0]
    torch.testing.assert_close(solved.weight, expected.weight, rtol=1e-6, atol=1e-7)


def _layer_problems():
    path = Path(__file__).parents[2].parent / "shared" / "tools" / "layer_problems.py"
    if not path.is_file():
        pytest.skip(f"needs the seeded layer problems of {path.name} beside the checkout")
    spec = importlib.util.spec_from_file_location("layer_problems", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.shared
@pytest.mark.parametrize(
    "expected",
    [
        {
            "unstructured@0.5": 0.0014766854,
            "unstructured@0.75": 0.0097059513,
            "unstructured@0.9": 0.035867852,
        },
        {"2:4": 0.0064981062},
        {"w4-asym": 0.0034416807},
        {"w3-asym": 0.010292498},
        {"w2-asym": 0.030945904},
    ],
    ids=lambda expected: "+".join(expected),
)
def test_published_errors_of_the_64x576_problem(expected):
    """Two independent float64 implementations found these errors; they used no damping."""
    weight, inputs = _layer_problems().load("64x576")
    inputs = torch.from_numpy(inputs).double()
    hessian = 2 / inputs.shape[1] * inputs @ inputs.T
    problem = LayerProblem(torch.from_numpy(weight), hessian, damping=0.0)
    solved = solve_levels(problem, list(expected), dtype="float64")
    for layer in solved:
        assert layer.error == pytest.approx(expected[str(layer.scheme)], rel=1e-6)


def test_float32_is_near_float64():
    weight, hessian = make_problem(3, 24, 96)
    for scheme in ["unstructured@0.7", "block4@0.7", "2:4", "w4", "block4@0.7+w4"]:
        exact = solve(weight, hessian, scheme, dtype="float64")
        fast = solve(weight, hessian, scheme, dtype="float32")
        assert fast.error == pytest.approx(exact.error, rel=0.03)


SCHEMES = [
    "dense",
    "unstructured@0.37",
    "block4@0.6",
    "2:4",
    "1:4",
    "w8a8",
    "w2-asym",
    "w4g4",
    "w3g8-asym",
    "block4@0.6+w8a8",
    "unstructured@0.9+w4-asym",
    "2:4+w4g4-asym",
    "unstructured@0.999+w4",
]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), blocks=st.integers(1, 4))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", SCHEMES)
def test_what_every_solver_keeps(text, method, seed, rows, blocks):
    scheme = Scheme.parse(text)
    cols = 8 * blocks
    weight, hessian = make_problem(seed, rows, cols)
    before = weight.copy(), hessian.copy()
    solved = solve(weight, hessian, text, method=method, channels=8)
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(hessian, before[1])
    assert (solved.method, solved.scheme) == (method, scheme)
    assert solved.weight.dtype == np.float32
    assert solved.mask.dtype == np.bool_
    assert np.all(solved.weight[~solved.mask] == 0)
    expected = oracle.relative_error(weight, solved.weight.astype(np.float64), hessian)
    assert solved.error == pytest.approx(expected, rel=1e-9, abs=1e-12)

    kind = text.split("@")[0].split("+")[0]
    zeros = int((~solved.mask).sum())
    if kind == "unstructured":
        assert zeros == math.ceil(weight.size * Fraction(str(scheme.pattern.sparsity)))
    elif kind == "block4":
        blocks_of_zeros = ~solved.mask.reshape(-1, 4)
        assert np.all(blocks_of_zeros.all(1) == blocks_of_zeros.any(1))
        assert zeros == 4 * math.ceil(weight.size // 4 * Fraction(str(scheme.pattern.sparsity)))
    elif scheme.pattern is not None:
        kept = solved.mask.reshape(-1, scheme.pattern.m).sum(1)
        assert np.all(kept == scheme.pattern.n)
        assert np.all((solved.weight.reshape(-1, 4) != 0).sum(1) <= scheme.pattern.n)
    else:
        assert zeros == 0

    quantization = scheme.quantization
    if quantization is None:
        assert solved.codes is None
        assert solved.scale is None
        assert solved.zero_point is None
        return
    grids = cols // quantization.group if quantization.group else 1
    assert solved.scale.shape == solved.zero_point.shape == (rows, grids)
    assert (solved.scale.dtype, solved.zero_point.dtype) == (np.float32, np.int8)
    assert solved.codes.dtype == np.int8
    assert solved.codes.min() >= quantization.code_min
    assert solved.codes.max() <= quantization.code_max
    zero = np.repeat(solved.zero_point, cols // grids, axis=1)
    scale = np.repeat(solved.scale, cols // grids, axis=1)
    lifted = (solved.codes.astype(np.float32) - zero.astype(np.float32)) * scale
    np.testing.assert_array_equal(lifted, solved.weight)
    assert np.all(solved.codes[~solved.mask] == zero[~solved.mask])
    if not quantization.asymmetric:
        assert np.all(solved.zero_point == 0)


@pytest.mark.parametrize("text", ["unstructured@0.5", "block4@0.5", "2:4", "w4", "w3", "2:4+w4"])
@pytest.mark.parametrize("seed", range(3))
def test_exact_beats_the_baselines(text, seed):
    weight, hessian = make_problem(seed, 16, 64)
    exact = solve(weight, hessian, text)
    for method in ("magnitude", "rtn"):
        assert exact.error < solve(weight, hessian, text, method=method).error


def test_levels_share_work_and_equal_single_solves():
    weight, hessian = make_problem(5, 8, 32)
    texts = ["unstructured@0.5", "w4a8", "unstructured@0.9", "w4", "block4@0.5+w4", "2:4", "dense"]
    problem = LayerProblem(torch.from_numpy(weight), torch.from_numpy(hessian), channels=32)
    shares = []
    together = solve_levels(problem, texts, dtype="float64", progress=shares.append)
    assert [str(layer.scheme) for layer in together] == texts
    for text, layer in zip(texts, together, strict=True):
        alone = solve64(weight, hessian, text, problem.damping)
        np.testing.assert_array_equal(layer.weight.numpy(), alone.weight)
    np.testing.assert_array_equal(together[1].codes.numpy(), together[3].codes.numpy())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert min(shares) >= 0.0


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_in_torch_out(kind):
    weight, hessian = make_problem(1, 4, 16)
    given_weight = torch.from_numpy(weight).to(kind).requires_grad_()
    solved = solve(given_weight, torch.from_numpy(hessian), "2:4+w4")
    for tensor in (solved.weight, solved.mask, solved.codes, solved.scale, solved.zero_point):
        assert isinstance(tensor, torch.Tensor)
        assert not tensor.requires_grad
    assert solved.weight.dtype == torch.float32
    assert isinstance(solve(weight, hessian, "2:4").weight, np.ndarray)


def test_read_only_and_strided_arrays_are_taken():
    weight, hessian = make_problem(1, 8, 16)
    expected = solve(weight, hessian, "2:4").weight
    odd = np.asfortranarray(weight)
    odd.setflags(write=False)
    hessian.setflags(write=False)
    np.testing.assert_array_equal(solve(odd, hessian, "2:4").weight, expected)


def test_a_row_of_zeros_and_an_all_dead_layer():
    weight, hessian = make_problem(2, 4, 16)
    weight[1] = 0.0
    solved = solve(weight, hessian, "2:4+w4-asym")
    assert np.all(solved.weight[1] == 0)
    assert np.all(np.isfinite(solved.scale) & (solved.scale > 0))
    silent = solve(weight, np.zeros((16, 16)), "w4")
    assert np.all(silent.weight == 0)
    assert silent.error == 0.0


def test_without_a_hessian_the_error_is_the_weights():
    weight, _ = make_problem(2, 4, 16)
    solved = solve(weight, None, "2:4", method="magnitude")
    lost = np.sum((weight - solved.weight) ** 2) / np.sum(weight**2)
    assert solved.error == pytest.approx(lost, rel=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", ["unstructured@0.6", "block4@0.6", "2:4", "w4", "2:4+w4-asym"])
def test_cuda_is_the_cpu(scheme):
    weight, hessian = make_problem(7, 16, 64)
    there = solve(weight, hessian, scheme, dtype="float64", device="cuda")
    here = solve(weight, hessian, scheme, dtype="float64")
    np.testing.assert_allclose(there.weight, here.weight, rtol=1e-6, atol=1e-7)
