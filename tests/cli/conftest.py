"""A small network's data, a run of it, and the command line as a function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obc_deploy.cli import main
from obc_deploy.commands import output

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """`obc-deploy` in this process; progress keeps quiet, however slow the machine is."""
    monkeypatch.setattr(output, "PATIENCE_S", float("inf"))

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 labelled samples of (4, 8, 8)."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    images = generator.standard_normal((32, 4, 8, 8)).astype(np.float32)
    np.savez(path, images=images, labels=generator.integers(0, 4, 32))
    return path


def _compressed(folder: Path, data: Path, *options: str) -> Path:
    given = ["compress", "cli_networks:small_network", "-c", str(data), "-o", str(folder), *options]
    assert main(given) == 0
    return folder


@pytest.fixture(scope="session")
def finished_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of the small network, with a pattern, a grid and both baselines."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    return _compressed(folder, data, "-s", "block4@0.5+w8a8", "--eval", str(data))


@pytest.fixture(scope="session")
def lone_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory without baselines, quick to load; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "lone"
    return _compressed(folder, data, "-s", "2:4+w8a8", "--method", "magnitude", "--no-baselines")


@pytest.fixture(scope="session")
def artifact(lone_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of the lone run; tests leave it as it is."""
    path = tmp_path_factory.mktemp("artifacts") / "lone.onnx"
    assert main(["export", str(lone_run), "-t", "onnxruntime", "-o", str(path)]) == 0
    return path


@pytest.fixture
def variables() -> dict[str, str]:
    """The environment of a process of its own that finds the package and the small networks."""
    paths = [str(ROOT), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
