"""What a runtime really did with an artifact: which layers ran int8, which skipped their zeros.

No runtime says of itself that it gave a layer up. DeepSparse hands whole graphs to a bundled ONNX
Runtime; ONNX Runtime leaves a quantized layer in float where a pattern does not match. Both are
read off the schedule that the runtime made for the very artifact.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc_deploy.runtimes import onnxruntime_cpu
from obc_deploy.runtimes.contract import LayerProfile, TensorSpec
from obc_deploy.runtimes.onnx_graph import INT8, MULTIPLYING, OnnxGraph, OnnxNode, read_onnx_graph
from obc_deploy.runtimes.regions import regions_of
from obc_deploy.runtimes.registry import find_runtime
from obc_deploy.runtimes.session import Session, open_session

if TYPE_CHECKING:
    import numpy as np

_MADE_NAME = re.compile(r"(_nchwc|_token_\d+)+$")
_SIDE_STEPS = ("elementwise", "shuffle", "Naive Subgraph")


@dataclass(frozen=True)
class AuditedLayer:
    """One layer of the artifact, and how the runtime ran it.

    Attributes:
        name: name of the ONNX node (of its first output where it has none).
        operator: its ONNX operator.
        outputs: its output value, then the values that may be fused into it.
        step: the step of the runtime's schedule that computed it, or None where none was found.
        kind: the runtime's operation or algorithm, or None.
        ms: milliseconds of that step, or None where it is unknown or computed several layers.
        kernel_sparsity: fraction of zero weights the runtime says it skips; 0.0 where it multiplies
            all; None where it does not say.
        native: the runtime's own engine ran it.
        int8: it multiplied 8-bit integers.
        region: the node that runs it together with its neighbours among our sparse operators, of
            which `ms` says what they take one by one; None where it runs alone.
    """

    name: str
    operator: str
    outputs: tuple[str, ...]
    step: str | None
    kind: str | None
    ms: float | None
    kernel_sparsity: float | None
    native: bool
    int8: bool
    region: str | None = None


@dataclass(frozen=True)
class Audit:
    """What the runtime did.

    Attributes:
        runtime: its name.
        version: its version.
        fraction_native: share of the graph's operators that its own engine took, 0 to 1.
        layers: the artifact's layers in the file's order.
        steps: the runtime's own schedule.
        fallback: something that should run in the engine, or in int8, did not.
        reasons: why, and what the runtime cannot use at all; each one line with the fix.
    """

    runtime: str
    version: str
    fraction_native: float
    layers: tuple[AuditedLayer, ...]
    steps: tuple[LayerProfile, ...]
    fallback: bool
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        described = asdict(self)
        for entry in described["layers"]:
            entry["outputs"] = list(entry["outputs"])
        return {
            **described,
            "layers": list(described["layers"]),
            "steps": [step.as_dict() for step in self.steps],
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class Expectation:
    """What was done to a layer, for `count_accelerated`.

    Attributes:
        output: ONNX value that the layer's node computes.
        sparse: zeros were made to be skipped.
        int8: its weights and input were quantized to be multiplied as 8-bit integers.
    """

    output: str
    sparse: bool
    int8: bool


@dataclass(frozen=True)
class AcceleratedLayers:
    """How many layers the runtime really ran the way they were compressed.

    Attributes:
        accelerated: layers that got all that was expected of the runtime.
        total: layers of which anything was expected.
        sparse: layers whose zeros it skipped.
        int8: layers it multiplied in 8-bit integers.
        reasons: for each layer that did not get all, why.
    """

    accelerated: int
    total: int
    sparse: int
    int8: int
    reasons: dict[str, str]


def _described(
    graph: OnnxGraph, node: OnnxNode, step: LayerProfile | None, shared: bool
) -> AuditedLayer:
    native = step is not None and step.native is not False
    return AuditedLayer(
        name=node.name or node.outputs[0],
        operator=node.op_type,
        outputs=graph.values_fused_after(node.outputs[0]),
        step=None if step is None else step.name,
        kind=None if step is None else step.kind,
        ms=None if step is None or shared else step.ms,
        kernel_sparsity=None if step is None else step.kernel_sparsity,
        native=native,
        int8=bool(step.int8) if step is not None and step.int8 is not None else False,
    )


def _deepsparse_step(
    graph: OnnxGraph, node: OnnxNode, steps: list[LayerProfile]
) -> LayerProfile | None:
    """The step that names the layer's output, or else a value that is fused into the layer."""
    for step in steps:
        if node.outputs[0] in step.outputs:
            return step
    computing = [step for step in steps if not step.name.startswith(_SIDE_STEPS)]
    for value in graph.values_fused_after(node.outputs[0])[1:]:
        for step in computing:
            if value in step.outputs:
                return step
    return None


def _audit_deepsparse(
    graph: OnnxGraph,
    session: Session,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    iterations: int,
) -> Audit:
    steps = session.profile(inputs, iterations=iterations)
    found = [(node, _deepsparse_step(graph, node, steps)) for node in graph.layers]
    names = [step.name for _, step in found if step is not None]
    layers = []
    for node, step in found:
        shared = step is not None and names.count(step.name) > 1
        int8 = step is not None and step.native is not False and node.op_type in INT8
        layer = _described(graph, node, step, shared)
        layers.append(replace(layer, int8=int8))
    fraction = float(session.facts["fraction_native"])
    left = [layer for layer in layers if not layer.native]
    reasons = list(find_runtime(session.runtime).fallbacks(graph))
    if left and not reasons:
        reasons.append(
            f"DeepSparse's engine did not take '{left[0].name}' ({left[0].operator}) nor say why; "
            "compare its operators with an artifact exported with target deepsparse"
        )
    if left:
        reasons.insert(
            0,
            f"{len(left)} of {len(layers)} layers ran in DeepSparse's bundled ONNX Runtime instead "
            "of its engine: no zero is skipped there",
        )
    if fraction < 1.0 and not left:
        reasons.append(
            f"DeepSparse's engine took {fraction:.0%} of the operators; all layers are among them"
        )
    return Audit(
        runtime=session.runtime,
        version=session.version,
        fraction_native=fraction,
        layers=tuple(layers),
        steps=tuple(steps),
        fallback=bool(left),
        reasons=tuple(reasons),
    )


def _assign(graph: OnnxGraph, optimized: OnnxGraph) -> dict[int, OnnxNode]:
    """For each layer of the artifact the optimized node that computes it, the closest name first.

    ONNX Runtime renames what it rewrites: a node by its old name or its output's name and a suffix,
    a fused node by the last value it computes. So closeness is the place of the shared name in the
    walk from the layer's output to the next layer.
    """
    candidates = []
    done = [node for node in optimized.nodes if node.op_type in MULTIPLYING]
    for place, node in enumerate(graph.layers):
        values = graph.values_fused_after(node.outputs[0])
        for index, made in enumerate(done):
            names = {_MADE_NAME.sub("", made.name), *made.outputs} - {""}
            if node.name in names:
                candidates.append((0, place, index))
            candidates.extend(
                (distance, place, index) for distance, value in enumerate(values) if value in names
            )
    assigned: dict[int, OnnxNode] = {}
    taken: set[int] = set()
    for _, place, index in sorted(candidates):
        if place not in assigned and index not in taken:
            assigned[place] = done[index]
            taken.add(index)
    return assigned


def _audit_onnxruntime(
    graph: OnnxGraph,
    session: Session,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    iterations: int,
) -> Audit:
    with tempfile.TemporaryDirectory(prefix="obc-audit-") as folder:
        written = Path(folder) / "optimized.onnx"
        profiled = session.profile(inputs, iterations=iterations, optimized_model=written)
        optimized = read_onnx_graph(written)
    assigned = _assign(graph, optimized)
    regions = regions_of(session.path)
    made = {node.name: node for node in optimized.nodes if node.name}
    steps = [
        LayerProfile(
            name=step.name,
            kind=step.kind,
            ms=step.ms,
            native=True,
            outputs=made[step.name].outputs if step.name in made else (),
            int8=step.kind in INT8 if step.kind in MULTIPLYING else None,
        )
        for step in profiled
    ]
    timed = {step.name: step for step in steps}
    layers = []
    for place, node in enumerate(graph.layers):
        target = assigned.get(place)
        step = None
        if target is not None:
            step = timed.get(target.name) or LayerProfile(
                target.name, target.op_type, 0.0, native=True, int8=target.op_type in INT8
            )
        layer = _described(graph, node, step, shared=target is None or target.name not in timed)
        layers.append(
            replace(
                layer, kernel_sparsity=graph.kernel_sparsity(node), native=True,
                region=regions.get(node.outputs[0]),
            )
        )  # fmt: skip
    floats = [
        layer
        for node, layer in zip(graph.layers, layers, strict=True)
        if graph.reads_int8(node) and not layer.int8
    ]
    reasons = []
    if not any(layer.kernel_sparsity for layer in layers):
        reasons.append(onnxruntime_cpu.NO_SPARSITY)
    if floats:
        reasons.append(
            f"{len(floats)} quantized layers ran in float (first: '{floats[0].name}' as "
            f"{floats[0].kind or 'an operator that was not found again'}): their quantize and "
            "dequantize nodes stand where ONNX Runtime does not fuse them; quantize the output too"
        )
    return Audit(
        runtime=session.runtime,
        version=session.version,
        fraction_native=1.0,
        layers=tuple(layers),
        steps=tuple(steps),
        fallback=bool(floats),
        reasons=tuple(reasons),
    )


def random_inputs(inputs: Sequence[TensorSpec], batch_size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Normal values, or zeros for integers: which kernels run does not depend on them.

    Args:
        inputs: what a session takes.
        batch_size: where a size is open.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    made = {}
    for spec in inputs:
        shape = [size if isinstance(size, int) and size > 0 else batch_size for size in spec.shape]
        values = generator.standard_normal(shape)
        floating = np.issubdtype(np.dtype(spec.dtype), np.floating)
        made[spec.name] = (values if floating else np.zeros(shape)).astype(spec.dtype)
    return made


def audit(
    session: Session, inputs: Mapping[str, np.ndarray[Any, Any]], *, iterations: int = 10
) -> Audit:
    """How the runtime ran the session's artifact, layer by layer.

    Args:
        session: an open session.
        inputs: inputs to run it on.
        iterations: runs that its times come from.

    Raises:
        RuntimeFailedError: the runtime failed, crashed or hung.
    """
    graph = read_onnx_graph(session.path)
    if session.runtime == "deepsparse":
        return _audit_deepsparse(graph, session, inputs, iterations)
    return _audit_onnxruntime(graph, session, inputs, iterations)


def audit_artifact(
    runtime: str,
    path: Path | str,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    *,
    threads: int | None = None,
    batch_size: int = 1,
    timeout_s: float = 120.0,
) -> Audit:
    """The same for an artifact that is not open, in a session of its own.

    Raises:
        RuntimeMissingError: the runtime is not installed.
        ArtifactError: the file is missing or no ONNX graph.
        RuntimeFailedError: the runtime refused the artifact, failed, crashed or hung.
    """
    with open_session(
        runtime, path, threads=threads, batch_size=batch_size, timeout_s=timeout_s
    ) as session:
        return audit(session, inputs)


def _shortfall(audit: Audit, layer: AuditedLayer | None, expected: Expectation) -> str | None:
    if layer is None:
        return f"the artifact has no layer that computes '{expected.output}'"
    if not layer.native:
        return f"{audit.runtime} handed it on to its fallback"
    if expected.int8 and not layer.int8:
        return f"{audit.runtime} ran it in float, as {layer.kind or 'an unknown operation'}"
    if expected.sparse and layer.kernel_sparsity == 0.0:
        return f"{audit.runtime} multiplied its zeros too, in {layer.kind or layer.operator}"
    return None


def count_accelerated(audit: Audit, expected: Mapping[str, Expectation]) -> AcceleratedLayers:
    """Compare what was done to each layer with what the runtime made of it.

    A fused step that does not say what it skips counts as skipping: DeepSparse says nothing about
    chains of layers, and times alone tell. Layers of which nothing is expected are left out.

    Args:
        audit: what the runtime did.
        expected: by layer name, what was done to the layer.
    """
    layers = {value: layer for layer in reversed(audit.layers) for value in layer.outputs[1:]}
    layers.update({layer.outputs[0]: layer for layer in audit.layers})
    asked = {name: item for name, item in expected.items() if item.sparse or item.int8}
    reasons = {}
    sparse = int8 = 0
    for name, item in asked.items():
        layer = layers.get(item.output)
        if layer is not None and layer.native:
            sparse += item.sparse and layer.kernel_sparsity != 0.0
            int8 += item.int8 and layer.int8
        if shortfall := _shortfall(audit, layer, item):
            reasons[name] = shortfall
    return AcceleratedLayers(
        accelerated=len(asked) - len(reasons),
        total=len(asked),
        sparse=sparse,
        int8=int8,
        reasons=reasons,
    )
