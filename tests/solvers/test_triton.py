"""The Triton kernels against brute force and against the torch solver.

Without a GPU they run in Triton's interpreter, on CPU tensors; with one, compiled, on that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings

import numpy as np
import oracle
import pytest
import torch
from devices import CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import make_problem, problems
from test_native import DAMPING, brute_force, case, is_regular, layer

from obc_deploy.errors import ProblemError
from obc_deploy.solvers import LayerProblem, SolverSettings, solve_levels, triton_steps
from obc_deploy.solvers.exact_obs import _columns, trace_blocks, trace_weights
from obc_deploy.solvers.native_rows import SlowSolverWarning
from obc_deploy.solvers.problems import check_problem, damp

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled here")),
        CUDA,
    ]
)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _few_vectors_ahead(monkeypatch):
    """The interpreter takes its time over those beyond the end; three divide no update evenly."""
    if INTERPRETED:
        monkeypatch.setattr(triton_steps, "_MOST_AHEAD", 3)


def by_triton(lazy=None, dtype=torch.float64):
    return SolverSettings(dtype, lazy=lazy, native=False, triton=True)


def by_torch(lazy=None, dtype=torch.float64):
    return SolverSettings(dtype, lazy=lazy, native=False, triton=False)


def silent(share):
    pass


# Widths that are no power of two nor whole updates; a Hessian for each row; dead inputs; rows of
# zeros, all of whose columns cost the same; `lazy` steps between two updates.
COLUMNS = [((1, 1), 4), ((3, 7, 3), 4), ((2, 17, 1, 2), 8), ((1, 33), 32), ((2, 12, 1, 0, 1), 8)]
BLOCKS = [((1, 4), 4), ((2, 8, 2), 8), ((1, 28, 1, 2), 8), ((2, 12, 1, 0, 1), 4)]
TASKS = [
    *((each, "unstructured@0.6") for each in COLUMNS),
    *((each, "block4@0.5") for each in BLOCKS),
    *((each, text) for each in BLOCKS[1:] for text in ("2:4", "1:4")),
    *((each, "w2") for each in COLUMNS),
    *((each, "w4-asym") for each in COLUMNS[1:3]),
    *((each, text) for each in BLOCKS[2:] for text in ("w3g4-asym", "2:4+w4")),
]


@pytest.mark.parametrize(("problem", "text"), TASKS, ids=str)
def test_every_kind_is_brute_force(problem, text, device):
    shape, lazy = problem
    expected, error, codes = brute_force(shape, text)
    found = solve_levels(layer(*case(*shape)), [text], settings=by_triton(lazy), device=device)[0]
    assert found.error == pytest.approx(error, rel=1e-6, abs=1e-12)
    np.testing.assert_allclose(found.weight, expected, rtol=1e-6, atol=1e-7)
    if is_regular(shape):
        np.testing.assert_array_equal(found.mask, expected != 0 if codes is None else found.mask)
    if codes is not None:
        np.testing.assert_array_equal(found.codes, codes)


@pytest.mark.parametrize("shape", [(1, 28), (3, 8, 3), (2, 12, 1, 2)])
@pytest.mark.parametrize("width", [1, 4])
def test_traces_lose_what_brute_force_loses(shape, width, device):
    weight, hessian = case(*shape)
    problem = damp(
        check_problem(layer(weight, hessian), needs_hessian=True, device=torch.device(device))
    )
    trace = (trace_blocks if width == 4 else trace_weights)(problem, by_triton(8), silent)
    stiff = oracle.row_hessians(oracle.damped(hessian, DAMPING), len(weight))
    alive = oracle.without_dead(weight, hessian)
    for found, w, h in zip(trace.increase.cpu(), alive, stiff, strict=True):
        expected, _ = oracle._trace(w[None], h, width)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("group", "zeros"), [(16, 16), (4, 2), (8, 3)])
def test_ties_go_where_the_torch_solver_takes_them(group, zeros, device):
    weight = torch.ones(3, 16, dtype=torch.float64)
    weight[1] = 0.0
    weight[2, ::2] = -1.0
    problem = damp(
        check_problem(
            LayerProblem(weight, torch.eye(16, dtype=torch.float64), damping=0.0),
            needs_hessian=True,
            device=torch.device(device),
        )
    )
    order, increase = _columns(problem, by_triton(8), silent, group=group, zeros=zeros)
    expected, costs = _columns(problem, by_torch(8), silent, group=group, zeros=zeros)
    torch.testing.assert_close(order, expected, rtol=0, atol=0)
    torch.testing.assert_close(increase, costs)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    problem=problems(multiple=4),
    lazy=st.sampled_from([4, 8, 32]),
    text=st.sampled_from(
        ["unstructured@0.7", "block4@0.5", "2:4", "3:4", "w3", "w4g4-asym", "2:4+w2-asym"]
    ),
)
@pytest.mark.skipif(not INTERPRETED, reason="compiled here")
def test_the_kernels_are_the_torch_solver(problem, lazy, text):
    weight, hessian, damping = problem
    given_layer = layer(weight, hessian, damping)
    found = solve_levels(given_layer, [text], settings=by_triton(lazy))[0]
    expected = solve_levels(given_layer, [text], settings=by_torch(lazy))[0]
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.mask, expected.mask)
    if expected.codes is not None:
        torch.testing.assert_close(found.codes, expected.codes)


@pytest.mark.parametrize("text", ["unstructured@0.7", "block4@0.5", "2:4", "w4-asym"])
def test_float32_is_near_float64(text, device):
    problem = layer(*case(1, 36))
    fast = solve_levels(problem, [text], settings=by_triton(None, torch.float32), device=device)
    exact = solve_levels(problem, [text], settings=by_torch())
    assert fast[0].error == pytest.approx(exact[0].error, rel=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(64, 576), (33, 300, 3), (4, 2304)])
@pytest.mark.parametrize("text", ["unstructured@0.7", "block4@0.5", "2:4", "w3-asym", "2:4+w4"])
def test_layers_of_real_width_on_cuda(shape, text):
    problem = LayerProblem(*map(torch.from_numpy, make_problem(5, *shape)))
    found = solve_levels(problem, [text], settings=by_triton(), device="cuda")[0]
    expected = solve_levels(problem, [text], settings=by_torch(), device="cuda")[0]
    assert found.error == pytest.approx(expected.error, rel=1e-9)
    torch.testing.assert_close(found.mask, expected.mask)
    fast = SolverSettings()
    assert triton_steps.is_triton(fast, torch.device("cuda"))
    quick = solve_levels(problem, [text], settings=fast, device="cuda")[0]
    assert quick.error == pytest.approx(expected.error, rel=0.03)


def test_settings_say_where_kernels_run():
    assert not triton_steps.is_triton(SolverSettings(), torch.device("cpu"))
    assert not triton_steps.is_triton(SolverSettings(triton=False), torch.device("cuda"))


@pytest.fixture
def without_triton(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(triton_steps, "_kernels", missing)
    triton_steps.why_not.cache_clear()
    triton_steps._warn.cache_clear()
    yield
    triton_steps.why_not.cache_clear()
    triton_steps._warn.cache_clear()


def test_without_triton_torch_takes_over_and_says_so_once(without_triton):
    cuda = torch.device("cuda")
    with pytest.warns(SlowSolverWarning, match="Triton is not installed: install"):
        assert not triton_steps.is_triton(SolverSettings(), cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_steps.is_triton(SolverSettings(), cuda)
    with pytest.raises(ProblemError, match="triton=True, but Triton is not installed"):
        solve_levels(layer(*case(1, 5)), ["w4"], settings=by_triton())


IN_A_PROCESS = """
    import torch
    from obc_deploy.errors import ProblemError
    from obc_deploy.solvers import LayerProblem, SolverSettings, solve_levels

    problem = LayerProblem(torch.ones(1, 4), torch.eye(4, dtype=torch.float64))
    try:
        solve_levels(problem, ["2:4"], settings=SolverSettings(native=False, triton=True))
    except ProblemError as error:
        print(error)

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from obc_deploy.solvers import triton_kernels

    constants = {"BLOCK": 128, "AHEAD": 1, "GROUPED": True, "entry_stride": 1}
    for name in ("prune_columns", "quantize", "prune_blocks"):
        kernel = getattr(triton_kernels, name)
        types = {}
        for argument in kernel.arg_names:
            pointer = "*i64" if argument in ("column", "given", "order") else "*fp32"
            number = argument.endswith("stride") or argument in triton_kernels._COUNTS
            types[argument] = "i32" if number else pointer
            types[argument] = "constexpr" if argument in constants else types[argument]
        fixed = {(kernel.arg_names.index(key),): value
                 for key, value in constants.items() if key in kernel.arg_names}
        options = {"num_warps": 4, "enable_fp_fusion": True}
        made = compile(ASTSource(kernel, types, fixed), target=GPUTarget("cuda", 80, 32),
                       options=options)
        print(name, len(made.asm["cubin"]) > 0)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device works here")
def test_kernels_compile_but_do_not_run_on_the_cpu(tmp_path):
    """The interpreter takes more than the compiler does; ours makes machine code without a GPU."""
    variables = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = re.sub("^ {4}", "", IN_A_PROCESS, flags=re.MULTILINE)
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=variables
    )
    assert answer.returncode == 0, answer.stderr
    said, *made = answer.stdout.splitlines()
    assert said.startswith("triton=True, but Triton does not run on 'cpu'")
    assert made == ["prune_columns True", "quantize True", "prune_blocks True"]
