"""DeepSparse 1.8.0: a CPU engine that skips zero weights, in an environment of its own.

It never says that it gives a graph up: it hands it to a bundled ONNX Runtime and carries on at that
speed. The conditions below were measured; `obc_deploy.runtimes.audit` checks what really happened.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from obc_deploy.runtimes.contract import Runtime, RuntimeInfo
from obc_deploy.runtimes.environments import DEEPSPARSE, find_environment
from obc_deploy.runtimes.onnx_graph import INT8
from obc_deploy.runtimes.sparse import DOMAIN

if TYPE_CHECKING:
    from obc_deploy.runtimes.onnx_graph import OnnxGraph, OnnxNode

NAME = "deepsparse"
INSTALL_COMMAND = "obc-deploy runtimes install deepsparse"
LICENCE = (
    "DeepSparse's community licence covers testing and development, not production; "
    "its makers have ended its development"
)
MAX_IR_VERSION = 9
MAX_OPSET = 19


def info() -> RuntimeInfo:
    """Whether an environment with DeepSparse was installed."""
    found = find_environment(DEEPSPARSE)
    reason = None
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        reason = f"DeepSparse has no build for {platform.system()} on {platform.machine()}"
    elif found is None:
        reason = "DeepSparse's own environment is not installed"
    return RuntimeInfo(
        NAME,
        "DeepSparse",
        works=reason is None,
        version=None if found is None else DEEPSPARSE.version,
        reason=reason,
        install_command=INSTALL_COMMAND,
        python=found,
        licence=LICENCE,
    )


def refusals(graph: OnnxGraph) -> tuple[str, ...]:
    """Why DeepSparse will not load the graph."""
    reasons = []
    if DOMAIN in graph.domains:
        reasons.append(
            "it has operators of our sparse kernels, which only ONNX Runtime loads; export with "
            "target deepsparse"
        )
    if graph.ir_version > MAX_IR_VERSION:
        reasons.append(
            f"it is written in ONNX IR version {graph.ir_version} and DeepSparse reads up to "
            f"{MAX_IR_VERSION}; export with target deepsparse"
        )
    if graph.opset > MAX_OPSET:
        reasons.append(
            f"it uses opset {graph.opset} and DeepSparse reads up to {MAX_OPSET}; "
            "export with target deepsparse"
        )
    grouped = [node for node in graph.layers if node.op_type == "ConvInteger" and node.groups > 1]
    if grouped:
        reasons.append(
            f"'{grouped[0].name or grouped[0].outputs[0]}' is a ConvInteger in "
            f"{grouped[0].groups} groups, which DeepSparse cannot run; leave that layer in float "
            "(--skip), or write it as QLinearConv with one weight scale"
        )
    no_zero_point = [
        node
        for node in graph.layers
        if node.op_type in ("ConvInteger", "MatMulInteger") and not "".join(node.inputs[3:])
    ]
    if no_zero_point:
        name = no_zero_point[0].name or no_zero_point[0].outputs[0]
        reasons.append(
            f"'{name}' is a {no_zero_point[0].op_type} without a weight zero point, at which "
            "DeepSparse crashes; write it as an input, 0 for symmetric weights"
        )
    return tuple(reasons)


def _per_channel(graph: OnnxGraph) -> list[OnnxNode]:
    return [
        node
        for node in graph.layers
        if node.op_type in ("QLinearConv", "QLinearMatMul")
        and graph.shapes.get(node.inputs[4], ()) not in ((), (1,))
    ]


def fallbacks(graph: OnnxGraph) -> tuple[str, ...]:
    """Why DeepSparse will load the graph, but leave all or part of it to its ONNX Runtime."""
    reasons = []
    if any(node.op_type not in INT8 and graph.reads_int8(node) for node in graph.layers):
        reasons.append(
            "the graph holds quantize/dequantize pairs around float operators (QDQ), which "
            "DeepSparse's engine does not take; export with target deepsparse (integer operators)"
        )
    if per_channel := _per_channel(graph):
        first = per_channel[0]
        reasons.append(
            f"{len(per_channel)} {first.op_type} nodes (first: '{first.outputs[0]}') have a weight "
            "scale per output channel, which DeepSparse's engine does not take in this operator; "
            "export with target deepsparse (ConvInteger and Mul)"
        )
    grouped = [node for node in graph.layers if node.groups > 1 and not graph.is_depthwise(node)]
    if grouped:
        reasons.append(
            f"{len(grouped)} convolutions (first: '{grouped[0].outputs[0]}') are in groups of "
            "several channels, which DeepSparse's engine does not take; use another runtime"
        )
    means = [node for node in graph.nodes if node.op_type == "ReduceMean"]
    if means:
        reasons.append(
            f"'{means[0].name or means[0].outputs[0]}' is a ReduceMean, which DeepSparse's engine "
            "takes only with axes counted from the front and sizes kept; "
            "export with target deepsparse (GlobalAveragePool)"
        )
    foreign = [node for node in graph.nodes if node.domain not in ("", "ai.onnx")]
    if foreign:
        reasons.append(
            f"{len(foreign)} nodes are no standard operators (first: '{foreign[0].op_type}' of "
            f"'{foreign[0].domain}'), which DeepSparse's engine does not take; "
            "export with target deepsparse"
        )
    return tuple(reasons)


RUNTIME = Runtime(
    name=NAME,
    title="DeepSparse",
    info=info,
    refusals=refusals,
    fallbacks=fallbacks,
    environment={"NM_DISABLE_ANALYTICS": "True"},
)
