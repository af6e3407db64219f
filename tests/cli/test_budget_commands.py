"""`compress --budget`, `--max-drop` and `curve`, on a small network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = "cli_networks:small_network"
Run = Callable[..., object]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("OBC_DEPLOY_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))


def test_a_budget_is_kept_and_on_record(run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answer = run(
        "compress", SMALL, "-c", data, "-b", "macs:1.5x,size:1.4x", "--levels", "block4,dense",
        "--search-time", 1, "--free-edges", "--no-baselines", "-o", folder,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["scheme"] == "macs:1.5x,size:1.4x"
    plan = manifest["plan"]
    assert plan["factors"]["macs"] >= 1.5 - 1e-9
    assert plan["factors"]["size"] >= 1.4 - 1e-9
    assert plan["calibration_loss"] <= plan["start_loss"]
    left = sum(round(one["macs"] * one["density"]) for one in manifest["layers"])
    assert sum(one["macs"] for one in manifest["layers"]) / left >= 1.5 * (1 - 0.02)
    assert "Plan for macs:1.5x,size:1.4x" in answer.out
    assert "predicted, over dense: macs" in answer.out


def test_run_takes_budgets_too(run, data: Path, tmp_path: Path) -> None:
    """From a model to measurements, with the schemes searched for on the way."""
    answer = run(
        "run", SMALL, "-c", data, "-b", "macs:1.3x", "--levels", "block4,dense", "--search-time", 0,
        "--free-edges", "-r", "onnxruntime", "--threads", 1, "--rounds", 1, "--processes", 1,
        "--allow-slower", "-o", tmp_path / "run", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["plan"]["factors"]["macs"] >= 1.3 - 1e-9
    rows = answer.json["measurements"] if isinstance(answer.json, dict) else answer.json
    assert {row["role"] for row in rows} >= {"compressed"}


def test_a_dry_run_estimates_and_writes_nothing(run, data: Path, tmp_path: Path) -> None:
    answer = run(
        "compress", SMALL, "-c", data, "-b", "macs:2x", "--database", tmp_path / "none",
        "--dry-run", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["database"]["missing"] > 0
    assert found["database"]["seconds"] > 0
    assert found["database"]["disk_bytes"] < found["database"]["dense_bytes"]
    assert found["networks_to_time"] == 0
    assert list(tmp_path.iterdir()) == []


def test_latency_is_measured_and_met(run, data: Path, tmp_path: Path) -> None:
    """ONNX Runtime gains nothing from zeros: what matters here is that the table is made."""
    answer = run(
        "compress", SMALL, "-c", data, "-b", "latency:1.01x", "-t", "onnxruntime-qoperator",
        "--levels", "2:4+w8a8,w8a8", "--search-time", 0, "--threads", 1, "--no-baselines",
        "-o", tmp_path / "run", "--json",
    )  # fmt: skip
    if answer.code != 0:
        # A network this small may be slower in int8 than in float: then that is what it says.
        assert answer.code == 2
        assert "best reachable is latency:" in answer.err
        return
    plan = answer.json["plan"]
    assert plan["dense_ms"] / plan["predicted_ms"] >= 1.01 - 1e-9


def test_the_largest_saving_within_a_drop(run, data: Path, tmp_path: Path) -> None:
    answer = run(
        "compress", SMALL, "-c", data, "--eval", data, "--max-drop", 100, "--by", "macs",
        "--levels", "block4,dense", "--search-time", 0, "--no-baselines", "-o", tmp_path / "run",
        "--json", tmp_path / "result.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    manifest = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    # 100 points may be lost: the cheapest plan of all.
    assert manifest["plan"]["factors"]["macs"] > 1.5
    assert answer.out.count("loses") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-b", "macs:2x", "-s", "w8a8"), "leave --scheme out"),
        (("-b", "macs:2x", "--max-drop", "1"), "each other's reverse"),
        (("-b", "macs:0.5x"), "a factor is above 1"),
        (("-b", "speed:2x"), "no metric 'speed'"),
        (("-b", "latency:900x", "--levels", "w8a8,dense"), "best reachable"),
        (("-b", "macs:900x"), "best reachable"),
        (("-b", "macs:2x", "--levels", "block5"), "cannot read family 'block5'"),
        (("-b", "macs:2x", "--layer", "nothing=w8"), "nothing"),
        (("--max-drop", "1", "--by", "macs"), "--eval"),
        (("--max-drop", "-1"), "points of accuracy"),
        (
            ("-b", "latency:2x", "-t", "onnxruntime", "--latency-table", "none.json"),
            "cannot read latency table 'none.json'",
        ),
    ],
)
def test_what_cannot_be_done_is_said(run, data: Path, tmp_path: Path, options, said: str) -> None:
    answer = run(
        "compress", SMALL, "-c", data, "-o", tmp_path / "run", "--search-time", 0, *options
    )
    assert answer.code == 2
    assert said in answer.err
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_curve_is_measured_and_goes_on_where_it_was(run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "curve"
    command = (
        "curve", SMALL, "-c", data, "--eval", data, "-t", "onnxruntime-qoperator",
        "-b", "macs:1.2x", "-b", "macs:1.3x", "--uniform", "2:4+w8a8",
        "--levels", "2:4+w8a8,w8a8", "--search-time", 0, "--threads", 1, "--rounds", 1,
        "-o", folder, "--json",
    )  # fmt: skip
    answer = run(*command)
    assert answer.code == 0, answer.err
    points = answer.json["points"]
    assert [(one["name"], one["kind"]) for one in points] == [
        ("macs:1.2x", "plan"), ("macs:1.3x", "plan"), ("2:4+w8a8", "uniform"),
    ]  # fmt: skip
    for one in points:
        assert one["measured"] > 0
        assert one["accuracy"] is not None
    for name in ("curve.svg", "curve.md", "curve.json", "measurements.json"):
        assert (folder / name).is_file()
    made = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/manifest.json")}
    assert len(made) == 3
    again = run(*command)
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in made} == made
