"""Finding, switching and sharing the library; what the package's build is told of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sparse_models import FLOAT, UINT8, Graph, block_sparse, blocks_of, instruction_sets

from obc_deploy.compiled_library import missing
from obc_deploy.runtimes import sparse

ROOT = Path(__file__).parents[3]
SPARSE = ROOT / "runtimes" / "sparse"
available = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())


def in_a_process(**variables: str) -> list[str]:
    """What the module says in another process."""
    code = (
        "from obc_deploy.runtimes import sparse; print(sparse.is_available()); "
        "print(sparse.why_missing()); print(sparse.is_available() and sparse.instruction_set())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return answer.stdout.splitlines()


def test_the_variable_switches_them_off():
    said = in_a_process(**{sparse.DISABLE_VARIABLE: "0"})
    assert said == ["False", "OBC_DEPLOY_SPARSE=0 switches them off", "False"]


def test_a_library_that_does_not_load_says_so(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    works, reason, _ = in_a_process(**{sparse.LIBRARY_VARIABLE: str(broken)})
    assert works == "False"
    assert "'broken.so' does not load" in reason
    assert "unset OBC_DEPLOY_SPARSE_LIBRARY" in reason


def test_without_the_library_its_path_is_an_error(monkeypatch):
    monkeypatch.setattr(sparse, "_find", lambda: missing("not built"))
    assert not sparse.is_available()
    for call in (sparse.library_path, sparse.instruction_set):
        with pytest.raises(OSError, match="the sparse kernels are missing: not built"):
            call()


@available
def test_an_instruction_set_may_be_named_from_outside():
    for name in instruction_sets():
        assert in_a_process(**{sparse.INSTRUCTIONS_VARIABLE: name}) == ["True", "", name]
    works, reason, _ = in_a_process(**{sparse.INSTRUCTIONS_VARIABLE: "sse9"})
    assert works == "False"
    assert reason.startswith("OBC_DEPLOY_SPARSE_INSTRUCTIONS=sse9 does not work on this processor")


@available
def test_the_best_instruction_set_is_in_use_and_back_after_another():
    best = instruction_sets()[-1]
    if not os.environ.get(sparse.INSTRUCTIONS_VARIABLE):
        assert sparse.instruction_set() == best
    before = sparse.instruction_set()
    with sparse.use_instruction_set("portable"):
        assert sparse.instruction_set() == "portable"
    assert sparse.instruction_set() == before
    with (
        pytest.raises(ValueError, match="'mmx' does not work here"),
        sparse.use_instruction_set("mmx"),
    ):
        pass


@available
def test_a_session_is_run_by_many_threads_at_once():
    random = np.random.default_rng(0)
    weight = block_sparse(random, 24, 16, 3, 3, 0.5)
    graph = Graph()
    images = [random.integers(0, 256, (1 + i % 3, 16, 9, 9)).astype(np.uint8) for i in range(24)]
    graph.input("x", images[0], ["N", 16, 9, 9])
    blocked = graph.sparse("ToBlocks", ["x"], border=1, zero_point=3)
    inputs = [blocked, *(graph.constant(part) for part in blocks_of(weight))]
    grids = {"input_scale": 0.1, "input_zero_point": 3}
    convolved = graph.sparse(
        "SparseConvolution", [*inputs, graph.constant(np.float32([0.01]))], channels=16,
        kernel_shape=[3, 3], pads=[1] * 4, input_border=1, output_scale=0.5, output_zero_point=99,
        **grids,
    )  # fmt: skip
    plain = graph.sparse("FromBlocks", [convolved], channels=24)
    rows = graph.add("Flatten", [plain], axis=2)
    linear = block_sparse(random, 7, 81, 1, 1, 0.5)
    inputs = [rows, *(graph.constant(part) for part in blocks_of(linear))]
    out = graph.sparse(
        "SparseLinearDequantize", [*inputs, graph.constant(np.float32([0.01]))], features=81,
        **grids,
    )  # fmt: skip
    session = graph.session({plain: UINT8, out: FLOAT}, threads=2)
    alone = [session.run(None, {"x": image}) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: session.run(None, {"x": image}), images * 3))
    for found, wanted in zip(together, alone * 3, strict=True):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_build_knows_every_source_and_header():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = (
        each
        for each in project["tool"]["setuptools"]["ext-modules"]
        if each["name"] == "obc_deploy.runtimes.sparse._kernels"
    )
    for entry, pattern in (("sources", "*.cpp"), ("depends", "*.hpp")):
        there = sorted(f"obc_deploy/runtimes/{path.relative_to(SPARSE.parent)}"
                       for path in SPARSE.rglob(pattern))  # fmt: skip
        assert sorted(extension[entry]) == there
    assert "-ffp-contract=off" in extension["extra-compile-args"]


def test_every_operator_is_specified():
    page = (SPARSE / "OPERATORS.md").read_text()
    names = {
        line.split('"')[1]
        for path in (SPARSE / "operators").glob("*.hpp")
        for line in path.read_text().splitlines()
        if "kName = " in line
    }
    assert len(names) == 16
    headings = " ".join(line for line in page.splitlines() if line.startswith("### "))
    assert names == set(headings.replace("###", "").replace(",", "").split())
