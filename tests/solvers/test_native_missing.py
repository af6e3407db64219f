"""Without the compiled solvers: one warning where they should be there, and the same results."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_exact import make_problem

import obc_deploy
from obc_deploy import native
from obc_deploy.compiled_library import missing
from obc_deploy.solvers import native_rows, solve

SCHEMES = ("unstructured@0.6", "block4@0.5", "2:4+w4-asym")

SOLVE_IN_A_PROCESS = """
    import sys, warnings
    import numpy as np
    from obc_deploy import native
    from obc_deploy.solvers import solve
    from obc_deploy.solvers.native_rows import SlowSolverWarning

    problem = np.load(sys.argv[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [solve(problem["weight"], problem["hessian"], text, dtype="float64").weight
                 for text in sys.argv[3:] * 2]
    np.savez(sys.argv[2], *found)
    print(native.__file__)
    print(native.is_available(), native.why_missing())
    print(sum(issubclass(each.category, SlowSolverWarning) for each in caught), len(caught))
"""


@pytest.fixture
def problem():
    return make_problem(11, 6, 40)


def check_in_a_process(problem, folder, **variables):
    """Solve in another process; the lines it prints."""
    weight, hessian = problem
    np.savez(folder / "problem.npz", weight=weight, hessian=hessian)
    answer = subprocess.run(
        [sys.executable, "-c", re.sub("^ {4}", "", SOLVE_IN_A_PROCESS, flags=re.MULTILINE),
         folder / "problem.npz", folder / "solved.npz", *SCHEMES],
        capture_output=True, text=True, cwd=folder, env={**os.environ, **variables},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    found = np.load(folder / "solved.npz")
    for i, text in enumerate(SCHEMES * 2):
        expected = solve(weight, hessian, text, dtype="float64").weight
        np.testing.assert_allclose(found[f"arr_{i}"], expected, rtol=1e-6, atol=1e-7)
    return answer.stdout.splitlines()


def test_the_variable_switches_them_off_without_a_warning(problem, tmp_path):
    _, available, caught = check_in_a_process(problem, tmp_path, OBC_DEPLOY_NATIVE="0")
    assert available == "False OBC_DEPLOY_NATIVE=0 switches them off"
    assert caught == "0 0"


def test_another_build_that_does_not_load_is_said(problem, tmp_path):
    broken = tmp_path / "rows.so"
    broken.write_text("no library")
    _, available, caught = check_in_a_process(
        problem, tmp_path, OBC_DEPLOY_NATIVE_LIBRARY=str(broken)
    )
    assert available.startswith("False 'rows.so' does not load (")
    assert available.endswith(": unset OBC_DEPLOY_NATIVE_LIBRARY")
    assert caught == "1 1"


@pytest.mark.parametrize("library", ["missing", "of something else"])
def test_a_package_without_the_library_warns_once(library, problem, tmp_path):
    """A copy of the package, as an installation without a C++ compiler leaves it."""
    source = Path(obc_deploy.__file__).parent
    package = tmp_path / "copy" / "obc_deploy"
    package.mkdir(parents=True)
    for file in source.glob("*.py"):
        shutil.copy(file, package)
    for folder in ("native", "solvers"):
        ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
        shutil.copytree(source / folder, package / folder, ignore=ignored)
    file = package / "native" / "_rows.so"
    if library == "of something else":
        import _ctypes

        shutil.copy(_ctypes.__file__, file)
    found, available, caught = check_in_a_process(
        problem, tmp_path, PYTHONPATH=str(package.parent), OBC_DEPLOY_NATIVE=""
    )
    assert found == str(package / "native" / "__init__.py")
    said = "not built: install a C++17" if library == "missing" else "'_rows.so' does not load"
    assert available.startswith(f"False {said}")
    assert caught == "1 1"


def test_the_warning_says_what_is_wrong(problem, monkeypatch):
    monkeypatch.setattr(native, "_find", lambda: missing("its file is gone: reinstall"))
    native_rows._warn.cache_clear()
    assert not native.is_available()
    try:
        with pytest.warns(native_rows.SlowSolverWarning, match="its file is gone: reinstall"):
            slow = solve(*problem, "2:4", dtype="float64")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = solve(*problem, "2:4", dtype="float64")
    finally:
        native_rows._warn.cache_clear()
    np.testing.assert_array_equal(slow.weight, again.weight)
    with pytest.raises(OSError, match="the compiled solvers are missing: its file is gone"):
        native.library()
