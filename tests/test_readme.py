"""The README's own code and commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands():
    """The obc-deploy commands of the README, continued lines joined, comments dropped."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^    (obc-deploy [^#\n]*)", text, re.MULTILINE)
    return sorted({" ".join(line.split()) for line in found})


def test_there_is_one_python_example_of_under_ten_lines():
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) < 10


@pytest.mark.slow
def test_python_example_runs(tmp_path):
    pytest.importorskip("sklearn", reason="the example's digits need scikit-learn")
    (code,) = blocks("python")
    assert "data=test)" in code
    code = code.replace("data=test)", "data=test, rounds=2, processes=1)")  # no figure is read here
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} >= {"dense-fp32", "dense-int8", "block4@0.9+w8a8"}
    assert (tmp_path / "out" / "digits" / "model.onnx").is_file()
    accuracies = {row[0]: float(row[2]) for row in rows}
    assert accuracies["dense-fp32"] == pytest.approx(0.992)
    assert accuracies["block4@0.9+w8a8"] > 0.97


@pytest.mark.parametrize("line", commands())
def test_commands_name_options_that_exist(line):
    words = line.split()[1:]
    name = words[0]
    done = subprocess.run(
        [sys.executable, "-m", "obc_deploy", name, "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    for word in words:
        if word.startswith("-") and word != "-o":
            assert word in done.stdout, f"'{word}' of '{line}'"


def test_commands_were_found():
    assert len(commands()) >= 4
