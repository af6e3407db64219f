"""DeepSparse, inside a worker."""

from __future__ import annotations

import os
from typing import Any, Dict, List

from worker_backend import BadArtifact, Refused

os.environ.setdefault("NM_DISABLE_ANALYTICS", "True")

import deepsparse
import onnx
from deepsparse.engine import model_debug_analysis

VERSION = deepsparse.__version__


def _spec(value: Any, batch_size: int) -> Dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [
        size.dim_value if size.HasField("dim_value") else (size.dim_param or None)
        for size in tensor.shape.dim
    ]
    # The engine overrides the first size of every input and output.
    if shape:
        shape[0] = batch_size
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return {"name": value.name, "shape": shape, "dtype": str(dtype)}


class Backend:
    """One artifact, compiled for `threads` cores and a fixed batch size."""

    def __init__(self, path: str, threads: int, batch_size: int, options: Dict[str, Any]) -> None:
        self.version = VERSION
        self._path = path
        self._threads = threads
        self._batch_size = batch_size
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:
            raise BadArtifact(str(error)) from error
        try:
            self._engine = deepsparse.Engine(path, batch_size=batch_size, num_cores=threads)
        except Exception as error:
            raise Refused(str(error)) from error
        engine = self._engine
        weights = {weight.name for weight in model.graph.initializer}
        self.inputs = [
            _spec(value, batch_size) for value in model.graph.input if value.name not in weights
        ]
        self.outputs = [_spec(value, batch_size) for value in model.graph.output]
        self.facts: Dict[str, Any] = {
            "fraction_native": float(engine.fraction_of_supported_ops),
            "instructions": engine.cpu_avx_type,
            "vnni": bool(engine.cpu_vnni),
        }

    def _ordered(self, feed: Dict[str, Any]) -> List[Any]:
        return [feed[spec["name"]] for spec in self.inputs]

    def infer(self, feed: Dict[str, Any]) -> List[Any]:
        """All outputs, in the graph's order."""
        return self._engine.run(self._ordered(feed), val_inp=False)

    def profile(
        self, feed: Dict[str, Any], warmup: int, iterations: int, options: Dict[str, Any]
    ) -> Dict[str, Any]:
        """The engine's own table of layers: those it took, and the subgraphs it passed on."""
        analysis = model_debug_analysis(
            self._path,
            self._ordered(feed),
            batch_size=self._batch_size,
            num_cores=self._threads,
            num_iterations=iterations,
            num_warmup_iterations=warmup,
        )
        layers = []
        for layer in analysis["layer_info"]:
            name = layer["name"]
            native = not name.startswith("Naive Subgraph")
            # A fused chain ("pyramid") reports no sparsity at all: 0.0 there means "not said".
            said = native and not name.startswith("pyramid")
            values = [value for value in layer["canonical_name"].split(",") if value != "<none>"]
            layers.append(
                {
                    "name": name,
                    "kind": name.rstrip("0123456789").rstrip("_ "),
                    "ms": float(layer["average_run_time_in_ms"]),
                    "kernel_sparsity": float(layer["kernel_sparsity"]) if said else None,
                    "native": native,
                    "outputs": values,
                }
            )
        return {"layers": layers, "facts": dict(self.facts)}
