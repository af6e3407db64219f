"""`obc-deploy demo --quick`, from the command to the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from obc_deploy.runtimes import sparse

Run = Callable[..., "Answer"]  # noqa: F821

SCHEME = "block4@0.9+w8a8"
MADE = ["measurements.json", "report.html", "table.md", "predicted.svg", "runs", "artifacts"]


@pytest.mark.skipif(not sparse.is_available(), reason="the sparse kernels are not built here")
def test_the_demo_shows_that_all_parts_work(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    asked = ("demo", "--quick", "-r", "onnxruntime", "-r", "ort-sparse", "-o", folder)
    answer = run(*asked, "--json", "-")
    assert answer.code == 0, answer.err
    rows = {(row["variant"], row["runtime"]): row for row in answer.json}
    variants = ("dense-fp32", "dense-int8", SCHEME)
    assert set(rows) == {(v, r) for v in variants for r in ("onnxruntime", "ort-sparse")}
    for row in rows.values():
        assert row["error"] is None
        assert row["accuracy"] >= 0.95
        assert row["latency_ms"]["p50"] > 0.0
    ours, dense = rows[SCHEME, "ort-sparse"], rows["dense-int8", "ort-sparse"]
    assert ours["layers_accelerated"] == ours["layers_total"]
    assert ours["size_bytes"] < 0.25 * dense["size_bytes"]
    assert ours["predicted_speedup"]["bops"] > 30.0
    assert all((folder / name).exists() for name in MADE)
    (compressed,) = (path for path in (folder / "runs").iterdir() if "block4" in path.name)
    audited = run("audit", compressed, "-r", "ort-sparse", "--threads", 1)
    assert audited.code == 0, audited.err
    assert "run as one node, 'region_0'" in " ".join(audited.out.split())
    (folder / "thesis.txt").write_text("mine", encoding="utf-8")
    (folder / ".obc-deploy-demo").unlink()
    again = run(*asked)
    assert again.code == 2
    assert "something else than an earlier demo" in again.err
    assert (folder / "thesis.txt").read_text(encoding="utf-8") == "mine"
