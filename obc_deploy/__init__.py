"""OBC Deploy: compress trained PyTorch models, export them, and measure what it was worth.

    import obc_deploy as obc

    compressed = obc.compress(model, calibration, scheme="block4@0.9+w8a8", target="deepsparse")
    artifact = compressed.export("out/", target="deepsparse")
    measurements = obc.benchmark([compressed], data=(images, labels))

Importing this module loads neither torch nor any runtime; the verbs do when they are called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obc_deploy.artifacts import Artifact as Artifact
    from obc_deploy.artifacts import load_artifact as load_artifact
    from obc_deploy.benchmarks.comparison import benchmark as benchmark
    from obc_deploy.benchmarks.measurement import Measurement as Measurement
    from obc_deploy.calibrated import calibrate as calibrate
    from obc_deploy.compression import CompressedModel as CompressedModel
    from obc_deploy.compression import compress as compress
    from obc_deploy.data import Preprocessing as Preprocessing
    from obc_deploy.data import Samples as Samples
    from obc_deploy.data import load_samples as load_samples
    from obc_deploy.models import load_model as load_model
    from obc_deploy.planning import PlanSettings as PlanSettings
    from obc_deploy.run_directory import load_run as load  # noqa: F401
    from obc_deploy.schemes import Scheme as Scheme
    from obc_deploy.solvers import solve as solve
    from obc_deploy.solvers.contract import CompressedLayer as CompressedLayer

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "artifacts",
    "CompressedLayer": "solvers.contract",
    "CompressedModel": "compression",
    "Measurement": "benchmarks.measurement",
    "PlanSettings": "planning",
    "Preprocessing": "data",
    "Samples": "data",
    "Scheme": "schemes",
    "benchmark": "benchmarks.comparison",
    "calibrate": "calibrated",
    "compress": "compression",
    "load": "run_directory.load_run",
    "load_artifact": "artifacts",
    "load_model": "models",
    "load_samples": "data",
    "solve": "solvers",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Load a public name from its home the first time it is used."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'obc_deploy' has no attribute '{name}'")
    module_name, attribute = home.rsplit(".", 1) if home.endswith("load_run") else (home, name)
    value = getattr(importlib.import_module(f"obc_deploy.{module_name}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return list(__all__)
