"""The 2:4 rule on files: against brute force, and on what other ways of grouping get wrong."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import Residual, build, samples

from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress
from obc_deploy.errors import ArtifactError
from obc_deploy.runtimes.two_of_four import check_two_of_four, count_groups, summary

FLOAT = TensorProto.FLOAT


def saved(path, nodes, constants, opset=21):
    """A file over an open input `x`; what the layers compute matters to nobody here."""
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", FLOAT, None)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def convolution(path, weight, **attributes):
    return saved(path, [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], {"w": weight})


def two_of_four(rng, shape, axis=-1):
    """Random values, two of each four along an axis zero, wherever chance puts them."""
    values = np.moveaxis(rng.uniform(0.5, 1.0, shape).astype(np.float32), axis, -1).copy()
    order = rng.random((*values.shape[:-1], values.shape[-1] // 4, 4)).argsort(-1)
    values[(order < 2).reshape(values.shape)] = 0
    return np.moveaxis(values, -1, axis)


def brute_force(weight):
    """(groups, valid groups) of a Conv weight (O, I, R, S), one number after another."""
    outputs, inputs, *kernel = weight.shape
    groups = valid = 0
    for output, *place in itertools.product(range(outputs), *map(range, kernel)):
        for first in range(0, inputs - 3, 4):
            filled = 0
            for channel in range(first, first + 4):
                filled += bool(weight[(output, channel, *place)] != 0)
            groups += 1
            valid += filled <= 2
    return groups, valid


@pytest.fixture(scope="module")
def residual():
    return calibrate(build(Residual), samples(Residual))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_groups_are_counted_as_by_brute_force(data, tmp_path_factory):
    shape = tuple(data.draw(st.tuples(*[st.integers(1, n) for n in (4, 13, 3, 2)])))
    seed, zeros = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.floats(0, 1))
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random(shape) < zeros, 0, rng.standard_normal(shape)).astype(np.float32)
    path = convolution(tmp_path_factory.mktemp("conv") / "c.onnx", weight)
    (layer,) = check_two_of_four(path)
    groups, valid = brute_force(weight)
    assert (layer.groups, layer.valid_groups) == (groups, valid)
    assert layer.valid == (shape[1] % 4 == 0 and groups == valid)
    assert (layer.outputs, layer.inputs) == shape[:2]


def test_a_pattern_along_flattened_channels_and_positions_is_not_two_of_four(rng, tmp_path):
    flat = two_of_four(rng, (8, 16 * 9)).reshape(8, 16, 3, 3)
    (layer,) = check_two_of_four(convolution(tmp_path / "flat.onnx", flat))
    assert count_groups(flat.reshape(8, -1)) == (288, 288)
    assert not layer.valid
    assert 0 < layer.share < 1
    along = two_of_four(rng, (8, 16, 3, 3), axis=1)
    (layer,) = check_two_of_four(convolution(tmp_path / "along.onnx", along))
    assert layer.valid
    assert layer.share == 1.0
    flat_groups, flat_valid = count_groups(along.reshape(8, -1))
    assert flat_valid < flat_groups


def test_one_weight_too_many_is_found(rng, tmp_path):
    weight = two_of_four(rng, (8, 16, 3, 3), axis=1)
    group = weight[5, 8:12, 1, 2]
    group[int(np.flatnonzero(group == 0)[0])] = 1e-6
    (layer,) = check_two_of_four(convolution(tmp_path / "c.onnx", weight))
    assert not layer.valid
    assert layer.groups - layer.valid_groups == 1


@pytest.mark.parametrize("zero_point", [0, 7])
def test_integer_codes_are_zero_at_their_zero_point(rng, tmp_path, zero_point):
    weight = two_of_four(rng, (8, 16, 1, 1), axis=1)
    codes = (np.round(weight * 100) + zero_point).astype(np.int8)
    constants = {
        "w": codes, "s": np.full(8, 0.01, np.float32), "z": np.full(8, zero_point, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0),
        helper.make_node("Conv", ["x", "d"], ["y"]),
    ]
    (layer,) = check_two_of_four(saved(tmp_path / "q.onnx", nodes, constants))
    assert layer.valid
    assert (layer.storage, layer.weight) == ("int8", "w")
    constants["z"] = np.full(8, zero_point + 1, np.int8)
    (layer,) = check_two_of_four(saved(tmp_path / "r.onnx", nodes, constants))
    assert layer.share == 0.0


def test_blocked_int4_codes(rng, tmp_path):
    codes = (two_of_four(rng, (64, 24), axis=0) * 7).astype(ml_dtypes.int4)
    scale = rng.uniform(0.1, 0.2, (2, 24)).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    (layer,) = check_two_of_four(saved(tmp_path / "q.onnx", nodes, {"w": codes, "s": scale}))
    assert layer.valid
    assert (layer.storage, layer.outputs, layer.inputs) == ("int4", 24, 64)
    assert "int4 weights have none" in layer.obstacles[0]
    zero = np.zeros((2, 24), ml_dtypes.int4)
    zero[1, 3] = 1
    nodes[0].input.append("z")
    given = {"w": codes, "s": scale, "z": zero}
    (layer,) = check_two_of_four(saved(tmp_path / "z.onnx", nodes, given))
    # Zeros of column 3 of the second block are zeros no more; only a 1 there has become one.
    centred = codes.astype(np.int32)
    centred[32:, 3] -= 1
    groups, valid = count_groups(centred.T)
    assert (layer.groups, layer.valid_groups) == (groups, valid)
    assert valid < groups


def test_float_weights_behind_a_quantizer_count_as_its_codes(rng, tmp_path):
    weight = two_of_four(rng, (8, 32), axis=1)
    weight[weight == 0] = 0.003
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Gemm", ["x", "d"], ["y"], transB=1),
    ]
    coarse = {"w": weight, "s": np.float32(0.01), "z": np.int8(0)}
    assert check_two_of_four(saved(tmp_path / "a.onnx", nodes, coarse))[0].valid
    fine = {**coarse, "s": np.float32(0.001)}
    assert check_two_of_four(saved(tmp_path / "b.onnx", nodes, fine))[0].share == 0.0
    # uint8 codes without a zero point cannot hold what is negative: that becomes zero.
    negative = {"w": -weight, "s": np.float32(0.001), "z": np.uint8(0)}
    assert check_two_of_four(saved(tmp_path / "c.onnx", nodes, negative))[0].valid


def test_fp8_weights(rng, tmp_path):
    codes = two_of_four(rng, (16, 8), axis=0).astype(ml_dtypes.float8_e4m3fn)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    given = {"w": codes, "s": np.float32(0.5)}
    (layer,) = check_two_of_four(saved(tmp_path / "f.onnx", nodes, given))
    assert layer.valid
    assert layer.storage == "float8e4m3fn"


@pytest.mark.parametrize(
    ("operator", "axis", "attributes", "inputs"),
    [
        ("MatMul", 0, {}, ["x", "w"]),
        ("MatMul", 1, {}, ["w", "x"]),
        ("Gemm", 0, {}, ["x", "w"]),
        ("Gemm", 1, {"transB": 1}, ["x", "w"]),
        ("Gemm", 1, {}, ["w", "x"]),
        ("Gemm", 0, {"transA": 1}, ["w", "x"]),
    ],
)
def test_products_are_checked_along_what_they_sum_over(
    rng, tmp_path, operator, axis, attributes, inputs
):
    weight = two_of_four(rng, (32, 32), axis=axis)
    for name, array, wanted in (("right", weight, True), ("wrong", weight.T.copy(), False)):
        nodes = [helper.make_node(operator, inputs, ["y"], **attributes)]
        (layer,) = check_two_of_four(saved(tmp_path / f"{name}.onnx", nodes, {"w": array}))
        assert layer.valid is wanted


def test_a_transposed_and_cast_weight_is_followed(rng, tmp_path):
    weight = two_of_four(rng, (24, 32), axis=1)
    nodes = [
        helper.make_node("Cast", ["w"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["h"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    (layer,) = check_two_of_four(saved(tmp_path / "t.onnx", nodes, {"w": weight}))
    assert layer.valid
    assert (layer.outputs, layer.inputs) == (24, 32)


def test_batched_products_are_checked_matrix_by_matrix(rng, tmp_path):
    weight = two_of_four(rng, (3, 16, 5), axis=1)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    (layer,) = check_two_of_four(saved(tmp_path / "b.onnx", nodes, {"w": weight}))
    assert layer.valid
    assert layer.groups == 3 * 5 * 4


def test_grouped_and_depthwise_convolutions(rng, tmp_path):
    grouped = two_of_four(rng, (16, 8, 3, 3), axis=1)
    (layer,) = check_two_of_four(convolution(tmp_path / "g.onnx", grouped, group=4))
    assert layer.valid
    assert (layer.outputs, layer.inputs) == (16, 8)
    assert any("grouped convolution (4 groups)" in reason for reason in layer.obstacles)
    depthwise = np.zeros((16, 1, 3, 3), np.float32)
    (layer,) = check_two_of_four(convolution(tmp_path / "d.onnx", depthwise, group=16))
    assert not layer.valid
    assert layer.groups == 0
    assert "1 inputs do not divide into groups of 4" in layer.obstacles[0]


def test_transposed_convolutions_sum_over_their_first_axis(rng, tmp_path):
    weight = two_of_four(rng, (16, 6, 3, 3), axis=0)
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["y"])]
    (layer,) = check_two_of_four(saved(tmp_path / "t.onnx", nodes, {"w": weight}))
    assert layer.valid
    assert (layer.outputs, layer.inputs) == (6, 16)
    assert not layer.eligible


def wide(rng, tmp_path, *, dtype=np.float16, inputs=512, outputs=256):
    weight = two_of_four(rng, (outputs, inputs, 1, 1), axis=1).astype(dtype)
    return convolution(tmp_path / "w.onnx", weight)


def test_a_wide_half_precision_layer_is_eligible(rng, tmp_path):
    (layer,) = check_two_of_four(wide(rng, tmp_path), capability=(9, 0))
    assert layer.valid
    assert layer.eligible
    assert layer.obstacles == ()
    assert "1 of 1 layers are 2:4" in summary([layer])


@pytest.mark.parametrize(
    ("options", "capability", "reason"),
    [
        ({}, (7, 5), "compute capability 7.5"),
        ({"dtype": np.float32}, (8, 6), "float32 weights have none"),
        ({"inputs": 264}, (8, 6), "264 inputs are no multiple of 16"),
        ({"outputs": 64}, None, "512 inputs, 64 outputs: too small to gain (about 256"),
    ],
)
def test_what_speaks_against_a_sparse_kernel(rng, tmp_path, options, capability, reason):
    (layer,) = check_two_of_four(wide(rng, tmp_path, **options), capability=capability)
    assert layer.valid
    assert len(layer.obstacles) == 1
    assert reason in layer.obstacles[0]


@pytest.mark.parametrize(
    ("quantized_input", "quantized_output", "reason"),
    [(True, True, None), (True, False, "output stays float"), (False, True, "input is float")],
)
def test_int8_layers_want_int8_on_both_sides(
    rng, tmp_path, quantized_input, quantized_output, reason
):
    codes = (two_of_four(rng, (256, 256, 1, 1), axis=1) * 100).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "a", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "a", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0),
        helper.make_node("Conv", ["xd" if quantized_input else "x", "d"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
    ]
    last = ["QuantizeLinear", ["r", "a", "z"]] if quantized_output else ["Exp", ["r"]]
    nodes.append(helper.make_node(*last, ["y"]))
    constants = {
        "w": codes, "s": np.full(256, 0.01, np.float32), "a": np.float32(0.1), "z": np.int8(0),
    }  # fmt: skip
    (layer,) = check_two_of_four(saved(tmp_path / "i.onnx", nodes, constants))
    assert layer.valid
    assert layer.eligible == (reason is None)
    assert all(reason in found for found in layer.obstacles)


def test_layers_without_constant_weights_are_left_out(rng, tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "x"], ["y"]),
    ]
    (layer,) = check_two_of_four(
        saved(tmp_path / "a.onnx", nodes, {"w": two_of_four(rng, (8, 8), axis=0)})
    )
    assert layer.name == "h"


def test_a_weight_computed_by_another_operator_is_named(rng, tmp_path):
    nodes = [
        helper.make_node("Mul", ["w", "s"], ["p"]),
        helper.make_node("Conv", ["x", "p"], ["y"]),
    ]
    given = {"w": two_of_four(rng, (8, 8, 1, 1), axis=1), "s": np.float32(2)}
    (layer,) = check_two_of_four(saved(tmp_path / "m.onnx", nodes, given))
    assert not layer.valid
    assert "computed by Mul" in layer.obstacles[0]


@pytest.mark.parametrize("scheme", ["2:4", "2:4+w8a8", "w8a8"])
def test_our_own_exports_pass_where_they_are_pruned(tmp_path, residual, scheme):
    model = compress(
        residual, scheme=scheme, fallback="dense", method="magnitude" if "2:4" in scheme else "rtn",
        baselines=False,
    )  # fmt: skip
    layers = check_two_of_four(model.export(tmp_path, check=False).path)
    assert [layer.inputs for layer in layers] == [3, 16, 16, 16]
    assert [layer.valid for layer in layers] == [False, *["2:4" in scheme] * 3]


def test_files_that_cannot_be_checked(rng, tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        check_two_of_four(tmp_path / "nothing.onnx")
    path = wide(rng, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="is no ONNX file"):
        check_two_of_four(path)
    saved(path, [helper.make_node("Relu", ["x"], ["y"])], {})
    with pytest.raises(ArtifactError, match="no Conv, Gemm or MatMul with a constant weight"):
        check_two_of_four(path)
    proto = onnx.load(wide(rng, tmp_path))
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-3]
    onnx.save(proto, path)
    with pytest.raises(ArtifactError, match=r"the weight 'w' of 'y' in .* is damaged"):
        check_two_of_four(path)
    onnx.save(
        onnx.load(wide(rng, tmp_path)), path, save_as_external_data=True, location="w.data",
        size_threshold=0,
    )  # fmt: skip
    (tmp_path / "w.data").unlink()
    with pytest.raises(ArtifactError, match="external data"):
        check_two_of_four(path)
