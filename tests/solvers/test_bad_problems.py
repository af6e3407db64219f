"""What no solver can work on: one line that names the layer, the value and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from obc_deploy.errors import ProblemError, SchemeError
from obc_deploy.schemes import Scheme
from obc_deploy.solvers import LayerProblem, SolverSettings, check_scheme, needs_hessian, solve
from obc_deploy.solvers.problems import check_problem


def good(rows=4, cols=12):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((cols, 4 * cols))
    return rng.standard_normal((rows, cols)), inputs @ inputs.T / cols


def changed(array, where, value):
    array = array.copy()
    array[where] = value
    return array


W, H = good()
BAD = {
    "nan weight": (changed(W, (1, 2), np.nan), H, r"weight\[1, 2\] = nan"),
    "infinite weight": (changed(W, (3, 0), np.inf), H, r"weight\[3, 0\] = inf"),
    "too large for float32": (changed(W, (0, 0), 1e300), H, r"weight\[0, 0\] = 1e\+300"),
    "nan hessian": (W, changed(H, (5, 6), np.nan), r"hessian\[5, 6\] of group 0 is nan"),
    "asymmetric hessian": (W, changed(H, (5, 6), 9.0), "not symmetric"),
    "negative diagonal": (W, changed(H, (2, 2), -1.0), r"hessian\[2, 2\] of group 0 is -1"),
    "small hessian": (W, H[:8, :8], r"\(8, 8\) does not fit a weight of 4x12"),
    "flat hessian": (W, H[0], r"\(12,\) does not fit"),
    "odd groups": (W, np.stack([H] * 3), "3 Hessian groups do not divide its 4 rows"),
    "no rows": (W[:0], H, r"shape \(0, 12\)"),
    "no columns": (W[:, :0], H[:0, :0], r"shape \(4, 0\)"),
    "a kernel": (W.reshape(4, 3, 4), H, r"shape \(4, 3, 4\)"),
    "integers": (W.astype(np.int64), H, "int64"),
    "text": (W.astype(str), H, "dtype <U"),
    "no hessian": (W, None, "hessian is None"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_arrays_are_named(case):
    weight, hessian, message = BAD[case]
    with pytest.raises(ProblemError, match=message) as caught:
        solve(weight, hessian, "w4", name="conv7")
    assert "conv7" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 5}, "channels=5 does not divide its 12 columns"),
        ({"damping": -0.1}, "damping -0.1"),
        ({"damping": float("nan")}, "damping nan"),
        ({"method": "best"}, "method 'best' is unknown; use one of exact_obs"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"device": "gpu0"}, "device 'gpu0'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ProblemError, match=message):
        solve(W, H, "w4", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device works here")
def test_a_missing_cuda_device_is_named():
    with pytest.raises(ProblemError, match="no CUDA device works here"):
        solve(W, H, "w4", device="cuda")


@pytest.mark.parametrize(
    ("scheme", "channels", "message"),
    [
        ("2:4", 3, "multiples of 4, but layer 'conv7' (4x12) has 3"),
        ("4:8", 12, "multiples of 8, but layer 'conv7' (4x12) has 12"),
        ("block4@0.5+w8a8", 6, "multiples of 4, but layer 'conv7' (4x12) has 6"),
        ("w4g5", 12, "do not divide the 12 columns of layer 'conv7'"),
        ("w4g128", None, "do not divide the 12 columns of layer 'conv7'"),
    ],
)
@pytest.mark.parametrize("method", ["exact_obs", "magnitude"])
def test_schemes_that_do_not_fit(scheme, channels, message, method):
    with pytest.raises(SchemeError) as caught:
        solve(W, H, scheme, channels=channels, method=method, name="conv7")
    assert message in str(caught.value)
    with pytest.raises(SchemeError):
        check_scheme(Scheme.parse(scheme), rows=4, cols=12, channels=channels, name="conv7")


def test_a_singular_hessian_names_the_damping_that_works():
    few = np.random.default_rng(1).standard_normal((12, 5))
    singular = few @ few.T
    with pytest.raises(ProblemError, match="singular with damping=0; damping=") as caught:
        solve(W, singular, "2:4", damping=0.0, name="conv7")
    named = float(str(caught.value).split("damping=")[2].split(" ")[0])
    assert 0.0 < named < 1.0
    fast, exact = (
        solve(W, singular, "2:4", damping=named, dtype=dtype) for dtype in ("float32", "float64")
    )
    assert fast.error == pytest.approx(exact.error, rel=0.1)


def test_an_indefinite_hessian_is_no_hessian():
    indefinite = H.copy()
    indefinite[0, 1] = indefinite[1, 0] = 50 * np.abs(H).max()
    with pytest.raises(ProblemError, match="not positive semi-definite"):
        solve(W, indefinite, "2:4", damping=0.0)


def test_which_methods_need_a_hessian():
    assert needs_hessian(None)
    assert needs_hessian("exact_obs")
    assert not needs_hessian("magnitude")
    assert not needs_hessian("rtn")
    with pytest.raises(ProblemError, match="unknown"):
        needs_hessian("best")


@pytest.mark.parametrize("lazy", [0, 2, 6])
def test_update_vectors_come_in_whole_blocks(lazy):
    with pytest.raises(ProblemError, match=f"lazy={lazy} "):
        SolverSettings(lazy=lazy)


@pytest.mark.parametrize("threads", [0, -2])
def test_rows_need_a_thread(threads):
    with pytest.raises(ProblemError, match=f"threads={threads} "):
        SolverSettings(threads=threads)


@pytest.mark.parametrize("cols", [1, 12])
def test_a_hessian_laid_out_by_columns_is_taken_and_left_alone(cols):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((cols, 40)))
    hessian = (x @ x.T).T
    before = hessian.clone()
    weight = torch.ones(3, cols)
    checked = check_problem(
        LayerProblem(weight, hessian), needs_hessian=True, device=torch.device("cpu")
    )
    assert checked.hessian.data_ptr() != hessian.data_ptr()
    torch.testing.assert_close(hessian, before, rtol=0, atol=0)
    torch.testing.assert_close(checked.hessian[0], before)
