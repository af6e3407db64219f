"""Measurements of known make, for the tests of what is drawn from them."""

from __future__ import annotations

import numpy as np

from obc_deploy.benchmarks.measurement import Measurement, WorkerSamples, measurement
from obc_deploy.costs import layer_cost, total


def workers_around(middle, *, workers=2, rounds=4, samples=10, noise=0.01, seed=0):
    """Worker processes whose samples lie around `middle` ms; the whole way takes 1.5 times that."""
    generator = np.random.default_rng(seed)
    times = middle * np.exp(generator.normal(0, noise, (workers, rounds, samples)))
    return tuple(
        WorkerSamples(
            rounds=own.tolist(),
            warmup_ms=(2.0 * middle,),
            end_to_end_rounds=(1.5 * own).tolist(),
            end_to_end_warmup_ms=(3.0 * middle,),
        )
        for own in times
    )


def measured(variant, scheme, role, middle, *, runtime="onnxruntime", **more) -> Measurement:
    """A measurement around `middle` ms of a network of one layer."""
    costs = total([layer_cost("layer", 1_000_000, scheme, weights=1000)])
    more = {"accuracy": 0.97, "accuracy_samples": 400, "agreement": 0.99} | more
    return measurement(
        variant=variant,
        scheme=scheme,
        runtime=runtime,
        role=role,
        threads=1,
        processes=workers_around(middle, seed=len(variant)),
        costs=costs,
        size_bytes=costs.bytes,
        layers_accelerated=1,
        layers_total=1,
        **more,
    )


def one_run(runtime="onnxruntime", fastest=1.0) -> list[Measurement]:
    """Both dense networks and three compressed ones, without speedups."""
    return [
        measured("dense fp32", "dense", "dense-fp32", 8.0, runtime=runtime),
        measured("dense w8a8", "w8a8", "dense-int8", 4.0, runtime=runtime),
        measured("block4@0.9+w8a8", "block4@0.9+w8a8", "compressed", fastest, runtime=runtime),
        measured("2:4+w8a8", "2:4+w8a8", "compressed", 4.0, runtime=runtime),
        measured("unstructured@0.9", "unstructured@0.9", "compressed", 16.0, runtime=runtime),
    ]
