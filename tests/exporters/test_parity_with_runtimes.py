"""Every form of file computes what the simulated network computes, code for code.

A code may be one step off where a sum falls on a rounding boundary: float32 and integer kernels
round it from different sides. That is rare enough to leave most samples without one, and one step
moves an output by no more than a step of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import DEEPSPARSE_MARKS, relative, run
from tiny_networks import (
    Concatenation,
    Depthwise,
    Plain,
    Residual,
    Sequence1d,
    SharedConvolution,
    Upsampling,
    samples,
)

from obc_deploy.runtimes.audit import Expectation, audit_artifact, count_accelerated
from obc_deploy.runtimes.session import open_session

EXACT = 1e-5
ONE_CODE = 3e-2
COUNT = 8
QDQ, QOPERATOR = "onnxruntime", "onnxruntime-qoperator"


def unseen(kind):
    return samples(kind, COUNT, seed=5)


def check_outputs(found, model, target, x):
    """Equal to float precision unless a sum falls on a tie; never further than a code moves it."""
    with torch.no_grad():
        wanted = model.module(target)(torch.from_numpy(x)).numpy()
    errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) <= ONE_CODE
    assert np.mean([error <= EXACT for error in errors]) >= 0.25


def feeds(model, x):
    return dict(zip(model.network.input_names, [x], strict=True))


@pytest.mark.parametrize(
    ("kind", "scheme", "target"),
    [
        *[
            (kind, "w8a8", target)
            for kind in (Residual, Depthwise, Concatenation, SharedConvolution)
            for target in (QDQ, QOPERATOR)
        ],
        (Sequence1d, "w8a8", QOPERATOR),
        (Upsampling, "w8a8", QDQ),
        (Residual, "w4a8", QOPERATOR),
        (Residual, "w8a4", QDQ),
        (Depthwise, "w8a4", QOPERATOR),
        (Plain, "w8", QDQ),
        (Residual, "w8a8-asym", QDQ),
        (Plain, "w3a8-asym", QOPERATOR),
        (Plain, "2:4+w8a8", QDQ),
        (Plain, "unstructured@0.5", QDQ),
        (Plain, "dense", QOPERATOR),
    ],
)
def test_onnx_runtime(compressed, tmp_path, kind, scheme, target):
    model = compressed(kind, scheme)
    x = unseen(kind)
    artifact = model.export(tmp_path, target=target, batch_size=COUNT, check=False)
    found = run(artifact.path, x)
    check_outputs(found, model, target, x)
    if scheme == "w8a8":
        with torch.no_grad():
            assert relative(found, model.network.module(torch.from_numpy(x)).numpy()) < 0.05
    # ONNX Runtime fuses four-bit grids with a clip only where the file spells the operator out.
    if kind is not Upsampling and (scheme.endswith("a8") or target == QOPERATOR):
        audited = audit_artifact(
            "onnxruntime", artifact.path, feeds(model, x), threads=1, batch_size=COUNT
        )
        floats = [layer.operator for layer in audited.layers if not layer.int8]
        wanted_int8 = sum(layer.int8 for layer in artifact.manifest.layers)
        assert len(audited.layers) - len(floats) >= wanted_int8
        assert audited.fallback is False


@pytest.mark.parametrize(
    ("kind", "scheme", "target", "options"),
    [
        (Residual, "w4g9", QDQ, {"layer_schemes": {"first": "w8a8", "head": "w8a8"}}),
        (Residual, "w4g16a8", QOPERATOR, {"skip": ["first"]}),
        (Residual, "w8a8", QOPERATOR, {"skip": ["second", "head"]}),
        (Residual, "w8a4", QDQ, {"layer_schemes": {"first": "w8a8", "head": "w8a6"}}),
    ],
)
def test_mixtures(compressed, tmp_path, kind, scheme, target, options):
    model = compressed(kind, scheme, **options)
    x = unseen(kind)
    artifact = model.export(tmp_path, target=target, batch_size=COUNT)
    check_outputs(run(artifact.path, x), model, target, x)
    assert artifact.manifest.parity["relative_error"] <= ONE_CODE
    assert artifact.manifest.parity["agreement"] == 1.0


def test_a_dense_layer_between_quantized_ones(compressed, tmp_path):
    # Left to itself ONNX Runtime quantizes its weights, with one step for all channels.
    model = compressed(Depthwise, skip=["depthwise"])
    x = unseen(Depthwise)
    artifact = model.export(tmp_path, batch_size=COUNT)
    found = run(artifact.path, x, without=["WeightBiasQuantization"])
    check_outputs(found, model, QDQ, x)
    with torch.no_grad():
        wanted = model.module(QDQ)(torch.from_numpy(x)).numpy()
    assert relative(run(artifact.path, x), wanted) <= ONE_CODE


@pytest.mark.parametrize(
    ("kind", "scheme", "steps"),
    [
        pytest.param(*case, marks=DEEPSPARSE_MARKS)
        for case in [
            (Residual, "w8a8", "shared"),
            (Depthwise, "w8a8", "shared"),
            (Residual, "w8a8", "rows"),
            (Depthwise, "w8a8", "rows"),
            (Concatenation, "w8a8", "rows"),
            (SharedConvolution, "w8a8", "rows"),
            (Upsampling, "w8a8", "rows"),
            (Residual, "w8a4", "rows"),
            (Residual, "w8", "rows"),
            (Plain, "2:4+w8a8", "shared"),
        ]
    ],
)
def test_deepsparse_takes_all_of_it(compressed, tmp_path, kind, scheme, steps):
    model = compressed(kind, scheme, steps=steps)
    artifact = model.export(tmp_path, target="deepsparse", batch_size=COUNT)
    assert artifact.manifest.parity["runtime"] == "deepsparse"
    assert artifact.manifest.parity["relative_error"] <= ONE_CODE
    x = unseen(kind)
    with open_session("deepsparse", artifact.path, threads=1, batch_size=COUNT) as session:
        (found,) = session.run(feeds(model, x)).values()
    check_outputs(found, model, "deepsparse", x)
    # The same file means the same to ONNX Runtime.
    here = run(artifact.path, x, without=["WeightBiasQuantization"])
    check_outputs(here, model, "deepsparse", x)

    audited = audit_artifact(
        "deepsparse", artifact.path, feeds(model, x), threads=1, batch_size=COUNT
    )
    assert audited.fraction_native == 1.0
    assert not audited.fallback
    expected = {
        layer.name: Expectation(layer.output, False, layer.int8)
        for layer in artifact.manifest.layers
    }
    counted = count_accelerated(audited, expected)
    # A depthwise convolution with a step a row has no integer kernel there; float is native.
    assert set(counted.reasons) == (
        {"depthwise"} if (kind, steps) == (Depthwise, "rows") else set()
    )


@pytest.mark.parametrize("steps", [pytest.param("rows", marks=DEEPSPARSE_MARKS)])
def test_deepsparse_runs_what_it_has_no_kernels_for(compressed, tmp_path, steps):
    # One-dimensional convolutions: in its fallback, and said so, but never refused.
    model = compressed(Sequence1d, steps=steps)
    artifact = model.export(tmp_path, target="deepsparse", batch_size=COUNT)
    x = unseen(Sequence1d)
    with open_session("deepsparse", artifact.path, threads=1, batch_size=COUNT) as session:
        (found,) = session.run(feeds(model, x)).values()
        assert session.facts["fraction_native"] < 1.0
    check_outputs(found, model, "deepsparse", x)
