"""What the export tests share: compressed networks, and a file's constants and operators."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from tiny_networks import build, samples

from obc_deploy import layerwise
from obc_deploy.artifacts import Artifact
from obc_deploy.calibrated import CalibratedModel, calibrate
from obc_deploy.compression import CompressedModel, compress
from obc_deploy.runtimes import deepsparse
from obc_deploy.runtimes.regions import separated
from obc_deploy.targets import TENSORRT, EightBit, Precision, Target

_INFO = deepsparse.info()
DEEPSPARSE_MARKS = (
    pytest.mark.deepsparse,
    pytest.mark.skipif(not _INFO.works, reason=f"{_INFO.reason}; run: {_INFO.install_command}"),
)


def places_in(mask):
    """Of each row of a sparse layer's mask the places that are stored."""
    return [
        [8 * byte + bit for byte, held in enumerate(row) for bit in range(8) if held >> bit & 1]
        for row in mask.tolist()
    ]


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


def tensorrt(precision=Precision.FLOAT16, eight_bit=EightBit.INT8) -> Target:
    """The target with other number formats."""
    placement = replace(TENSORRT.placement, eight_bit=eight_bit)
    return replace(TENSORRT, precision=precision, placement=placement)


class ForTensorRT:
    """Tiny networks compressed without a solver, and their files for TensorRT."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._calibrated: dict[object, CalibratedModel] = {}
        self._made: dict[object, CompressedModel] = {}
        self._files: dict[object, Artifact] = {}

    def model(self, kind, scheme) -> CompressedModel:
        if kind not in self._calibrated:
            self._calibrated[kind] = calibrate(build(kind), samples(kind))
        if (kind, scheme) not in self._made:
            self._made[kind, scheme] = compress(
                self._calibrated[kind], scheme=scheme, baselines=False,
                method="magnitude" if "2:4" in scheme else "rtn",
                fallback="w8a8" if scheme.endswith("a8") else "dense",
            )  # fmt: skip
        return self._made[kind, scheme]

    def file(
        self, kind, scheme, eight_bit=EightBit.INT8, precision=Precision.FLOAT16, **options
    ) -> Artifact:
        """A file for batches of four, compared with the simulated network as it was written."""
        key = (kind, scheme, eight_bit, precision, repr(options))
        if key not in self._files:
            given = options or {"batch_size": 4}
            folder = self._folders.mktemp("tensorrt")
            goal = tensorrt(precision, eight_bit)
            self._files[key] = self.model(kind, scheme).export(folder, goal, **given)
        return self._files[key]


def constants(path):
    return {c.name: numpy_helper.to_array(c) for c in onnx.load(path).graph.initializer}


def operators(path):
    """How often each operator is in a file, those of regions too."""
    return Counter(node.op_type for node in separated(onnx.load(path)).graph.node)


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
