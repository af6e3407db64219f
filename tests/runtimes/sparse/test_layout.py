"""Into the blocked layout and out of it, against Quantize- and DequantizeLinear."""

from __future__ import annotations

import numpy as np
import pytest
from blocked_cases import (
    CODES,
    FRAMES,
    IMAGES,
    QUICK,
    SCALES,
    SETS,
    THREADS,
    Image,
    from_blocks,
    to_blocks,
)
from hypothesis import given
from hypothesis import strategies as st
from sparse_models import FLOAT, UINT8, Graph

from obc_deploy.runtimes import sparse

pytestmark = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())


@QUICK
@given(IMAGES, FRAMES, CODES, SETS, THREADS)
def test_codes_go_in_and_out_unchanged(image, frame, zero_point, instructions, threads):
    codes = image.codes()
    graph = Graph()
    graph.input("x", codes)
    blocked = graph.sparse("ToBlocks", ["x"], zero_point=zero_point, **frame.attributes())
    back = graph.sparse(
        "FromBlocks", [blocked], channels=image.channels, **frame.attributes("input_")
    )
    with sparse.use_instruction_set(instructions):
        made, plain = graph.run({"x": codes}, {blocked: UINT8, back: UINT8}, threads)
    kept = slice(0, made.shape[2] - frame.margin)
    wanted = to_blocks(codes, frame, zero_point)
    assert made.shape == wanted.shape
    np.testing.assert_array_equal(made[:, :, kept], wanted[:, :, kept])
    np.testing.assert_array_equal(plain, codes)


@QUICK
@given(
    st.one_of(IMAGES, st.builds(lambda w, s: Image(1, 5, 2, w, s), st.integers(250, 600), CODES)),
    FRAMES, SCALES, CODES, st.tuples(CODES, CODES).map(sorted), SETS, THREADS,
)  # fmt: skip
def test_floats_are_quantized_and_dequantized_as_onnx_says(
    image, frame, scale, zero_point, bounds, instructions, threads
):
    values = image.random().normal(0, 128 * scale, image.shape).astype(np.float32)
    values.flat[:2] = np.float32(2.5 * scale), np.float32(np.inf)  # a tie, and far off
    graph = Graph()
    graph.input("x", values)
    grid = [graph.constant(scale, np.float32), graph.constant(zero_point, np.uint8)]
    rounded = graph.add("QuantizeLinear", ["x", *grid])
    limits = [graph.constant(bound, np.uint8) for bound in bounds]
    codes = graph.add("Clip", [rounded, *limits])
    numbers = graph.add("DequantizeLinear", [codes, *grid])
    blocked = graph.sparse(
        "QuantizeToBlocks", ["x"], output_scale=scale, output_zero_point=zero_point,
        lower=bounds[0], upper=bounds[1], **frame.attributes(),
    )  # fmt: skip
    back = graph.sparse(
        "DequantizeFromBlocks", [blocked], channels=image.channels, input_scale=scale,
        input_zero_point=zero_point, **frame.attributes("input_"),
    )  # fmt: skip
    outputs = {codes: UINT8, numbers: FLOAT, blocked: UINT8, back: FLOAT}
    with sparse.use_instruction_set(instructions):
        wanted, reals, made, plain = graph.run({"x": values}, outputs, threads, optimize=False)
    found = from_blocks(made, image.channels, frame, zero_point)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(plain, reals)


@pytest.mark.parametrize("instructions", sparse.INSTRUCTION_SETS)
def test_what_is_not_a_number_becomes_the_lowest_code(instructions):
    values = np.full((1, 4, 5, 5), np.nan, np.float32)
    graph = Graph()
    graph.input("x", values)
    blocked = graph.sparse(
        "QuantizeToBlocks", ["x"], output_scale=1.0, output_zero_point=9, lower=3
    )
    try:
        with sparse.use_instruction_set(instructions):
            (made,) = graph.run({"x": values}, {blocked: UINT8})
    except ValueError:
        pytest.skip(f"no {instructions} here")
    assert (made == 3).all()


def test_no_images_make_no_images():
    graph = Graph()
    codes = np.zeros((0, 3, 4, 4), np.uint8)
    graph.input("x", codes, ["N", 3, 4, 4])
    blocked = graph.sparse("ToBlocks", ["x"], border=1, zero_point=0)
    pooled = graph.sparse(
        "MaxPool", [blocked], channels=3, input_border=1, zero_point=0, kernel_shape=[2, 2]
    )
    back = graph.sparse("FromBlocks", [pooled], channels=3)
    (made,) = graph.run({"x": codes}, {back: UINT8})
    assert made.shape == (0, 3, 3, 3)
