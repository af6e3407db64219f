"""SparseConvolution and DepthwiseConvolution against ONNX Runtime's QLinearConv, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from blocked_cases import (
    CHANNELS,
    CODES,
    FRAMES,
    IMAGES,
    QUICK,
    SCALES,
    SEEDS,
    SETS,
    SMALL,
    THREADS,
    Frame,
    Image,
    from_blocks,
    scales,
    to_blocks,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from sparse_models import INT8, UINT8, Graph, block_sparse, blocks_of, instruction_sets

from obc_deploy.runtimes import sparse

NARROW = st.sampled_from([Frame(0), Frame(0), Frame(1), Frame(0, 2), Frame(0, 9), Frame(1, 1)])

pytestmark = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())


@dataclass(frozen=True)
class Windows:
    """A kernel's size, strides, and pads [top, left, bottom, right]."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]

    def fits(self, image: Image) -> bool:
        top, left, bottom, right = self.pads
        return (
            image.height + top + bottom >= self.kernel[0]
            and image.width + left + right >= self.kernel[1]
        )

    def attributes(self) -> dict[str, Any]:
        return {"strides": list(self.strides), "pads": list(self.pads)}


@st.composite
def windows(draw, border: int, *, equal_strides: bool):
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 2), (2, 2)]))
    stride = draw(st.sampled_from([1, 2]))
    other = stride if equal_strides else draw(st.sampled_from([1, 2]))
    pads = [draw(st.integers(0, border)) for _ in range(4)]
    return Windows(kernel, (stride, other), tuple(pads))


@dataclass(frozen=True)
class Quantized:
    """Everything about a quantized convolution but its weights and geometry."""

    input_scale: float
    input_zero_point: int
    output_scale: float
    output_zero_point: int
    one_weight_scale: bool
    with_bias: bool

    def attributes(self) -> dict[str, Any]:
        return {
            "input_scale": self.input_scale,
            "input_zero_point": self.input_zero_point,
            "output_scale": self.output_scale,
            "output_zero_point": self.output_zero_point,
        }

    def weight_scale(self, random: np.random.Generator, outputs: int) -> np.ndarray:
        count = 1 if self.one_weight_scale else outputs
        return random.uniform(1e-3, 1e-2, count).astype(np.float32)

    def bias(self, random: np.random.Generator, outputs: int) -> np.ndarray | None:
        return random.integers(-20000, 20000, outputs).astype(np.int32) if self.with_bias else None


QUANTIZED = st.builds(Quantized, SCALES, CODES, scales(0.02), CODES, st.booleans(), st.booleans())


def reference(
    graph: Graph, x: str, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None,
    how: Quantized, where: Windows, group: int = 1,
) -> str:  # fmt: skip
    """The same convolution as a QLinearConv."""
    scale = np.broadcast_to(scale, weight.shape[:1])
    inputs = [
        x,
        graph.constant(how.input_scale, np.float32),
        graph.constant(how.input_zero_point, np.uint8),
        graph.constant(weight),
        graph.constant(scale, np.float32),
        graph.constant(np.zeros(len(weight), np.int8)),
        graph.constant(how.output_scale, np.float32),
        graph.constant(how.output_zero_point, np.uint8),
    ]
    inputs += [] if bias is None else [graph.constant(bias)]
    return graph.add(
        "QLinearConv", inputs, kernel_shape=list(where.kernel), group=group, **where.attributes()
    )


def sparse_convolution(
    graph: Graph, x: str, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None,
    residual: str = "", **attributes: Any,
) -> str:  # fmt: skip
    inputs = [x, *(graph.constant(part) for part in blocks_of(weight)), graph.constant(scale)]
    inputs += ["" if bias is None else graph.constant(bias), residual]
    while not inputs[-1]:
        inputs.pop()
    attributes = {"kernel_shape": list(weight.shape[2:]), **attributes}
    return graph.sparse("SparseConvolution", inputs, channels=weight.shape[1], **attributes)


@QUICK
@given(
    st.data(), IMAGES, CHANNELS, FRAMES, FRAMES, QUANTIZED,
    st.sampled_from([0.0, 0.1, 0.5, 1.0]), SETS, THREADS,
)  # fmt: skip
def test_sparse_convolution_equals_qlinearconv(
    data, image, outputs, input_frame, frame, how, density, instructions, threads
):
    where = data.draw(windows(input_frame.border, equal_strides=True))
    assume(where.fits(image))
    check_convolution(
        where, image, outputs, (input_frame, frame), density, how, instructions, threads
    )


def check_convolution(where, image, outputs, frames, density, how, instructions, threads):
    """Against QLinearConv; frames of the input and the output."""
    input_frame, frame = frames
    random = image.random()
    weight = block_sparse(random, outputs, image.channels, *where.kernel, density)
    scale, bias = how.weight_scale(random, outputs), how.bias(random, outputs)
    graph = Graph()
    x, codes = graph.input("x", image.codes()), image.codes()
    expected = reference(graph, x, weight, scale, bias, how, where)
    blocked = graph.input("blocked", to_blocks(codes, input_frame, how.input_zero_point))
    found = sparse_convolution(
        graph, blocked, weight, scale, bias,
        **input_frame.attributes("input_"), **frame.attributes(), **how.attributes(),
        **where.attributes(),
    )  # fmt: skip
    feeds = {"x": codes, "blocked": to_blocks(codes, input_frame, how.input_zero_point)}
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run(feeds, {expected: UINT8, found: UINT8}, threads)
    np.testing.assert_array_equal(from_blocks(made, outputs, frame, how.output_zero_point), wanted)


TOGETHER = (0, 0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 7, 8, 9, 8, 9, 8, 9, 8, 10, 10, 11)
"""Output channels with the same number have the same blocks: fours, pairs, and some alone."""


@QUICK
@given(
    st.sampled_from([(1, 1), (2, 2), (4, 5), (7, 7), (8, 16), (14, 28), (30, 31)]),
    st.sampled_from([(1, 7), (1, 40), (1, 520), (3, 7), (3, 24), (3, 132)]),
    st.sampled_from([0.05, 0.3, 0.8, 1.0]), QUANTIZED, SEEDS, SETS,
)  # fmt: skip
def test_channels_that_share_their_blocks_equal_qlinearconv(
    size, kernel_and_channels, density, how, seed, instructions
):
    kernel, channels = kernel_and_channels
    image = Image(1, channels, *size, seed)
    border = kernel // 2
    where = Windows((kernel, kernel), (1, 1), (border,) * 4)
    random = image.random()
    weight = block_sparse(random, len(TOGETHER), channels, kernel, kernel, 1.0)
    kept = random.random((max(TOGETHER) + 1, -(-channels // 4), kernel, kernel)) < density
    # One block more for some: bands then hold zeros of channels that do not have it.
    kept = kept[list(TOGETHER)] | (random.random((len(TOGETHER), *kept.shape[1:])) < 0.02)
    weight *= np.repeat(kept, 4, axis=1)[:, :channels].astype(np.int8)
    scale, bias = how.weight_scale(random, len(weight)), how.bias(random, len(weight))
    graph = Graph()
    codes = image.codes()
    expected = reference(graph, graph.input("x", codes), weight, scale, bias, how, where)
    blocks = to_blocks(codes, Frame(border), how.input_zero_point)
    found = sparse_convolution(
        graph, graph.input("blocked", blocks), weight, scale, bias,
        input_border=border, border=1, **how.attributes(), **where.attributes(),
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run(
            {"x": codes, "blocked": blocks}, {expected: UINT8, found: UINT8}, 1
        )
    np.testing.assert_array_equal(
        from_blocks(made, len(weight), Frame(1), how.output_zero_point), wanted
    )


@QUICK
@given(
    st.data(), IMAGES, CHANNELS, FRAMES, FRAMES, QUANTIZED, SCALES, CODES, SCALES, CODES,
    st.tuples(CODES, CODES).map(sorted), SETS, THREADS,
)  # fmt: skip
def test_residual_and_bounds_equal_the_separate_operators(
    data, image, outputs, frame, residual_frame, how, residual_scale, residual_zero,
    scale, zero, bounds, instructions, threads,
):  # fmt: skip
    where = data.draw(windows(frame.border, equal_strides=True))
    assume(where.fits(image))
    check_residual(
        where, image, outputs, (frame, frame, residual_frame), how, residual_scale,
        residual_zero, scale, zero, bounds, instructions, threads,
    )  # fmt: skip


@QUICK
@given(
    st.builds(Image, st.integers(1, 3), CHANNELS, SMALL, SMALL, SEEDS), CHANNELS,
    st.tuples(st.sampled_from([Frame(1), Frame(2, 3)]), NARROW, NARROW), QUANTIZED, SETS,
)  # fmt: skip
def test_planes_smaller_than_a_vector_equal_the_separate_operators(
    image, outputs, frames, how, instructions
):
    check_residual(
        Windows((3, 3), (1, 1), (1, 1, 1, 1)), image, outputs, frames, how,
        0.02, 9, 0.03, 2, (2, 250), instructions, 1,
    )  # fmt: skip


@pytest.mark.parametrize("instructions", instruction_sets() or ["portable"])
@pytest.mark.parametrize(
    ("residual_scale", "scale"),
    [(0.05, 0.05), (0.1, 0.03), (0.25, 0.05), (0.35, 0.05), (0.45, 0.05), (3.0, 0.02), (0.02, 3.0)],
)
def test_sums_near_where_rounding_changes_equal_the_separate_operators(
    residual_scale, scale, instructions
):
    # Ratios that are small fractions put many sums halfway between two codes.
    how = Quantized(0.03, 3, 0.05, 128, one_weight_scale=True, with_bias=True)
    check_residual(
        Windows((1, 1), (1, 1), (0, 0, 0, 0)), Image(2, 16, 24, 24, 0), 32, (Frame(0),) * 3, how,
        residual_scale, 100, scale, 120, (0, 255), instructions, 1,
    )  # fmt: skip


@pytest.mark.parametrize("borders", [(1, 0, 1), (1, 1, 0), (1, 0, 0), (2, 1, 1)])
@pytest.mark.parametrize("size", [(8, 2), (4, 4), (2, 8), (2, 2), (16, 1)])
@pytest.mark.parametrize("instructions", instruction_sets() or ["portable"])
def test_neighbours_of_one_tensor_may_lie_apart_in_another(size, borders, instructions):
    # Where rows of two pixels follow each other without a border, four pixels lie side by side.
    how = Quantized(0.03, 3, 0.05, 7, one_weight_scale=True, with_bias=True)
    check_residual(
        Windows((3, 3), (1, 1), (1, 1, 1, 1)), Image(1, 12, *size, 0), 8,
        [Frame(border) for border in borders], how, 0.02, 9, 0.03, 2, (2, 250), instructions, 1,
    )  # fmt: skip


def check_with_and_without_residual(kernel, stride, image, outputs, density, instructions, threads):
    """A square kernel whose padding keeps the size, but for the stride."""
    how = Quantized(0.03, 3, 0.05, 7, one_weight_scale=False, with_bias=True)
    where = Windows((kernel, kernel), (stride, stride), (kernel // 2,) * 4)
    frames = (Frame(kernel // 2), Frame(1), Frame(0))
    check_convolution(where, image, outputs, frames[:2], density, how, instructions, threads)
    check_residual(
        where, image, outputs, frames, how, 0.02, 9, 0.03, 2, (2, 250), instructions, threads
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instructions", instruction_sets() or ["portable"])
@pytest.mark.parametrize(
    ("kernel", "size", "channels", "outputs"),
    [(1, 7, 600, 520), (1, 14, 700, 90), (1, 16, 512, 330), (3, 7, 256, 260), (3, 14, 160, 200)],
)
def test_few_tiles_are_shared_out_by_output_channels(
    kernel, size, channels, outputs, instructions, threads
):
    image = Image(1, channels, size, size, 0)
    check_with_and_without_residual(kernel, 1, image, outputs, 0.4, instructions, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instructions", instruction_sets() or ["portable"])
@pytest.mark.parametrize(
    ("kernel", "stride", "size", "outputs"),
    [(1, 1, 376, 16), (1, 2, 376, 68), (3, 1, 366, 16), (3, 2, 370, 68)],
)
def test_tensors_far_beyond_the_caches_equal_the_separate_operators(
    kernel, stride, size, outputs, instructions, threads
):
    """Their lines are asked for ahead of time; all of them are larger than 2 MiB."""
    image = Image(1, 16, size, size, 0)
    check_with_and_without_residual(kernel, stride, image, outputs, 0.2, instructions, threads)


@QUICK
@given(
    st.sampled_from([(4, 4), (4, 12), (8, 8), (28, 28), (16, 64), (32, 32), (7, 7), (14, 14)]),
    st.sampled_from([1, 2]), st.sampled_from([3, 4, 60, 130, 530]), CHANNELS, st.integers(1, 3),
    st.tuples(NARROW, NARROW, NARROW), QUANTIZED, SEEDS, SETS,
    THREADS, st.booleans(),
)  # fmt: skip
def test_1x1_convolutions_equal_the_separate_operators(
    size, stride, channels, outputs, images, frames, how, seed, instructions, threads,
    with_residual,
):  # fmt: skip
    # Tiles of whole vectors are read where they are, and an image's last one reaches back over its
    # neighbour; 49 pixels and 196 are cut into tiles whose last vector is half of one.
    where = Windows((1, 1), (stride, stride), (0, 0, 0, 0))
    image = Image(images, channels, *(stride * extent for extent in size), seed)
    if with_residual:
        check_residual(
            where, image, outputs, frames, how, 0.02, 9, 0.03, 2, (2, 250), instructions, threads
        )
    else:
        check_convolution(where, image, outputs, frames[:2], 0.3, how, instructions, threads)


def check_residual(
    where, image, outputs, frames, how, residual_scale, residual_zero, scale, zero, bounds,
    instructions, threads,
):  # fmt: skip
    """Against QLinearConv, Add and Clip; frames of the input, the output and the residual."""
    frame, out_frame, residual_frame = frames
    random = image.random()
    weight = block_sparse(random, outputs, image.channels, *where.kernel, 0.4)
    weight_scale, bias = how.weight_scale(random, outputs), how.bias(random, outputs)
    codes = image.codes()
    graph = Graph()
    graph.input("x", codes)
    convolved = reference(graph, "x", weight, weight_scale, bias, how, where)
    (shape,) = (each.shape for each in graph.run({"x": codes}, {convolved: UINT8}))
    other = random.integers(0, 256, shape).astype(np.uint8)
    graph.input("other", other)
    terms = []
    for name, (s, z) in {
        convolved: (how.output_scale, how.output_zero_point),
        "other": (residual_scale, residual_zero),
    }.items():
        grid = [graph.constant(s, np.float32), graph.constant(z, np.uint8)]
        terms.append(graph.add("DequantizeLinear", [name, *grid]))
    total = graph.add("Add", terms)
    grid = [graph.constant(scale, np.float32), graph.constant(zero, np.uint8)]
    rounded = graph.add("QuantizeLinear", [total, *grid])
    limits = [graph.constant(bound, np.uint8) for bound in bounds]
    expected = graph.add("Clip", [rounded, *limits])
    feeds = {
        "x": codes,
        "other": other,
        "blocked": to_blocks(codes, frame, how.input_zero_point),
        "residual": to_blocks(other, residual_frame, residual_zero),
    }
    graph.input("blocked", feeds["blocked"])
    graph.input("residual", feeds["residual"])
    found = sparse_convolution(
        graph, "blocked", weight, weight_scale, bias, "residual", **where.attributes(),
        **frame.attributes("input_"), **out_frame.attributes(),
        **residual_frame.attributes("residual_"),
        input_scale=how.input_scale, input_zero_point=how.input_zero_point,
        convolution_scale=how.output_scale, convolution_zero_point=how.output_zero_point,
        residual_scale=residual_scale, residual_zero_point=residual_zero,
        output_scale=scale, output_zero_point=zero, lower=bounds[0], upper=bounds[1],
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run(feeds, {expected: UINT8, found: UINT8}, threads, optimize=False)
    np.testing.assert_array_equal(from_blocks(made, outputs, out_frame, zero), wanted)


@QUICK
@given(st.data(), IMAGES, FRAMES, FRAMES, QUANTIZED, SETS, THREADS)
def test_depthwise_convolution_equals_qlinearconv(
    data, image, input_frame, frame, how, instructions, threads
):
    where = data.draw(windows(input_frame.border, equal_strides=False))
    assume(where.fits(image))
    random, channels = image.random(), image.channels
    weight = block_sparse(random, channels, 1, *where.kernel, 1.0)
    scale, bias = how.weight_scale(random, channels), how.bias(random, channels)
    codes = image.codes()
    graph = Graph()
    graph.input("x", codes)
    expected = reference(graph, "x", weight, scale, bias, how, where, group=channels)
    feeds = {"x": codes, "blocked": to_blocks(codes, input_frame, how.input_zero_point)}
    graph.input("blocked", feeds["blocked"])
    inputs = ["blocked", graph.constant(weight), graph.constant(scale)]
    inputs += [] if bias is None else [graph.constant(bias)]
    found = graph.sparse(
        "DepthwiseConvolution", inputs, channels=channels, **input_frame.attributes("input_"),
        **frame.attributes(), **how.attributes(), **where.attributes(),
    )  # fmt: skip
    with sparse.use_instruction_set(instructions):
        wanted, made = graph.run(feeds, {expected: UINT8, found: UINT8}, threads)
    np.testing.assert_array_equal(from_blocks(made, channels, frame, how.output_zero_point), wanted)


@pytest.mark.parametrize("instructions", sparse.INSTRUCTION_SETS)
def test_largest_weights_and_codes_do_not_saturate(instructions):
    # Pairs of 255 * 127 exceed 16 bits, where some instruction sets add up.
    weight = np.full((4, 64, 1, 1), 127, np.int8)
    weight[1] = weight[3] = -128
    codes = np.full((1, 64, 5, 5), 255, np.uint8)
    graph = Graph()
    graph.input("blocked", to_blocks(codes, Frame(0), 0))
    scale = np.float32([1, 1, 2**-15, 2**-15])
    found = sparse_convolution(
        graph, "blocked", weight, scale, None, input_scale=1.0, input_zero_point=0,
        output_scale=8192.0, output_zero_point=128,
    )  # fmt: skip
    try:
        with sparse.use_instruction_set(instructions):
            (made,) = graph.run({"blocked": to_blocks(codes, Frame(0), 0)}, {found: UINT8})
    except ValueError:
        pytest.skip(f"no {instructions} here")
    sums = np.array([255 * 127 * 64, -255 * 128 * 64, 255 * 127 * 64, -255 * 128 * 64])
    wanted = np.clip(np.rint(sums * scale / 8192) + 128, 0, 255)
    np.testing.assert_array_equal(from_blocks(made, 4, Frame(0), 128)[0, :, 2, 3], wanted)


def test_shapes_may_change_from_run_to_run_and_are_inferred():
    random = np.random.default_rng(0)
    weight = block_sparse(random, 8, 8, 3, 3, 0.5)
    scale = np.full(8, 0.01, np.float32)
    graph = Graph()
    codes = random.integers(0, 256, (1, 8, 6, 5)).astype(np.uint8)
    graph.input("x", codes, ["N", 8, 6, 5])
    how = Quantized(0.02, 3, 0.1, 128, True, False)
    where = Windows((3, 3), (1, 1), (1, 1, 1, 1))
    expected = reference(graph, "x", weight, scale, None, how, where)
    blocked = graph.sparse("ToBlocks", ["x"], border=1, zero_point=3)
    convolved = sparse_convolution(
        graph, blocked, weight, scale, None, input_border=1, **how.attributes(),
        **where.attributes(),
    )  # fmt: skip
    plain = graph.sparse("FromBlocks", [convolved], channels=8)
    session = graph.session({expected: UINT8, plain: UINT8})
    assert [out.shape[1:] for out in session.get_outputs()] == [[8, 6, 5], [8, 6, 5]]
    for images in (1, 4, 2, 1, 5, 3, 6, 4):
        codes = random.integers(0, 256, (images, 8, 6, 5)).astype(np.uint8)
        wanted, made = session.run(None, {"x": codes})
        np.testing.assert_array_equal(made, wanted)


def test_weights_are_int8_in_the_file():
    values, mask = blocks_of(np.ones((2, 5, 1, 1), np.int8))
    assert (values.dtype, mask.dtype, mask.tolist()) == (np.int8, np.uint8, [[3], [3]])
    assert values.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]] * 2
    graph = Graph()
    assert graph.constants == []
    graph.constant(values)
    assert graph.constants[0].data_type == INT8
