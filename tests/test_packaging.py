"""What a user installs: the wheel that is built from the source distribution."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    # A clean copy: what lies about in a working tree must not help.
    source = tmp_path_factory.mktemp("source") / "obc-deploy"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is no list of the project's own files")
    for name in listed.stdout.splitlines():
        origin, copy = ROOT / name, source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            copy.symlink_to(origin.readlink())
        elif origin.is_file():
            copy.write_bytes(origin.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_every_room_under_one_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "obc_deploy/__init__.py",
        "obc_deploy/py.typed",
        "obc_deploy/demo_network.safetensors",
        "obc_deploy/cli.py",
        "obc_deploy/commands/compress.py",
        "obc_deploy/solvers/exact_obs.py",
        "obc_deploy/exporters/qoperator.py",
        "obc_deploy/runtimes/session.py",
        "obc_deploy/runtimes/sparse/OPERATORS.md",
        "obc_deploy/runtimes/worker/__main__.py",
        "obc_deploy/benchmarks/comparison.py",
        "obc_deploy/benchmarks/report.html.jinja",
    ):
        assert wanted in names
    if shutil.which("g++"):
        assert any(name.startswith("obc_deploy/native/_rows.") for name in names)
        assert any(name.startswith("obc_deploy/runtimes/sparse/_kernels.") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"obc_deploy"}
    assert not [name for name in names if "tests/" in name or "results/" in name]


@pytest.mark.slow
def test_unpacked_wheel_imports_and_speaks(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import obc_deploy.exporters.qoperator as q; "
        "import obc_deploy.runtimes.session as s; print(q.__file__); print(s.WORKER.is_dir())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first.startswith(str(tmp_path))
    assert second == "True"
