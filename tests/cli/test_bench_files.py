"""`obc-deploy bench` of ONNX files without manifests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from obc_deploy.artifacts import load_artifact
from obc_deploy.commands.bench_files import _names

Run = Callable[..., "Answer"]  # noqa: F821

QUICK = ("--rounds", 2, "--samples", 3, "--processes", 1, "--threads", 1)


@pytest.fixture
def plain(artifact: Path, tmp_path: Path) -> Path:
    """An exported file that has lost its manifest."""
    return Path(shutil.copy(artifact, tmp_path / "plain.onnx"))


def test_files_are_timed_beside_the_first(run: Run, plain: Path, artifact: Path) -> None:
    answer = run("bench", plain, artifact, *QUICK, "--json", "-")
    assert answer.code == 0, answer.err
    first, second = answer.json
    assert (first["path"], second["path"]) == (str(plain), str(artifact))
    assert first["speedup"] == 1.0
    assert second["interval"][0] <= second["speedup"] <= second["interval"][1]
    assert second["difference"] == 0.0
    assert first["size_bytes"] == second["size_bytes"] == plain.stat().st_size
    assert second["latency_ms"]["p50"] > 0.0


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_names_the_files_in_any_terminal(
    run: Run, plain: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    table = run("bench", plain, artifact, *QUICK)
    assert table.code == 0
    together = "".join(table.out.split())
    for words in ("plain.onnx", "vsthefirst", "0.0e+00", "onnxruntime,batch1,1thread"):
        assert words in together
    lines = [line for line in table.out.splitlines() if not line.startswith("note:")]
    assert max(map(len, lines)) <= width


def test_what_all_paths_share_is_left_out(tmp_path: Path) -> None:
    a, b = tmp_path / "runs" / "a" / "model.onnx", tmp_path / "runs" / "b.onnx"
    assert _names([a, b]) == ["a/model.onnx", "b.onnx"]
    assert _names([a, a]) == ["model.onnx", "model.onnx"]


def test_one_file_in_the_runtime_that_it_was_made_for(run: Run, plain: Path) -> None:
    answer = run("bench", plain, *QUICK, "--json", "-")
    assert answer.code == 0
    (row,) = answer.json
    assert (row["runtime"], row["speedup"]) == ("onnxruntime", 1.0)
    # ort-sparse is ONNX Runtime too: the same file in the same runtime is timed once.
    answer = run("bench", plain, "-r", "onnxruntime", "-r", "ort-sparse", *QUICK, "--json", "-")
    assert len(answer.json) == 1


def test_files_with_manifests_are_measured_as_ever(run: Run, artifact: Path) -> None:
    answer = run("bench", artifact, *QUICK, "--json", "-", "--allow-slower")
    assert answer.code == 0, answer.err
    assert answer.json[0]["variant"] == load_artifact(artifact).scheme


def _fails(answer: object, *names: str) -> None:
    assert answer.code == 2, answer
    assert answer.err.startswith("error: ")
    for name in names:
        assert name in answer.err


def test_what_cannot_be_measured_together(
    run: Run, plain: Path, lone_run: Path, data: Path, tmp_path: Path
) -> None:
    _fails(run("bench", plain, lone_run), "plain.onnx", str(lone_run), "exported file")
    _fails(run("bench", plain, "--data", data), "--data", "manifest")
    _fails(run("bench", plain, "--report", tmp_path / "r.html"), "--report", "manifest")
    _fails(run("bench", plain, tmp_path / "none.onnx", *QUICK), "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no graph" * 20)
    _fails(run("bench", broken, plain, *QUICK), "broken.onnx")
    _fails(run("bench", plain, broken, *QUICK), "broken.onnx", "could not be timed")
