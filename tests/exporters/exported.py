"""What the export tests share: compressed networks, and a file's constants and operators."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from tiny_networks import build, samples

from obc_deploy import layerwise
from obc_deploy.compression import CompressedModel, compress
from obc_deploy.runtimes import deepsparse

_INFO = deepsparse.info()
DEEPSPARSE_MARKS = (
    pytest.mark.deepsparse,
    pytest.mark.skipif(not _INFO.works, reason=f"{_INFO.reason}; run: {_INFO.install_command}"),
)


class Compressed:
    """`compressed(kind, scheme, steps=...)`: round-to-nearest networks.

    `steps` is "shared" for one weight step a layer as DeepSparse likes it, "rows" for a step of
    its own for each row in spite of that target, None for no target.
    """

    def __init__(self) -> None:
        self._made: dict[object, CompressedModel] = {}

    def __call__(self, kind, scheme="w8a8", *, steps=None, **options):
        key = (kind, scheme, steps, repr(options))
        if key not in self._made:
            with pytest.MonkeyPatch.context() as patch:
                if steps is not None:
                    patch.setattr(layerwise, "SHARED_STEP_FACTOR", 0.0)
                    limit = np.inf if steps == "shared" else -1.0
                    patch.setattr(layerwise, "SHARED_STEP_ERROR", limit)
                self._made[key] = compress(
                    build(kind), samples(kind), scheme=scheme, method="rtn", baselines=False,
                    target=None if steps is None else "deepsparse", **options,
                )  # fmt: skip
        return self._made[key]


def constants(path):
    return {c.name: numpy_helper.to_array(c) for c in onnx.load(path).graph.initializer}


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path, x, without=()):
    """The first output of ONNX Runtime, less some of its optimizers."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def relative(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
