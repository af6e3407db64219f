"""Add and Concat of blocked tensors against the operators of ONNX on dequantized codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from blocked_cases import (
    CHANNELS,
    CODES,
    FRAMES,
    IMAGES,
    QUICK,
    SCALES,
    SETS,
    THREADS,
    Frame,
    Image,
    from_blocks,
    to_blocks,
)
from hypothesis import given
from hypothesis import strategies as st
from sparse_models import MICROSOFT, UINT8, Graph

from obc_deploy.runtimes import sparse

pytestmark = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())

GRIDS = st.tuples(SCALES, CODES)
BOUNDS = st.tuples(CODES, CODES).map(sorted)


def lists(frames: Sequence[Frame]) -> dict[str, list[int]]:
    return {
        "input_borders": [frame.border for frame in frames],
        "input_margins": [frame.margin for frame in frames],
    }


def dequantized(graph: Graph, name: str, grid: tuple[float, int]) -> str:
    scale, zero_point = graph.constant(grid[0], np.float32), graph.constant(grid[1], np.uint8)
    return graph.add("DequantizeLinear", [name, scale, zero_point])


def quantized(graph: Graph, name: str, grid: tuple[float, int], bounds: list[int]) -> str:
    scale, zero_point = graph.constant(grid[0], np.float32), graph.constant(grid[1], np.uint8)
    rounded = graph.add("QuantizeLinear", [name, scale, zero_point])
    return graph.add("Clip", [rounded, *(graph.constant(bound, np.uint8) for bound in bounds)])


@QUICK
@given(
    IMAGES, st.tuples(FRAMES, FRAMES), FRAMES, st.tuples(GRIDS, GRIDS), GRIDS, BOUNDS, SETS,
    THREADS,
)  # fmt: skip
def test_add(image, input_frames, frame, grids, grid, bounds, instructions, threads):
    graph = Graph()
    feeds, terms, blocked = {}, [], []
    for i, (input_frame, input_grid) in enumerate(zip(input_frames, grids, strict=True)):
        feeds[f"x{i}"] = image.codes(i)
        feeds[f"b{i}"] = to_blocks(image.codes(i), input_frame, input_grid[1])
        terms.append(dequantized(graph, graph.input(f"x{i}", feeds[f"x{i}"]), input_grid))
        blocked.append(graph.input(f"b{i}", feeds[f"b{i}"]))
    expected = quantized(graph, graph.add("Add", terms), grid, bounds)
    found = graph.sparse(
        "Add", blocked, channels=image.channels, **lists(input_frames), **frame.attributes(),
        input_scales=[g[0] for g in grids], input_zero_points=[g[1] for g in grids],
        output_scale=grid[0], output_zero_point=grid[1], lower=bounds[0], upper=bounds[1],
    )  # fmt: skip
    joined = [
        graph.constant(part, kind)
        for each in (*grids, grid)
        for part, kind in zip(each, (np.float32, np.uint8), strict=True)
    ]
    fused = graph.add("QLinearAdd", ["x0", *joined[:2], "x1", *joined[2:]], MICROSOFT)
    with sparse.use_instruction_set(instructions):
        wanted, made, theirs = graph.run(
            feeds, {expected: UINT8, found: UINT8, fused: UINT8}, threads, optimize=False
        )
    made = from_blocks(made, image.channels, frame, grid[1])
    np.testing.assert_array_equal(made, wanted)
    # ONNX Runtime's fused addition multiplies by ratios of scales: one rounding step away at most.
    assert abs(made.astype(int) - np.clip(theirs, *bounds)).max() <= 1


@QUICK
@given(st.data(), IMAGES, FRAMES, GRIDS, BOUNDS, st.booleans(), SETS, THREADS)
def test_concat(data, image, frame, grid, bounds, one_grid, instructions, threads):
    graph = Graph()
    channels = data.draw(st.lists(CHANNELS, min_size=1, max_size=5))
    frames = [data.draw(FRAMES) for _ in channels]
    grids = [grid if one_grid else data.draw(GRIDS) for _ in channels]
    bounds = [0, 255] if one_grid else bounds
    feeds, parts, blocked = {}, [], []
    for i, count in enumerate(channels):
        part = Image(image.images, count, image.height, image.width, image.seed)
        feeds[f"x{i}"] = part.codes(i)
        feeds[f"b{i}"] = to_blocks(part.codes(i), frames[i], grids[i][1])
        parts.append(dequantized(graph, graph.input(f"x{i}", feeds[f"x{i}"]), grids[i]))
        blocked.append(graph.input(f"b{i}", feeds[f"b{i}"]))
    expected = quantized(graph, graph.add("Concat", parts, axis=1), grid, bounds)
    found = graph.sparse(
        "Concat", blocked, channels=channels, **lists(frames), **frame.attributes(),
        input_scales=[g[0] for g in grids], input_zero_points=[g[1] for g in grids],
        output_scale=grid[0], output_zero_point=grid[1], lower=bounds[0], upper=bounds[1],
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run(feeds, {expected: UINT8, found: UINT8}, threads, optimize=False)
    np.testing.assert_array_equal(from_blocks(made, sum(channels), frame, grid[1]), wanted)
