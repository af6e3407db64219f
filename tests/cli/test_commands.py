"""Every command on real, small input, in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from cli_networks import small_network

import obc_deploy
from obc_deploy import native
from obc_deploy.activations import RangeMethod
from obc_deploy.artifacts import load_artifact
from obc_deploy.benchmarks.measurement import Measurement, WorkerSamples, measurement, with_speedups
from obc_deploy.cli import app
from obc_deploy.commands import look, options
from obc_deploy.commands.bench import check_worth
from obc_deploy.compiled_library import missing
from obc_deploy.errors import MeasurementError, SlowerThanDenseError
from obc_deploy.manifest import read_manifest
from obc_deploy.schemes import Scheme
from obc_deploy.solvers.dispatch import METHODS
from obc_deploy.targets import TARGETS

Run = Callable[..., "Answer"]  # noqa: F821

SMALL = "cli_networks:small_network"
QUICK = ("--rounds", 2, "--samples", 3, "--processes", 1, "--threads", 1)


def test_version(run: Run) -> None:
    answer = run("--version")
    assert answer.code == 0
    assert answer.out == f"obc-deploy {obc_deploy.__version__}\n"


def test_no_command_prints_the_help(run: Run) -> None:
    answer = run()
    assert answer.code == 0
    assert "compress" in answer.out
    assert answer.err == ""


def _commands(group: object, prefix: str = "") -> list[tuple[str, object]]:
    found = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += _commands(command, f"{name} ")
        else:
            found.append((prefix + name, command))
    return found


COMMANDS = _commands(typer.main.get_command(app))


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_option_says_what_it_does_and_json_is_everywhere(
    run: Run, name: str, command: object
) -> None:
    assert all(getattr(item, "help", None) for item in command.params if item.name != "help")
    assert any("--json" in item.opts for item in command.params)
    answer = run(*name.split(), "--help")
    assert answer.code == 0
    assert "--json" in answer.out


def test_choices_are_those_of_the_solvers() -> None:
    assert tuple(options.Method) == METHODS
    assert {item.value for item in options.Ranges} == {item.value for item in RangeMethod}


def test_schemes_explains_only_what_parses(run: Run) -> None:
    answer = run("schemes", "--json")
    assert answer.code == 0
    assert answer.json["examples"] == dict(look.EXAMPLES)
    for text in answer.json["examples"]:
        assert str(Scheme.parse(text)) == text
    assert set(answer.json["targets"]) == set(TARGETS)
    assert "block4@0.9+w8a8" in run("schemes").out


def test_doctor_tries_onnxruntime(run: Run) -> None:
    answer = run("doctor", "--json", "-")
    assert answer.code == 0
    works = {info["name"]: info["works"] for info in answer.json["runtimes"]}
    assert works["onnxruntime"] is True
    assert answer.json["machine"]["usable_cores"] >= 1
    assert answer.json["solvers"]["works"] == native.is_available()


def test_doctor_says_why_the_compiled_solvers_are_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_find", lambda: missing("not built: install g++"))
    answer = run("doctor", "--json", "-")
    assert answer.code == 0
    assert answer.json["solvers"] == {
        "works": False, "instruction_set": None, "reason": "not built: install g++",
    }  # fmt: skip


def test_doctor_draws_tables(run: Run) -> None:
    answer = run("doctor")
    assert answer.code == 0
    assert "ONNX Runtime" in answer.out


def test_runtimes_list(run: Run) -> None:
    answer = run("runtimes", "list", "--json")
    assert {info["name"] for info in answer.json} == {"onnxruntime", "deepsparse", "tensorrt"}
    assert "onnxruntime" in run("runtimes", "list").out


def test_runtimes_remove_takes_the_environment_away(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obc_deploy.runtimes import environments

    monkeypatch.setattr(environments, "search_folders", lambda: (tmp_path,))
    environment = environments.DEEPSPARSE
    folder = tmp_path / environment.folder
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    marker = {"requirement": environment.requirement}
    (folder / environments.MARKER).write_text(json.dumps(marker), encoding="utf-8")
    answer = run("runtimes", "remove", "deepsparse", "--json")
    assert answer.code == 0
    assert answer.json == {"removed": str(folder)}
    assert not folder.exists()
    assert run("runtimes", "remove", "deepsparse").code == 2


def test_inspect_counts_as_the_shapes_say(run: Run) -> None:
    answer = run("inspect", SMALL, "--input-shape", "4,8,8", "--json", "-")
    assert answer.code == 0
    layers = {layer["name"]: layer for layer in answer.json["layers"]}
    assert layers["3"] == {
        "name": "3",
        "kind": "conv2d",
        "shape": [16, 8, 3, 3],
        "rows": 16,
        "cols": 72,
        "channels": 8,
        "groups": 1,
        "macs": 16 * 72 * 4 * 4,
        "weights": 16 * 72,
        "patterns": ["unstructured", "block4", "2:4"],
    }
    assert answer.json["macs"] == sum(layer["macs"] for layer in layers.values())


def test_inspect_knows_what_does_not_divide(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "pictures.npy"
    np.save(path, np.zeros((2, 3, 8, 8), np.float32))
    answer = run("inspect", "cli_networks:three_channels", "--calibration", path, "--json")
    assert answer.json["layers"][0]["patterns"] == ["unstructured"]
    assert answer.json["inputs"] == {"input": [3, 8, 8]}


def test_inspect_reads_the_shape_of_an_exported_program(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    example = (torch.zeros(2, 4, 8, 8),)
    torch.export.save(torch.export.export(small_network().eval(), example), path)
    answer = run("inspect", path)
    assert answer.code == 0
    assert "3 layers" in answer.out


def test_compress_wrote_a_run(finished_run: Path, data: Path) -> None:
    model = obc_deploy.load(finished_run)
    assert model.scheme == "block4@0.5+w8a8"
    assert [baseline.role for baseline in model.baselines] == ["dense-fp32", "dense-int8"]
    assert model.manifest.accuracy.samples == 32
    assert model.manifest.model.source == SMALL
    assert model.manifest.calibration.source == str(data)
    assert [path.name for path in finished_run.parent.iterdir()] == [finished_run.name]


def test_compress_takes_every_option(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    answer = run(
        "compress", SMALL, "-c", data, "-s", "2:4+w4g8", "--skip", "7", "--layer", "0=w8a8",
        "--method", "magnitude", "--samples", 16, "--batch-size", 5, "--device", "cpu",
        "--damping", 0.1, "--dtype", "float64", "--ranges", "min-max", "--no-bn-reestimate",
        "--seed", 3, "--no-baselines", "--target", "onnxruntime", "--json", "-", "-o", folder,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    made = answer.json
    assert made["run"] == str(folder)
    assert [layer["scheme"] for layer in made["layers"]] == ["w8a8", "2:4+w4g8", "dense"]
    assert made["calibration"]["samples"] == 16
    settings = made["settings"]
    assert settings["method"] == "magnitude"
    assert settings["damping"] == 0.1
    assert settings["range_method"] == "min-max"
    assert settings["bn_reestimate"] is False
    assert settings["seed"] == 3
    assert settings["target"] == "onnxruntime"
    assert not (folder / "baselines").exists()


def test_fallback_is_for_layers_that_do_not_divide(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "pictures.npy"
    np.save(path, np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    answer = run(
        "compress", "cli_networks:three_channels", "-c", path, "-s", "2:4", "--fallback", "w8a8",
        "--dry-run", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert [layer["scheme"] for layer in answer.json["layers"]] == ["w8a8", "2:4", "2:4"]


def test_dry_run_plans_and_writes_nothing(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("compress", SMALL, "-c", data, "-s", "2:4", "-t", "deepsparse", "-o", folder)
    answer = run(*arguments, "--dry-run")
    assert answer.code == 0
    assert "nothing was written" in answer.out
    assert "has no 2:4 kernels" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_samples_of_a_factory_keep_their_own_preprocessing(run: Run, tmp_path: Path) -> None:
    arguments = ("compress", SMALL, "-c", "cli_networks:prepared_samples", "--method", "rtn")
    own = run(*arguments, "-o", tmp_path / "own", "--json")
    assert own.json["calibration"]["preprocessing"]["scale"] == 0.5
    given = run(*arguments, "--scale", "1/4", "-o", tmp_path / "given", "--json")
    assert given.json["calibration"]["preprocessing"] == {"scale": 0.25, "mean": [], "std": []}


def test_overwrite_replaces_the_run(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("compress", SMALL, "-c", data, "--method", "rtn", "--no-baselines", "-o", folder)
    assert run(*arguments, "-s", "w8a8").code == 0
    assert run(*arguments, "-s", "w4", "--overwrite").code == 0
    assert obc_deploy.load(folder).scheme == "w4"


def test_json_goes_to_a_file_and_words_to_stdout(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    answer = run("inspect", SMALL, "-i", "4,8,8", "--json", path)
    assert "3 layers" in answer.out
    assert len(json.loads(path.read_text(encoding="utf-8"))["layers"]) == 3
    assert [found.name for found in tmp_path.iterdir()] == ["layers.json"]


def test_export_writes_and_checks(run: Run, lone_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    answer = run("export", lone_run, "-t", "onnxruntime", "-o", path, "--dynamic-batch", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["path"] == str(path)
    assert answer.json["size_bytes"] == path.stat().st_size
    assert answer.json["dynamic_batch"] is True
    assert answer.json["parity"]["relative_error"] <= answer.json["parity"]["tolerance"]
    assert any("no sparse kernels" in note for note in answer.json["preflight"])


def test_export_says_what_it_left_out(run: Run, lone_run: Path, tmp_path: Path) -> None:
    answer = run("export", lone_run, "-o", tmp_path / "x.onnx", "--no-check", "--batch-size", 2)
    assert answer.code == 0, answer.err
    assert "not compared" in answer.out


def test_audit_of_a_run_exports_what_is_missing(run: Run, lone_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lone_run, tmp_path / "run")
    answer = run("audit", folder, "--runtime", "onnxruntime", "--threads", 1, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["path"] == str(folder / "artifacts" / "onnxruntime" / "model.onnx")
    assert answer.json["layers_total"] == 3
    assert all(layer["int8"] for layer in answer.json["layers"])


def test_audit_of_an_artifact(run: Run, artifact: Path) -> None:
    answer = run("audit", artifact, "--threads", 1)
    assert answer.code == 0, answer.err
    assert "sparsity makes nothing faster here" in answer.out
    assert "0 of 3 compressed layers" in answer.out


def test_audit_of_a_file_from_elsewhere(run: Run, tmp_path: Path) -> None:
    from obc_deploy.runtimes.doctor import _write_probe

    path = tmp_path / "probe.onnx"
    _write_probe(path)
    answer = run("audit", path, "--threads", 1, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["layers_total"] is None
    assert [layer["operator"] for layer in answer.json["layers"]] == ["MatMul"]


def test_export_of_a_run_takes_no_threads(run: Run, lone_run: Path) -> None:
    answer = run("export", lone_run, "--threads", 2)
    assert answer.code == 2
    assert "--threads 2 is for timing an .onnx file from elsewhere" in answer.err


def test_bench_measures_and_reports(
    run: Run, finished_run: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    answer = run(
        "bench", finished_run, "-r", "onnxruntime", "--data", data, "--json", path,
        "--allow-slower", *QUICK,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert {row["role"] for row in rows} == {"dense-fp32", "dense-int8", "compressed"}
    for row in rows:
        assert row["runtime"] == "onnxruntime"
        assert row["threads"] == 1
        assert row["accuracy_samples"] == 32
        assert row["latency_ms"]["p50"] > 0
        assert row["speedup_vs_dense_fp32"] > 0
    stored = json.loads((finished_run / "measurements.json").read_text(encoding="utf-8"))
    assert stored == rows
    assert "<svg" in (finished_run / "report.html").read_text(encoding="utf-8")
    again = run("report", finished_run, "-o", tmp_path / "again.html", "--json")
    assert again.code == 0
    assert again.json == {"report": str(tmp_path / "again.html"), "measurements": len(rows)}


def test_run_does_it_all(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answer = run(
        "run", SMALL, "-c", data, "-s", "w8a8", "--method", "rtn", "--no-baselines", "-o", folder,
        "--runtime", "onnxruntime", "--threads", 1, "--rounds", 2, "--samples-per-round", 2,
        "--processes", 1, "--allow-slower", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert [row["scheme"] for row in answer.json] == ["w8a8"]
    for name in ("manifest.json", "measurements.json", "report.html"):
        assert (folder / name).is_file()
    target = read_manifest(folder).settings.target
    assert load_artifact(folder / "artifacts" / target / "model.onnx").target == target


def _row(variant: str, runtime: str, ms: float, role: str = "compressed") -> Measurement:
    rounds = tuple((ms + 0.001 * i, ms + 0.002 * i) for i in range(10))
    return measurement(
        variant=variant, scheme="w8a8", runtime=runtime, role=role,
        processes=[WorkerSamples(rounds=rounds), WorkerSamples(rounds=rounds)],
    )  # fmt: skip


def test_slower_everywhere_is_an_error_and_slower_somewhere_is_not() -> None:
    slow = [_row("dense", "a", 1.0, "dense-fp32"), _row("mine", "a", 2.0)]
    fast = [_row("dense", "b", 1.0, "dense-fp32"), _row("mine", "b", 0.5)]
    with pytest.raises(SlowerThanDenseError, match=r"'mine' is slower .*0\.50x in a"):
        check_worth(with_speedups(slow), allow_slower=False)
    check_worth(with_speedups(slow), allow_slower=True)
    check_worth(with_speedups(slow + fast), allow_slower=False)
    assert SlowerThanDenseError.exit_code == 3


def test_nothing_measured_is_an_error() -> None:
    failed = measurement(variant="mine", scheme="w8a8", runtime="a", error="it crashed")
    with pytest.raises(MeasurementError, match="it crashed"):
        check_worth([failed], allow_slower=True)


def test_a_polite_kill_unwinds_the_stack(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from obc_deploy.runtimes import doctor

    unwound = []

    def killed() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(doctor, "diagnose", killed)
    with pytest.raises(SystemExit) as ended:
        run("doctor")
    assert ended.value.code == 143
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is before
