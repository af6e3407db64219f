"""Sparse fully connected layers against ONNX Runtime's dense ones."""

from __future__ import annotations

import numpy as np
import pytest
from blocked_cases import CODES, QUICK, SCALES, SEEDS, SETS, THREADS, scales
from hypothesis import given
from hypothesis import strategies as st
from sparse_models import FLOAT, UINT8, Graph, block_sparse, blocks_of

from obc_deploy.runtimes import sparse

pytestmark = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())

# Few rows go one by one, many in tiles of 64.
LEADING = st.sampled_from([(1,), (7,), (8,), (64,), (65,), (2, 3), (3, 50), (2, 1, 5), ()])
FEATURES = st.sampled_from([1, 3, 4, 6, 64, 129, 300])
OUTPUTS = st.sampled_from([1, 5, 16, 17, 70])
DENSITIES = st.sampled_from([0.0, 0.1, 0.5, 1.0])


def weight_scales(random, outputs, one):
    return random.uniform(1e-3, 1e-2, 1 if one else outputs).astype(np.float32)


@QUICK
@given(
    LEADING, FEATURES, OUTPUTS, DENSITIES, SEEDS, SCALES, CODES, scales(0.02), CODES,
    st.booleans(), st.tuples(CODES, CODES).map(sorted), SETS, THREADS,
)  # fmt: skip
def test_sparse_linear_equals_qlinear_convolution_of_rows(
    leading, features, outputs, density, seed, input_scale, input_zero, scale, zero, one_scale,
    bounds, instructions, threads,
):  # fmt: skip
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (*leading, features)).astype(np.uint8)
    weight = block_sparse(random, outputs, features, 1, 1, density)
    weight_scale = weight_scales(random, outputs, one_scale)
    bias = random.integers(-20000, 20000, outputs).astype(np.int32)
    graph = Graph()
    graph.input("x", x)
    rows = graph.add("Reshape", ["x", graph.constant([-1, features, 1, 1], np.int64)])
    scalars = [(input_scale, np.float32), (input_zero, np.uint8)]
    inputs = [rows, *(graph.constant(*each) for each in scalars), graph.constant(weight)]
    inputs.append(graph.constant(np.broadcast_to(weight_scale, outputs), np.float32))
    inputs.append(graph.constant(np.zeros(outputs, np.int8)))
    inputs += [graph.constant(scale, np.float32), graph.constant(zero, np.uint8)]
    convolved = graph.add("QLinearConv", [*inputs, graph.constant(bias)], kernel_shape=[1, 1])
    clipped = graph.add("Clip", [convolved, *(graph.constant(b, np.uint8) for b in bounds)])
    inputs = ["x", *(graph.constant(part) for part in blocks_of(weight))]
    found = graph.sparse(
        "SparseLinear", [*inputs, graph.constant(weight_scale), graph.constant(bias)],
        features=features, input_scale=input_scale, input_zero_point=input_zero,
        output_scale=scale, output_zero_point=zero, lower=bounds[0], upper=bounds[1],
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run({"x": x}, {clipped: UINT8, found: UINT8}, threads)
    assert made.shape == (*leading, outputs)
    np.testing.assert_array_equal(made.reshape(-1, outputs), wanted.reshape(-1, outputs))


@QUICK
@given(LEADING, FEATURES, OUTPUTS, DENSITIES, SEEDS, SCALES, CODES, scales(0.02), CODES, SETS)
def test_sparse_linear_equals_qlinear_matmul(
    leading, features, outputs, density, seed, input_scale, input_zero, scale, zero, instructions
):
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (*(leading or (1,)), features)).astype(np.uint8)
    weight = block_sparse(random, outputs, features, 1, 1, density)
    weight_scale = weight_scales(random, outputs, one=True)
    graph = Graph()
    graph.input("x", x)
    inputs = ["x", graph.constant(input_scale, np.float32), graph.constant(input_zero, np.uint8)]
    inputs.append(graph.constant(weight[:, :, 0, 0].T.copy()))
    inputs += [graph.constant(weight_scale[0], np.float32), graph.constant(0, np.int8)]
    inputs += [graph.constant(scale, np.float32), graph.constant(zero, np.uint8)]
    expected = graph.add("QLinearMatMul", inputs)
    inputs = ["x", *(graph.constant(part) for part in blocks_of(weight))]
    found = graph.sparse(
        "SparseLinear", [*inputs, graph.constant(weight_scale)], features=features,
        input_scale=input_scale, input_zero_point=input_zero, output_scale=scale,
        output_zero_point=zero,
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run({"x": x}, {expected: UINT8, found: UINT8})
    np.testing.assert_array_equal(made, wanted)


@QUICK
@given(
    LEADING, FEATURES, OUTPUTS, DENSITIES, SEEDS, SCALES, CODES, st.booleans(), st.booleans(),
    SETS, THREADS,
)  # fmt: skip
def test_sparse_linear_dequantize(
    leading, features, outputs, density, seed, input_scale, input_zero, one_scale, with_bias,
    instructions, threads,
):  # fmt: skip
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (*leading, features)).astype(np.uint8)
    weight = block_sparse(random, outputs, features, 1, 1, density)
    weight_scale = weight_scales(random, outputs, one_scale)
    bias = random.normal(size=outputs).astype(np.float32)
    graph = Graph()
    graph.input("x", x)
    inputs = ["x", *(graph.constant(part) for part in blocks_of(weight))]
    inputs.append(graph.constant(weight_scale))
    inputs += [graph.constant(bias)] if with_bias else []
    found = graph.sparse(
        "SparseLinearDequantize", inputs, features=features, input_scale=input_scale,
        input_zero_point=input_zero,
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        (made,) = graph.run({"x": x}, {found: FLOAT}, threads)
    sums = (x.astype(np.int64) - input_zero) @ weight[:, :, 0, 0].T.astype(np.int64)
    wanted = sums.astype(np.float32) * (np.float32(input_scale) * weight_scale)
    wanted = wanted + bias if with_bias else wanted
    np.testing.assert_array_equal(made, wanted)
