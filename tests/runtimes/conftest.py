from __future__ import annotations

from pathlib import Path

import pytest
from onnx_models import OnnxBuilder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> OnnxBuilder:
    return OnnxBuilder(tmp_path_factory.mktemp("models"))


@pytest.fixture
def quiet_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which alone environments are found and made."""
    monkeypatch.setenv("OBC_DEPLOY_RUNTIMES", str(tmp_path / "runtimes"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    return tmp_path / "runtimes"
