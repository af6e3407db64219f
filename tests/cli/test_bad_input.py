"""Bad input: exit code 2, one line that names the value, and nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

Run = Callable[..., "Answer"]  # noqa: F821

SMALL = "cli_networks:small_network"


def _fails(answer: object, *names: str) -> None:
    assert answer.code == 2, answer
    assert answer.out == ""
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: ")
    assert "unexpected" not in lines[0]
    for name in names:
        assert name in lines[0]


def _array(folder: Path, *shape: int) -> Path:
    path = folder / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    return path


def _nan_data(folder: Path) -> Path:
    values = np.zeros((4, 4, 8, 8), np.float32)
    values[2, 0, 1, 1] = np.nan
    np.save(folder / "x.npy", values)
    return folder / "x.npy"


def _broken_npz(folder: Path) -> Path:
    path = folder / "x.npz"
    path.write_bytes(b"PK\x03\x04 and no more")
    return path


def _empty_folder(folder: Path) -> Path:
    path = folder / "pictures"
    path.mkdir()
    return path


def _unreadable_picture(folder: Path) -> Path:
    path = folder / "pictures"
    path.mkdir()
    (path / "a.png").write_bytes(b"no picture")
    return path


DATA = {
    "NaN": (_nan_data, ("sample 2", "NaN")),
    "empty array": (lambda folder: _array(folder, 0, 4, 8, 8), ("empty",)),
    "other channels": (lambda folder: _array(folder, 4, 5, 8, 8), ("(2, 5, 8, 8)",)),
    "too few axes": (lambda folder: _array(folder, 4, 8), ("(2, 8)",)),
    "no such file": (lambda folder: folder / "none.npz", ("none.npz",)),
    "damaged file": (_broken_npz, ("x.npz",)),
    "empty folder": (_empty_folder, ("pictures", "no picture")),
    "damaged picture": (_unreadable_picture, ("a.png",)),
    "no such factory": (lambda folder: "cli_networks:nothing", ("nothing",)),
    "no data at all": (lambda folder: "whatever", ("whatever",)),
}


@pytest.mark.parametrize(("make", "names"), DATA.values(), ids=DATA.keys())
def test_calibration_data(
    run: Run, tmp_path: Path, make: Callable[[Path], object], names: tuple[str, ...]
) -> None:
    answer = run("compress", SMALL, "-c", make(tmp_path), "-o", tmp_path / "run")
    _fails(answer, *names)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".*"))


MODELS = {
    "NaN": ("cli_networks:nan_network", ("3.weight", "NaN")),
    "unknown torchvision model": ("torchvision:resnet81", ("resnet81", "resnet18")),
    "misspelt torchvision model": ("torchvision:resnt18", ("resnt18", "did you mean resnet18")),
    "no such module": ("no_such_package:make", ("no_such_package",)),
    "no such factory": ("cli_networks:nothing", ("nothing",)),
    "no network": ("cli_networks:no_network", ("str", "not a torch.nn.Module")),
    "no such file": ("nothing.pt2", ("nothing.pt2",)),
    "no kind of name": ("resnet18", ("resnet18", "torchvision:NAME")),
}


@pytest.mark.parametrize(("model", "names"), MODELS.values(), ids=MODELS.keys())
def test_models(run: Run, data: Path, tmp_path: Path, model: str, names: tuple[str, ...]) -> None:
    _fails(run("compress", model, "-c", data, "-o", tmp_path / "run"), *names)
    assert list(tmp_path.iterdir()) == []


OPTIONS = {
    "unreadable scheme": (("-s", "block5@0.9"), ("block5@0.9",)),
    "impossible sparsity": (("-s", "block4@90"), ("block4@90", "block4@0.9")),
    "scheme that does not divide": (("-s", "w4g7"), ("7", "'0'")),
    "unknown layer": (("--skip", "layer9"), ("layer9", "the layers are 0, 3, 7")),
    "unknown layer with a scheme": (("--layer", "head=w4"), ("head",)),
    "layer without a scheme": (("--layer", "head"), ("--layer 'head'", "NAME=SCHEME")),
    "unknown target": (("-t", "abacus"), ("abacus", "deepsparse")),
    "unknown method": (("--method", "best"), ("best", "exact_obs")),
    "unknown device": (("--device", "abacus"), ("abacus",)),
    "unsupported device": (("--device", "meta"), ("'meta'", "'cpu', 'cuda' or 'auto'")),
    "unreadable memory": (("--device-memory", "8 potatoes"), ("8 potatoes", "8GiB")),
    "memory of no GPU": (
        ("--device", "cpu", "--device-memory", "8GiB"),
        ("8.0 GiB", "'cpu'"),
    ),
    "unreadable mean": (("--mean", "a,b"), ("--mean 'a,b'",)),
    "mean without deviation": (("--mean", "1,2"), ("2 means",)),
    "unreadable scale": (("--scale", "1/0"), ("1/0",)),
    "no samples": (("--samples", "0"), ("--samples", "0")),
    "damping that is no number": (("--damping", "nan"), ("nan",)),
    "missing checkpoint": (("--weights", "none.pth"), ("none.pth",)),
    "unknown option": (("--sceme", "w8a8"), ("--sceme", "obc-deploy compress --help")),
    "JSON nowhere": (("--json", "/no/such/folder/x.json"), ("/no/such/folder",)),
}


@pytest.mark.parametrize(("given", "names"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(
    run: Run, data: Path, tmp_path: Path, given: tuple[str, ...], names: tuple[str, ...]
) -> None:
    _fails(run("compress", SMALL, "-c", data, "-o", tmp_path / "run", *given), *names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["compress", "run"])
def test_cuda_where_there_is_none(run: Run, data: Path, tmp_path: Path, command: str) -> None:
    answer = run(command, SMALL, "-c", data, "--device", "cuda", "-o", tmp_path / "run")
    _fails(answer, "device 'cuda'", "use 'cpu' or 'auto'")
    assert list(tmp_path.iterdir()) == []


def test_two_of_four_on_three_channels(run: Run, tmp_path: Path) -> None:
    path = _array(tmp_path, 4, 3, 8, 8)
    answer = run(
        "compress", "cli_networks:three_channels", "-c", path, "-s", "2:4", "-o", tmp_path / "run"
    )
    _fails(answer, "2:4", "'0'", "3", "--fallback")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels", [False, True])
def test_evaluation_data_is_looked_at_before_the_work(
    run: Run, data: Path, tmp_path: Path, labels: bool
) -> None:
    path = tmp_path / "test.npz"
    images = np.zeros((3, 4, 9, 9) if labels else (3, 4, 8, 8), np.float32)
    np.savez(path, images=images, **({"labels": np.zeros(3, int)} if labels else {}))
    answer = run("compress", SMALL, "-c", data, "--eval", path, "-o", tmp_path / "run")
    _fails(answer, "--eval", *(("4x9x9", "4x8x8") if labels else ("no labels",)))


PLACES = {
    "in use": (lambda folder: (folder / "used").parent, ("in use", "--overwrite")),
    "a file": (lambda folder: folder / "used", ("is a file",)),
    "below a file": (lambda folder: folder / "used" / "run", ("used/run",)),
    "not writable": (lambda folder: Path("/proc/obc/run"), ("/proc/obc/run",)),
}


@pytest.mark.parametrize("command", ["compress", "run"])
@pytest.mark.parametrize(("place", "names"), PLACES.values(), ids=PLACES.keys())
def test_run_directories(
    run: Run, tmp_path: Path, place: Callable[[Path], Path], names: tuple[str, ...], command: str
) -> None:
    (tmp_path / "used").write_text("mine", encoding="utf-8")
    # The data does not exist: the place is looked at before anything is loaded.
    _fails(run(command, SMALL, "-c", "none.npz", "-o", place(tmp_path)), *names)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_overwrite_spares_what_is_no_run(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    answer = run("compress", SMALL, "-c", data, "-o", tmp_path, "--overwrite")
    _fails(answer, "no manifest.json")
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("command", ["export", "bench", "report", "audit"])
def test_no_run_there(run: Run, tmp_path: Path, command: str) -> None:
    _fails(run(command, tmp_path / "nothing"), "nothing", "obc-deploy compress")


@pytest.mark.parametrize("file", ["manifest.json", "network.pt2", "layers.safetensors"])
def test_damaged_run(run: Run, lone_run: Path, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(lone_run, folder, ignore=shutil.ignore_patterns("artifacts"))
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    _fails(run("export", folder), "run", "compress")
    assert not (folder / "artifacts").exists()


def test_unmeasured_run_has_no_report(run: Run, lone_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(lone_run, folder)
    (folder / "measurements.json").unlink(missing_ok=True)
    _fails(run("report", folder), "measurements.json")


@pytest.mark.parametrize("command", ["bench", "audit"])
def test_unknown_runtime(run: Run, lone_run: Path, command: str) -> None:
    _fails(run(command, lone_run, "--runtime", "abacus"), "abacus", "onnxruntime")


@pytest.mark.parametrize("command", ["bench", "audit", "run"])
def test_missing_runtime_names_the_command_that_installs_it(
    run: Run,
    lone_run: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    from obc_deploy.runtimes import environments

    monkeypatch.setattr(environments, "search_folders", lambda: (tmp_path,))
    where = (SMALL, "-c", data, "-o", tmp_path / "run") if command == "run" else (lone_run,)
    answer = run(command, *where, "--runtime", "deepsparse")
    _fails(answer, "DeepSparse", "obc-deploy runtimes install deepsparse")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["install", "remove"])
def test_runtime_without_an_environment(run: Run, command: str) -> None:
    _fails(run("runtimes", command, "abacus"), "abacus", "deepsparse")


def test_unfit_python(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obc_deploy.runtimes import environments

    monkeypatch.setattr(environments, "search_folders", lambda: (tmp_path,))
    answer = run("runtimes", "install", "deepsparse", "--python", "/bin/true", "--json")
    _fails(answer, "/bin/true", "Python 3.8 to 3.11")


def test_corrupt_onnx_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"this is no graph" * 20)
    _fails(run("audit", path, "--threads", 1), "bad.onnx")


@pytest.mark.parametrize("command", ["bench", "audit"])
def test_changed_artifact(run: Run, artifact: Path, tmp_path: Path, command: str) -> None:
    path = tmp_path / artifact.name
    shutil.copy(artifact.with_name("lone.manifest.json"), tmp_path)
    path.write_bytes(artifact.read_bytes()[:-1])
    _fails(run(command, path), "lone.onnx", "SHA-256")


def test_export_for_an_unknown_target(run: Run, lone_run: Path) -> None:
    _fails(run("export", lone_run, "-t", "abacus"), "abacus")


def test_export_to_an_unwritable_place(run: Run, lone_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = run("export", lone_run, "-t", "onnxruntime", "-o", tmp_path / "file" / "x.onnx")
    _fails(answer, "x.onnx")


@pytest.mark.parametrize(
    ("given", "names"),
    [((), ("--input-shape",)), (("-i", "4,x"), ("4,x",)), (("-i", "3,8,8"), ("(2, 3, 8, 8)",))],
)
def test_inspect_needs_a_shape(run: Run, given: tuple[str, ...], names: tuple[str, ...]) -> None:
    _fails(run("inspect", SMALL, *given), *names)


@pytest.mark.parametrize("given", [("frobnicate",), ("compress",), ("runtimes", "frobnicate")])
def test_wrong_usage(run: Run, given: tuple[str, ...]) -> None:
    _fails(run(*given), "--help'")


def test_a_choice_that_is_none(run: Run) -> None:
    answer = run("export", "net.onnx", "--processor", "foo")
    _fails(answer, "'--processor': 'foo' is not one of 'cascade-lake', 'zen-4';")


def test_a_bug_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from obc_deploy.runtimes import doctor

    def broken() -> None:
        raise ZeroDivisionError("of\ncourse")

    monkeypatch.setattr(doctor, "diagnose", broken)
    answer = run("doctor")
    assert answer.code == 1
    assert answer.err == (
        "error: unexpected ZeroDivisionError: of course; "
        "run 'obc-deploy --debug ...' for the traceback\n"
    )
    with pytest.raises(ZeroDivisionError):
        run("--debug", "doctor")
