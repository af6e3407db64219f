from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_models import OnnxBuilder, needs_deepsparse

from obc_deploy.errors import RuntimeMissingError
from obc_deploy.runtimes import deepsparse
from obc_deploy.runtimes.environments import (
    DEEPSPARSE,
    MARKER,
    find_environment,
    find_python,
    install,
    install_folder,
)
from obc_deploy.runtimes.session import open_session

FITS = (3, 8) <= sys.version_info[:2] <= (3, 11)


def bare_environment(folder: Path, *, packages: Path | None) -> Path:
    """A finished-looking environment without DeepSparse, seeing `packages` where given."""
    root = folder / DEEPSPARSE.folder
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
    if packages is not None:
        (site,) = root.glob("lib/python3.*/site-packages")
        (site / "numpy").symlink_to(packages / "numpy")
        for libraries in packages.glob("numpy.libs"):
            (site / libraries.name).symlink_to(libraries)
    (root / MARKER).write_text(json.dumps({"requirement": DEEPSPARSE.requirement}))
    return root / "bin" / "python"


def test_nothing_is_found_where_nothing_is(quiet_folder: Path, models: OnnxBuilder) -> None:
    assert install_folder() == quiet_folder
    assert find_environment(DEEPSPARSE) is None
    info = deepsparse.info()
    assert not info.works
    with pytest.raises(RuntimeMissingError) as error:
        open_session("deepsparse", models.float_conv())
    assert "obc-deploy runtimes install deepsparse" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unfinished_environment_is_none(quiet_folder: Path) -> None:
    root = quiet_folder / DEEPSPARSE.folder
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "python").symlink_to(sys.executable)
    assert find_environment(DEEPSPARSE) is None
    (root / MARKER).write_text("{")
    assert find_environment(DEEPSPARSE) is None
    (root / MARKER).write_text('{"requirement": "deepsparse==0.1"}')
    assert find_environment(DEEPSPARSE) is None
    (root / MARKER).write_text(json.dumps({"requirement": DEEPSPARSE.requirement}))
    assert find_environment(DEEPSPARSE) == root / "bin" / "python"
    assert install("deepsparse") == root / "bin" / "python"


def test_an_environment_whose_python_went_away_is_none(quiet_folder: Path) -> None:
    python = bare_environment(quiet_folder, packages=None)
    assert find_environment(DEEPSPARSE) == python
    python.unlink()
    python.symlink_to(quiet_folder / "no-such-python")
    assert find_environment(DEEPSPARSE) is None


def test_an_environment_without_the_runtime(quiet_folder: Path, models: OnnxBuilder) -> None:
    bare_environment(quiet_folder, packages=Path(np.__file__).parents[1])
    with pytest.raises(RuntimeMissingError, match="DeepSparse cannot be imported") as error:
        open_session("deepsparse", models.float_conv(), threads=1)
    assert deepsparse.INSTALL_COMMAND in str(error.value)
    assert "\n" not in str(error.value)


def test_an_environment_without_numpy(quiet_folder: Path, models: OnnxBuilder) -> None:
    bare_environment(quiet_folder, packages=None)
    with pytest.raises(RuntimeMissingError, match="has no numpy"):
        open_session("deepsparse", models.float_conv(), threads=1)


def test_the_cache_is_used_where_no_virtual_environment_is(
    quiet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OBC_DEPLOY_RUNTIMES")
    monkeypatch.setattr("sys.prefix", sys.base_prefix)
    expected = Path(os.environ["XDG_CACHE_HOME"]) / "obc-deploy" / "runtimes"
    assert install_folder() == expected


def test_a_python_that_does_not_run_is_refused(tmp_path: Path) -> None:
    shim = tmp_path / "python3.11"
    shim.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    with pytest.raises(RuntimeMissingError, match="does not run") as error:
        find_python(DEEPSPARSE, shim)
    assert str(shim) in str(error.value)
    with pytest.raises(RuntimeMissingError, match="does not run"):
        find_python(DEEPSPARSE, tmp_path / "nowhere")


def test_broken_shims_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = tmp_path / "shims" / "python3.11"
    later = tmp_path / "later" / "python3.10"
    for script, text in (
        (shim, "#!/bin/sh\nexit 127\n"),
        (later, "#!/bin/sh\necho '[3, 10, true]'\n"),
    ):
        script.parent.mkdir()
        script.write_text(text)
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}{later.parent}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    assert find_python(DEEPSPARSE) == later
    later.unlink()
    with pytest.raises(RuntimeMissingError, match=r"Python 3\.8 to 3\.11 and none was found"):
        find_python(DEEPSPARSE)


@pytest.mark.skipif(not FITS, reason="needs a Python that DeepSparse has builds for")
def test_an_installation_that_fails_leaves_nothing(
    quiet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    abandoned = quiet_folder / f"{DEEPSPARSE.folder}.partial-999999999"
    abandoned.mkdir(parents=True)
    said: list[str] = []
    with pytest.raises(
        RuntimeMissingError, match=r"pip install deepsparse==1\.8\.0 failed"
    ) as error:
        install("deepsparse", say=said.append)
    assert "\n" not in str(error.value)
    assert "deepsparse==1.8.0" in str(error.value)
    assert said
    assert list(quiet_folder.iterdir()) == []


@pytest.mark.skipif(not FITS, reason="needs a Python that DeepSparse has builds for")
def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OBC_DEPLOY_RUNTIMES", str(tmp_path / "file" / "folder"))
    with pytest.raises(RuntimeMissingError, match="OBC_DEPLOY_RUNTIMES") as error:
        install("deepsparse", Path(sys.executable))
    assert "\n" not in str(error.value)


def test_an_unknown_environment(quiet_folder: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="'onnxruntime' has no environment"):
        install("onnxruntime")


@needs_deepsparse
def test_an_installed_environment_is_not_made_again() -> None:
    said: list[str] = []
    assert install("deepsparse", say=said.append) == find_environment(DEEPSPARSE)
    assert said == []
