"""Small layer problems with correlated inputs, and what tests ask of folders and solvers."""

from __future__ import annotations

import numpy as np
import torch

from obc_deploy.schemes import Scheme
from obc_deploy.solvers import LayerProblem

SCHEMES = (
    "dense", "unstructured@0.5", "unstructured@0.9", "block4@0.5", "2:4", "w8a8", "w4", "w4a4",
    "w3-asym", "w2", "w4g8", "unstructured@0.5+w8a8", "block4@0.5+w3", "2:4+w4a4",
    "block4@0.25+w4g8-asym",
)  # fmt: skip
LEVELS = tuple(Scheme.parse(text) for text in SCHEMES)


def make_problem(name="layer", seed=0, rows=6, cols=16, groups=1, **changes):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, cols, cols)) @ rng.standard_normal(
        (groups, cols, 3 * cols)
    )
    hessian = torch.from_numpy(2 / (3 * cols) * mixed @ mixed.swapaxes(1, 2))
    weight = torch.from_numpy(rng.standard_normal((rows, cols)).astype(np.float32))
    given = {"weight": weight, "hessian": hessian if groups > 1 else hessian[0], "name": name}
    return LayerProblem(**{**given, **changes})


def network():
    """Three layers, one of them grouped."""
    return [
        make_problem("conv1", 1, rows=4, cols=16, channels=8),
        make_problem("block/conv2", 2, rows=6, cols=24, groups=2),
        make_problem("linear", 3, rows=5, cols=32),
    ]


def all_levels(outline):
    return LEVELS


def contents(folder):
    """Names and bytes of what a database keeps."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def places(folder):
    """Where each layer's file lies on disk, and since when."""
    found = [(path, path.stat()) for path in folder.glob("*.safetensors")]
    return {path.name: (status.st_ino, status.st_mtime_ns) for path, status in found}


def same_bits(one, other):
    """Whether two compressed layers agree to the bit."""
    assert (one.scheme, one.error, one.method) == (other.scheme, other.error, other.method)
    for name in ("weight", "mask", "codes", "scale", "zero_point"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert a.shape == b.shape, name
            assert a.numpy().tobytes() == b.numpy().tobytes(), name
    return True
