"""`obc-deploy` as a process of its own: what it loads, how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "matplotlib", "numpy")
COMMAND = ("-m", "obc_deploy")


def _python(code: str, variables: dict[str, str]) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    return found.stdout


def test_importing_the_package_loads_nothing_heavy(variables: dict[str, str]) -> None:
    code = "import obc_deploy, sys; print(*sys.modules)"
    assert not set(HEAVY) & set(_python(code, variables).split())


def test_help_loads_nothing_heavy(variables: dict[str, str]) -> None:
    code = (
        "import sys; from obc_deploy.cli import main; "
        "codes = [main(['--help']), main(['compress', '--help'])]; print(); "
        "print('MODULES', *codes, *sys.modules)"
    )
    last = _python(code, variables).splitlines()[-1].split()
    assert last[:3] == ["MODULES", "0", "0"]
    assert not set(HEAVY) & set(last)


def test_a_module_of_the_current_directory_is_found(
    variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "here_only.py").write_text(
        "from torch import nn\n\n\ndef make():\n    print('noise')\n    return nn.Linear(4, 2)\n",
        encoding="utf-8",
    )
    # A console script has no current directory on its path; -P keeps Python from adding it.
    found = subprocess.run(
        [sys.executable, "-P", *COMMAND, "inspect", "here_only:make", "-i", "4", "--json"],
        env=variables, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["macs"] == 8
    assert "noise" in found.stderr


def test_an_error_is_one_line(variables: dict[str, str], tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, *COMMAND, "compress", "x:y", "-c", "z", "-s", "w99", "-o", "run"],
        env=variables, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: 'w99' ")
    assert found.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Children take interrupts, also where this process ignores them, as background jobs do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_interrupted_work_leaves_no_run(variables: dict[str, str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(64, 1536)))
    command = [
        sys.executable, *COMMAND, "compress", "cli_networks:slow_network",
        "-c", "x.npy", "-s", "unstructured@0.9", "--no-baselines", "-o", "run",
    ]  # fmt: skip
    with subprocess.Popen(
        command, env=variables, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stderr:
                if "pruning" in line:
                    break
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait() == 130
        finally:
            process.kill()
    assert rest.endswith("interrupted\n")
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
