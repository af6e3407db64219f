"""Float32 operators with unstructured weights against ONNX Runtime's dense ones."""

from __future__ import annotations

import numpy as np
import pytest
from blocked_cases import CHANNELS, IMAGES, QUICK, SEEDS, SETS, THREADS
from hypothesis import assume, given
from hypothesis import strategies as st
from sparse_models import FLOAT, Graph, entries_of

from obc_deploy.runtimes import sparse

pytestmark = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())

DENSITIES = st.sampled_from([0.0, 0.05, 0.3, 1.0])
CLIPS = st.sampled_from([{}, {"lower": 0.0}, {"lower": 0.0, "upper": 6.0}, {"upper": 0.5}])


def unstructured(random, shape, density):
    weight = random.normal(size=shape) * (random.random(shape) < density)
    return weight.astype(np.float32)


def clipped(values, clip):
    return np.clip(values, clip.get("lower", -np.inf), clip.get("upper", np.inf))


@QUICK
@given(
    st.data(), IMAGES, CHANNELS, st.sampled_from([1, 2]), DENSITIES, CLIPS, st.booleans(),
    st.booleans(), SETS, THREADS,
)  # fmt: skip
def test_sparse_convolution_float(
    data, image, outputs, stride, density, clip, with_bias, with_residual, instructions, threads
):
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (5, 2), (7, 7), (1, 3)]))
    pads = [data.draw(st.integers(0, side - 1)) for side in kernel * 2]
    assume(image.height + pads[0] + pads[2] >= kernel[0])
    assume(image.width + pads[1] + pads[3] >= kernel[1])
    random = image.random()
    x = random.normal(size=image.shape).astype(np.float32)
    weight = unstructured(random, (outputs, image.channels, *kernel), density)
    bias = random.normal(size=outputs).astype(np.float32)
    where = {"kernel_shape": list(kernel), "strides": [stride] * 2, "pads": pads}
    graph = Graph()
    graph.input("x", x)
    bias_input = [graph.constant(bias)] if with_bias else []
    expected = graph.add("Conv", ["x", graph.constant(weight), *bias_input], **where)
    (wanted,) = graph.run({"x": x}, {expected: FLOAT})
    feeds = {"x": x}
    inputs = ["x", *(graph.constant(part) for part in entries_of(weight)), *bias_input]
    if with_residual:
        feeds["residual"] = random.normal(size=wanted.shape).astype(np.float32)
        wanted = wanted + feeds["residual"]
        inputs += [""] * (4 - len(inputs)) + [graph.input("residual", feeds["residual"])]
    found = graph.sparse("SparseConvolutionFloat", inputs, channels=image.channels, **where, **clip)
    with sparse.use_instruction_set(instructions):
        (made,) = graph.run(feeds, {found: FLOAT}, threads)
    np.testing.assert_allclose(made, clipped(wanted, clip), rtol=1e-4, atol=1e-4)


@QUICK
@given(
    st.sampled_from([(1,), (7,), (8,), (33,), (2, 70), ()]),
    st.sampled_from([1, 3, 16, 40, 200]), st.sampled_from([1, 5, 16, 70]),
    DENSITIES, CLIPS, st.booleans(), SEEDS, SETS, THREADS,
)  # fmt: skip
def test_sparse_linear_float(
    leading, features, outputs, density, clip, with_bias, seed, instructions, threads
):
    random = np.random.default_rng(seed)
    x = random.normal(size=(*leading, features)).astype(np.float32)
    weight = unstructured(random, (outputs, features, 1, 1), density)
    bias = random.normal(size=outputs).astype(np.float32)
    graph = Graph()
    graph.input("x", x)
    inputs = ["x", *(graph.constant(part) for part in entries_of(weight))]
    inputs += [graph.constant(bias)] if with_bias else []
    found = graph.sparse("SparseLinearFloat", inputs, features=features, **clip)
    with sparse.use_instruction_set(instructions):
        (made,) = graph.run({"x": x}, {found: FLOAT}, threads)
    wanted = x.astype(np.float64) @ weight[:, :, 0, 0].T + (bias if with_bias else 0)
    np.testing.assert_allclose(made, clipped(wanted, clip), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("instructions", sparse.INSTRUCTION_SETS)
def test_what_is_pruned_away_does_not_matter(instructions):
    # The first input is infinite, and no weight that is there meets it.
    x = np.ones((1, 20), np.float32)
    x[0, 0] = np.inf
    weight = np.zeros((3, 20, 1, 1), np.float32)
    weight[:, 5:8] = 2
    graph = Graph()
    graph.input("x", x)
    inputs = ["x", *(graph.constant(part) for part in entries_of(weight))]
    found = graph.sparse("SparseLinearFloat", inputs, features=20)
    try:
        with sparse.use_instruction_set(instructions):
            (made,) = graph.run({"x": x}, {found: FLOAT})
    except ValueError:
        pytest.skip(f"no {instructions} here")
    assert (made == 6).all()
