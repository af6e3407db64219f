"""Pools of blocked tensors against ONNX's MaxPool and ONNX Runtime's quantized average pools."""

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
    from_blocks,
    to_blocks,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from sparse_models import MICROSOFT, UINT8, Graph

from obc_deploy.runtimes import sparse

pytestmark = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())


@st.composite
def pools(draw):
    """kernel_shape, strides, pads."""
    kernel = [draw(st.integers(1, 5)) for _ in range(2)]
    strides = [draw(st.integers(1, 3)) for _ in range(2)]
    pads = [draw(st.integers(0, min(2, side - 1))) for side in kernel * 2]
    return {"kernel_shape": kernel, "strides": strides, "pads": pads}


HALVES = st.just({"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 0, 0]})
"""The one that has a loop of its own."""


def fits(image, pool) -> bool:
    height, width = pool["kernel_shape"]
    top, left, bottom, right = pool["pads"]
    return image.height + top + bottom >= height and image.width + left + right >= width


@QUICK
@given(IMAGES, st.one_of(HALVES, pools()), FRAMES, FRAMES, CODES, SETS, THREADS)
def test_max_pool(image, pool, input_frame, frame, zero_point, instructions, threads):
    assume(fits(image, pool))
    codes = image.codes()
    graph = Graph()
    feeds = {"x": codes, "blocked": to_blocks(codes, input_frame, zero_point)}
    for name, value in feeds.items():
        graph.input(name, value)
    expected = graph.add("MaxPool", ["x"], **pool)
    found = graph.sparse(
        "MaxPool", ["blocked"], channels=image.channels, zero_point=zero_point,
        **input_frame.attributes("input_"), **frame.attributes(), **pool,
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run(feeds, {expected: UINT8, found: UINT8}, threads)
    np.testing.assert_array_equal(from_blocks(made, image.channels, frame, zero_point), wanted)


def averages(codes, pool, count_include_pad):
    """Sums of codes over each window, and how many pixels of the image are in each."""
    top, left, bottom, right = pool["pads"]
    padded = np.pad(codes.astype(np.int64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    inside = np.pad(np.ones(codes.shape, np.int64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    down, across = pool["strides"]

    def windows(values):
        view = np.lib.stride_tricks.sliding_window_view(values, pool["kernel_shape"], (2, 3))
        return view[:, :, ::down, ::across].sum(axis=(4, 5))

    count = np.prod(pool["kernel_shape"]) if count_include_pad else windows(inside)
    return windows(padded), windows(inside), np.broadcast_to(count, windows(inside).shape)


@QUICK
@given(
    IMAGES, pools(), st.sampled_from([0, 1]), FRAMES, FRAMES, SCALES, CODES, SCALES, CODES,
    st.tuples(CODES, CODES).map(sorted), SETS, THREADS,
)  # fmt: skip
def test_average_pool(
    image, pool, count_include_pad, input_frame, frame, input_scale, input_zero,
    scale, zero, bounds, instructions, threads,
):  # fmt: skip
    assume(fits(image, pool))
    codes = image.codes()
    graph = Graph()
    feeds = {"x": codes, "blocked": to_blocks(codes, input_frame, input_zero)}
    for name, value in feeds.items():
        graph.input(name, value)
    grids = [(input_scale, np.float32), (input_zero, np.uint8), (scale, np.float32)]
    grids.append((zero, np.uint8))
    inputs = ["x", *(graph.constant(*each) for each in grids)]
    rounded = graph.add(
        "QLinearAveragePool", inputs, MICROSOFT, count_include_pad=count_include_pad, **pool
    )
    expected = graph.add("Clip", [rounded, *(graph.constant(bound, np.uint8) for bound in bounds)])
    found = graph.sparse(
        "AveragePool", ["blocked"], channels=image.channels, **input_frame.attributes("input_"),
        **frame.attributes(), count_include_pad=count_include_pad, input_scale=input_scale,
        input_zero_point=input_zero, output_scale=scale, output_zero_point=zero,
        lower=bounds[0], upper=bounds[1], **pool,
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        theirs, made = graph.run(feeds, {expected: UINT8, found: UINT8}, threads)
    made = from_blocks(made, image.channels, frame, zero)
    # Ours adds up integers: exactly what is specified.
    sums, pixels, count = averages(codes, pool, count_include_pad)
    multiplier = np.float32(input_scale) / (np.float32(scale) * count.astype(np.float32))
    exact = np.float32(sums - input_zero * pixels) * multiplier
    np.testing.assert_array_equal(made, np.clip(np.rint(exact) + zero, *bounds))
    # ONNX Runtime adds up floats: where it differs, the average lies between two codes.
    differs = made != theirs
    assert (abs(made.astype(int) - theirs)[differs] == 1).all()
    assert (
        abs(abs(exact - np.trunc(exact)) - 0.5)[differs] < 1e-4 * (1 + abs(exact[differs]))
    ).all()


@QUICK
@given(
    IMAGES, FRAMES, FRAMES, SCALES, CODES, SCALES, CODES, st.tuples(CODES, CODES).map(sorted),
    SETS, THREADS,
)  # fmt: skip
def test_global_average_pool(
    image, input_frame, frame, input_scale, input_zero, scale, zero, bounds, instructions,
    threads,
):  # fmt: skip
    # ONNX Runtime refuses larger ratios.
    assume(input_scale / scale < 256)
    codes = image.codes()
    graph = Graph()
    feeds = {"x": codes, "blocked": to_blocks(codes, input_frame, input_zero)}
    for name, value in feeds.items():
        graph.input(name, value)
    grids = [(input_scale, np.float32), (input_zero, np.uint8), (scale, np.float32)]
    grids.append((zero, np.uint8))
    inputs = ["x", *(graph.constant(*each) for each in grids)]
    rounded = graph.add("QLinearGlobalAveragePool", inputs, MICROSOFT, channels_last=0)
    expected = graph.add("Clip", [rounded, *(graph.constant(bound, np.uint8) for bound in bounds)])
    found = graph.sparse(
        "GlobalAveragePool", ["blocked"], channels=image.channels,
        **input_frame.attributes("input_"), **frame.attributes(), input_scale=input_scale,
        input_zero_point=input_zero, output_scale=scale, output_zero_point=zero,
        lower=bounds[0], upper=bounds[1],
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run(feeds, {expected: UINT8, found: UINT8}, threads)
    np.testing.assert_array_equal(from_blocks(made, image.channels, frame, zero), wanted)
