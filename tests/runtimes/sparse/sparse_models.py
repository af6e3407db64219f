"""Graphs with operators of ours and of ONNX Runtime side by side, run in a real session."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.regions import joined

MICROSOFT = "com.microsoft"
FLOAT, UINT8, INT8, INT32 = (
    TensorProto.FLOAT,
    TensorProto.UINT8,
    TensorProto.INT8,
    TensorProto.INT32,
)


@dataclass
class Graph:
    """A graph that grows node by node."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    joined: ClassVar[bool] = False
    """Our operators run as regions."""

    def input(self, name: str, value: np.ndarray, shape: Any = None) -> str:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        shape = value.shape if shape is None else shape
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value: Any, dtype: Any = None) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, kind: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes)
        )
        return name

    def sparse(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        return self.add(kind, inputs, sparse.DOMAIN, **attributes)

    def model(self, outputs: dict[str, int]) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "sparse",
            self.inputs,
            [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
            self.constants,
        )
        opsets = [
            helper.make_opsetid("", 17),
            helper.make_opsetid(MICROSOFT, 1),
            helper.make_opsetid(sparse.DOMAIN, sparse.DOMAIN_VERSION),
        ]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return (joined(model, fewest=1) if self.joined else model).SerializeToString()

    def session(
        self, outputs: dict[str, int], threads: int = 1, *, optimize: bool = True
    ) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # each tensor by itself, for sanitizers to watch
        if not optimize:
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        options.register_custom_ops_library(str(sparse.library_path()))
        return onnxruntime.InferenceSession(
            self.model(outputs), options, providers=["CPUExecutionProvider"]
        )

    def run(
        self,
        feeds: dict[str, np.ndarray],
        outputs: dict[str, int],
        threads: int = 1,
        *,
        optimize: bool = True,
    ) -> list[np.ndarray]:
        found: list[np.ndarray] = self.session(outputs, threads, optimize=optimize).run(
            list(outputs), feeds
        )
        return found


def mask_of(rows: Iterable[Iterable[int]], places: int) -> np.ndarray:
    """The bits of the places that are stored, row by row: [O, ceil(places / 8)]."""
    kept = [list(row) for row in rows]
    mask = np.zeros((len(kept), -(-places // 8)), np.uint8)
    for output, row in enumerate(kept):
        for place in row:
            mask[output, place // 8] |= 1 << place % 8
    return mask


def blocks_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, mask) of a weight [O, C, height, width]."""
    outputs, channels = weight.shape[:2]
    padded = np.pad(weight, ((0, 0), (0, -channels % 4), (0, 0), (0, 0)))
    # [O, blocks, 4, height, width] to [O, height, width, blocks, 4]
    rows = padded.reshape(outputs, -1, 4, *weight.shape[2:]).transpose(0, 3, 4, 1, 2)
    rows = rows.reshape(outputs, -1, 4)
    kept = rows.any(axis=2)
    return rows[kept].astype(np.int8), mask_of(map(np.flatnonzero, kept), kept.shape[1])


def entries_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, mask) of a float weight [O, C, height, width]."""
    rows = weight.transpose(0, 2, 3, 1).reshape(weight.shape[0], -1)
    kept = rows != 0
    return rows[kept].astype(np.float32), mask_of(map(np.flatnonzero, kept), kept.shape[1])


def block_sparse(
    random: np.random.Generator,
    outputs: int,
    channels: int,
    height: int,
    width: int,
    density: float,
) -> np.ndarray:
    """Random int8 weights [O, C, height, width] with whole blocks of four channels zero."""
    # Without VNNI ONNX Runtime's own products saturate beyond 7 bits.
    weight = random.integers(-63, 64, (outputs, channels, height, width))
    kept = random.random((outputs, -(-channels // 4), height, width)) < density
    return (weight * np.repeat(kept, 4, axis=1)[:, :channels]).astype(np.int8)


def instruction_sets() -> list[str]:
    """Those that work on this processor."""
    working = []
    for name in sparse.INSTRUCTION_SETS:
        try:
            with sparse.use_instruction_set(name):
                working.append(name)
        except ValueError:
            continue
    return working
