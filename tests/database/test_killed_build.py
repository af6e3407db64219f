"""A build that is killed with SIGKILL, wherever it is, goes on and ends with the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from layer_problems import all_levels, contents, network, places

from obc_deploy.database import Database, build
from obc_deploy.schemes import Scheme

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from layer_problems import all_levels, network
from obc_deploy.database import build, files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(layer, share):
    if layer == "block/conv2":
        {place}

def write_half(partial, content):
    if "conv2" in partial.name:
        real_write(partial, content[:len(content) // 2])
        die()
    real_write(partial, content)

def settle_then_die(partial, final):
    real_settle(partial, final)
    if "conv2" in final.name:
        die()

def settle_or_die(partial, final):
    if final.name == "index.json" and any(final.parent.glob("*conv2*.safetensors")):
        die()
    real_settle(partial, final)

real_write, real_settle = Path.write_bytes, files._settle
build(network(), all_levels, {folder!r}, progress=progress)
"""

PLACES = {
    "while a layer is solved": ("die()", 2),
    "while its file is written": ("Path.write_bytes = write_half", 3),
    "between its file and the index": ("files._settle = settle_then_die", 3),
    "while the index is written": ("files._settle = settle_or_die", 4),
}
"""What the killed process does, and how many files it leaves."""


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_build_goes_on(tmp_path, place, solved):
    action, files_left = PLACES[place]
    folder = tmp_path / "db"
    script = KILLED.format(here=str(Path(__file__).parent), place=action, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()

    # What was finished is whole, and is all that the index speaks of.
    left = Database.open(folder, network()[:1])
    assert left.layers == ("conv1",)
    assert left.is_intact("conv1")
    assert len(contents(folder)) == files_left
    finished = places(folder).items()
    finished = {name: place for name, place in finished if name.startswith("conv1")}

    build(network(), all_levels, folder)
    assert [layer for layer, _ in solved] == ["block/conv2", "linear"]
    assert finished.items() <= places(folder).items()

    build(network(), all_levels, tmp_path / "uninterrupted")
    assert contents(folder) == contents(tmp_path / "uninterrupted")


def test_a_killed_second_build_keeps_the_first(tmp_path, solved):
    folder = tmp_path / "db"
    first = [Scheme.parse("2:4"), Scheme.parse("w8a8")]
    build(network(), lambda outline: first, folder)
    before = places(folder)
    script = KILLED.format(
        here=str(Path(__file__).parent), place="files._settle = settle_then_die",
        folder=str(folder),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = Database.open(folder, network())
    assert len(left.levels("conv1")) > 2
    for name in ("block/conv2", "linear"):
        assert left.levels(name) == tuple(first)
        assert left.load(name, "2:4").scheme == first[0]
        assert left.index.layers[name].file in before
    solved.clear()
    build(network(), all_levels, folder)
    assert [layer for layer, _ in solved] == ["block/conv2", "linear"]
