from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from exported import Compressed, ForTensorRT


@pytest.fixture(scope="session", autouse=True)
def _operators_translated_once() -> Iterator[None]:
    """torch.onnx reads its operators' sources anew for each export; here once for all."""
    from torch.onnx._internal.exporter import _registration as registration

    apis = getattr(registration, "onnxscript_apis", None)
    if apis is None:  # another torch, which does it in another way
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        once = SimpleNamespace(get_torchlib_ops=functools.cache(apis.get_torchlib_ops))
        patch.setattr(registration, "onnxscript_apis", once)
        yield


@pytest.fixture(scope="session")
def compressed() -> Compressed:
    """Compressed tiny networks, each made once."""
    return Compressed()


@pytest.fixture(scope="session")
def for_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> ForTensorRT:
    """Tiny networks and their files for TensorRT, each made once; tests leave them as they are."""
    return ForTensorRT(tmp_path_factory)
