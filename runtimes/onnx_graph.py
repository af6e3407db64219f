"""The parts of an ONNX file that decide whether and how a runtime runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from obc_deploy.errors import ArtifactError
from obc_deploy.runtimes.regions import separated
from obc_deploy.runtimes.sparse import DOMAIN
from obc_deploy.schemes import BLOCK_SIZE

if TYPE_CHECKING:
    import onnx

SPARSE = frozenset(
    {
        "SparseConvolution",
        "SparseLinear",
        "SparseLinearDequantize",
        "SparseConvolutionFloat",
        "SparseLinearFloat",
        "DepthwiseConvolution",
    }
)
"""Operators of our sparse library that multiply activations by weights."""

MULTIPLYING = frozenset(
    {
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "Gemm",
        "MatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
    | SPARSE
)
"""Operators that multiply activations by weights: the layers of a network."""

INT8 = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "SparseConvolution",
        "SparseLinear",
        "SparseLinearDequantize",
        "DepthwiseConvolution",
    }
)
"""Those of them that multiply 8-bit integers."""


@dataclass(frozen=True)
class OnnxNode:
    """One operator of a graph.

    Attributes:
        name: of the node; may be empty.
        op_type: the operator.
        domain: the operator's domain.
        inputs: values it reads.
        outputs: values it computes.
        groups: 1 unless it is a grouped convolution.
        places: stored entries that an output channel of a sparse layer would have without zeros; 0
            of other nodes.
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    groups: int = 1
    places: int = 0


@dataclass(frozen=True)
class OnnxGraph:
    """An artifact's main graph without its weights.

    Attributes:
        path: the file.
        ir_version: version of the file format.
        opset: version of the standard operators.
        sparse_version: version of our sparse operators; 0 where the file asks for none.
        nodes: operators in the file's order, those of regions one by one.
        shapes: sizes of the initializers.
    """

    path: Path
    ir_version: int
    opset: int
    nodes: tuple[OnnxNode, ...]
    shapes: dict[str, tuple[int, ...]]
    sparse_version: int = 0

    @cached_property
    def producers(self) -> dict[str, OnnxNode]:
        """The node that computes each value."""
        return {value: node for node in self.nodes for value in node.outputs}

    @cached_property
    def consumers(self) -> dict[str, list[OnnxNode]]:
        """The nodes that read each value."""
        readers: dict[str, list[OnnxNode]] = {}
        for node in self.nodes:
            for value in node.inputs:
                readers.setdefault(value, []).append(node)
        return readers

    @property
    def layers(self) -> tuple[OnnxNode, ...]:
        """The nodes that multiply activations by weights."""
        return tuple(node for node in self.nodes if node.op_type in MULTIPLYING)

    @property
    def domains(self) -> frozenset[str]:
        """Domains of the operators."""
        return frozenset(node.domain for node in self.nodes)

    def kernel_sparsity(self, node: OnnxNode) -> float:
        """Fraction of its weights that a sparse layer skips: what the file does not store."""
        if not node.places:
            return 0.0
        entries, rows = self.shapes.get(node.inputs[1]), self.shapes.get(node.inputs[2])
        if entries is None or rows is None:
            return 0.0
        return 1.0 - entries[0] / (rows[0] * node.places)

    def is_depthwise(self, node: OnnxNode) -> bool:
        """Each group of the convolution has one input channel."""
        weight = node.inputs[3 if node.op_type == "QLinearConv" else 1]
        return node.groups > 1 and self.shapes.get(weight, (0, 0))[1] == 1

    def values_fused_after(self, value: str) -> tuple[str, ...]:
        """`value` and what follows it up to the next layer: names that a fused layer may go by.

        The walk ends where a value has several readers, or its reader is another layer.
        """
        followed = [value]
        while len(readers := self.consumers.get(followed[-1], [])) == 1:
            reader = readers[0]
            if reader.op_type in MULTIPLYING or len(reader.outputs) != 1:
                break
            followed.append(reader.outputs[0])
        return tuple(followed)

    def reads_int8(self, node: OnnxNode) -> bool:
        """The node multiplies 8-bit integers, or is wrapped in QDQ pairs to do so."""
        if node.op_type in INT8:
            return True
        sources = [self.producers.get(value) for value in node.inputs[:2]]
        return all(
            source is not None and source.op_type == "DequantizeLinear" for source in sources
        )


def _places(node: onnx.NodeProto) -> int:
    if node.domain != DOMAIN or not node.op_type.startswith("Sparse"):
        return 0
    attributes = {item.name: item for item in node.attribute}
    counts = [attributes[name].i for name in ("channels", "features") if name in attributes]
    columns: int = counts[0] if counts else 0
    if not node.op_type.endswith("Float"):
        columns = -(-columns // BLOCK_SIZE)
    kernel = attributes["kernel_shape"].ints if "kernel_shape" in attributes else ()
    return columns * math.prod(kernel)


def _nodes(graph: onnx.GraphProto) -> tuple[OnnxNode, ...]:
    return tuple(
        OnnxNode(
            node.name,
            node.op_type,
            node.domain,
            tuple(node.input),
            tuple(node.output),
            next((item.i for item in node.attribute if item.name == "group"), 1),
            _places(node),
        )
        for node in graph.node
    )


def read_onnx_graph(path: Path) -> OnnxGraph:
    """Read the graph of an ONNX file.

    Raises:
        ArtifactError: no such file, or the file holds no ONNX graph.
    """
    import onnx

    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ArtifactError(f"'{path}' {found}; name an ONNX file, or export the run again")
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ArtifactError(
            f"'{path}' cannot be read ({error.strerror}); check its permissions"
        ) from error
    # protobuf's DecodeError is importable only through its own package, which onnx hides.
    except Exception as error:
        raise ArtifactError(
            f"'{path}' is no ONNX file ({' '.join(str(error).split())[:120]}); export the run again"
        ) from error
    if not model.graph.node:
        raise ArtifactError(
            f"'{path}' holds no ONNX graph ({path.stat().st_size} bytes); export the run again"
        )
    versions = {item.domain: item.version for item in reversed(model.opset_import)}
    return OnnxGraph(
        path=path,
        ir_version=model.ir_version,
        opset=versions.get("", versions.get("ai.onnx", 0)),
        nodes=_nodes(separated(model).graph),
        shapes={weight.name: tuple(weight.dims) for weight in model.graph.initializer},
        sparse_version=versions.get(DOMAIN, 0),
    )
