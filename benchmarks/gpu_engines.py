"""Whole networks as TensorRT engines: built here, checked, timed by their device in turns.

Where engines are only built ahead of time and nothing runs them, that is named for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from obc_deploy.benchmarks.gpu_findings import Findings, repeated_inputs, timed_row
from obc_deploy.runtimes.tensorrt import TITLES, why_no_gpu

if TYPE_CHECKING:
    from obc_deploy.compression import CompressedModel
    from obc_deploy.exporters.engine import Engine
    from obc_deploy.runtimes.session import Session

ENGINE_VARIANTS = (
    ("dense fp16", "dense"),
    ("2:4 fp16", "2:4"),
    ("int8", "w8a8"),
    ("2:4+int8", "2:4+w8a8"),
)
"""Name and scheme; sparse kernels are allowed where the scheme is 2:4."""
ENGINE_TOLERANCE = {"fp16": 0.03, "int8": 0.15}
"""Root-mean-square error of an engine's outputs beside the network's float32 simulation."""


@dataclass(frozen=True)
class BuiltEngine:
    """A variant's engine.

    Attributes:
        model: what it was made from.
        engine: the file and how it was built.
    """

    model: CompressedModel
    engine: Engine


def build_variant(variant: str, model: CompressedModel, batch: int, folder: Path) -> BuiltEngine:
    """Export a variant and build its engine.

    Raises:
        ExportError: the network has no form there, or the builder refuses it.
        RuntimeMissingError: no library with a builder is here.
    """
    from obc_deploy.exporters.engine import EngineOptions, build_engine
    from obc_deploy.targets import TENSORRT

    place = folder / f"{variant.replace(':', '-').replace(' ', '-')}.onnx"
    artifact = model.export(place, target=TENSORRT, batch_size=batch, check=False)
    options = EngineOptions(sparse=variant.startswith("2:4"))
    return BuiltEngine(model, build_engine(artifact.path, options=options))


def engine_error(
    session: Session, built: BuiltEngine, inputs: Mapping[str, npt.NDArray[Any]]
) -> float:
    """How far an engine's first output is from the simulation on the same grids, in float32."""
    import torch

    from obc_deploy.runtimes.torch_cuda import relative_rms
    from obc_deploy.targets import TENSORRT

    module = built.model.quantized(TENSORRT.placement).module
    with torch.no_grad():
        wanted = module(*(torch.from_numpy(array) for array in inputs.values()))
    wanted = wanted[0] if isinstance(wanted, list | tuple) else wanted
    given = next(iter(session.run(inputs).values()))
    return relative_rms(torch.from_numpy(given), wanted)


def time_engines(
    name: str,
    batch: int,
    models: Mapping[str, CompressedModel],
    folder: Path,
    found: Findings,
    *,
    rounds: int,
    samples: int,
) -> None:
    """Build every variant of a network, check it, and time those that are right.

    Args:
        name: the network.
        batch: samples of an inference.
        models: by scheme, those of `ENGINE_VARIANTS`.
        folder: where files and engines go.
        found: gets a row for each variant, or why there is none.
        rounds: turns that variants take.
        samples: inferences in a turn.
    """
    from obc_deploy.runtimes.session import open_session

    missing = why_no_gpu()
    inputs = repeated_inputs(models["dense"], batch)
    with ExitStack() as stack:
        opened: dict[str, tuple[Session, BuiltEngine, float]] = {}
        for variant, scheme in ENGINE_VARIANTS:
            what = f"engine {name}, {variant}"
            if not found.has_time(what):
                continue
            with found.naming(what):
                built = build_variant(variant, models[scheme], batch, folder)
                made = built.engine.manifest
                if missing is not None:
                    by = f"{TITLES[made.library]} {made.version}"
                    found.miss(what, f"built by {by} and not run: {missing}")
                    continue
                session = stack.enter_context(
                    open_session("tensorrt", built.engine.path, threads=1)
                )
                error = engine_error(session, built, inputs)
                if error > ENGINE_TOLERANCE["int8" if "int8" in variant else "fp16"]:
                    found.miss(what, f"its outputs are off by {100 * error:.2g} %")
                    continue
                opened[variant] = session, built, error
        times: dict[str, list[float]] = {variant: [] for variant in opened}
        copies: dict[str, list[float]] = {variant: [] for variant in opened}
        for _ in range(rounds):
            for variant, (session, _, _) in opened.items():
                taken = session.time_on_device(inputs, warmup=3, samples=samples)
                times[variant].append(float(np.median(taken.compute_ms)))
                copies[variant].append(float(np.median(taken.with_copies_ms)))
        dense = times.get("dense fp16")
        for variant, (_, built, error) in opened.items():
            made = built.engine.manifest
            found.engines.append(
                {
                    "network": name,
                    "batch": batch,
                    "library": f"{TITLES[made.library]} {made.version}",
                    "error": error,
                    "sparse_found": made.sparse_found_count,
                    "sparse_chosen": made.sparse_chosen_count,
                    "size_bytes": made.size_bytes,
                    "build_seconds": made.seconds,
                    **timed_row(built.model, variant, times[variant], copies[variant], dense),
                }
            )


def engine_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown; none where no engine ran."""
    if not rows:
        return []
    lines = [
        "", "## Engines", "",
        "TensorRT, milliseconds a batch between CUDA events; speedups over the dense fp16 engine. "
        "Sparse: layers that got a sparse kernel, of those that could, as the builder's log says.",
        "",
        "| network | batch | variant | ms | with copies | speedup | MACs promise | BOPs promise | "
        "sparse | off by | library |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        speedup = "-" if r["speedup"] is None else f"{r['speedup']:.2f}x"
        sparse = "-"
        if r["variant"].startswith("2:4"):
            chosen, could = (
                "?" if r[k] is None else r[k] for k in ("sparse_chosen", "sparse_found")
            )
            sparse = f"{chosen}/{could}"
        lines.append(
            f"| {r['network']} | {r['batch']} | {r['variant']} | {r['ms']:.3f} | "
            f"{r['ms_with_copies']:.3f} | {speedup} | {r['predicted_macs']:.2f}x | "
            f"{r['predicted_bops']:.2f}x | {sparse} | {100 * r['error']:.2g} % | {r['library']} |"
        )
    return lines
