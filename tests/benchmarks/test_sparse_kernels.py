"""The benchmark of our convolutions: what it measures, on shapes that take no time."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest

from obc_deploy.benchmarks import sparse_kernels
from obc_deploy.benchmarks.operator_copies import MOST_COPIES, Copies, copies_for
from obc_deploy.benchmarks.sparse_kernels import (
    ZEROS,
    Row,
    Shape,
    Turns,
    details,
    geometric_mean,
    layer_of,
    shapes_of,
    summary,
    take_turns,
)
from obc_deploy.benchmarks.sparse_layer_costs import ZERO
from obc_deploy.errors import MeasurementError
from obc_deploy.runtimes import sparse

SMALL = Shape("small", 16, 8, 3, 1, 16)
needs_kernels = pytest.mark.skipif(
    not sparse.is_available(), reason=f"sparse kernels: {sparse.why_missing() or 'there'}"
)


def test_every_distinct_convolution_of_resnet50() -> None:
    """Blocks of 64, 128, 256 and 512 channels at 56, 28, 14 and 7 pixels, in numbers."""
    found = shapes_of("resnet50")
    assert len(found) == len(set(found)) == 22
    assert Counter(shape.kernel for shape in found) == {1: 15, 3: 7}
    assert {shape.size for shape in found} == {56, 28, 14, 7}
    assert Shape("resnet50", 512, 7, 3, 1, 512, rectified=True) in found
    assert all(shape.kernel == 1 for shape in shapes_of("mobilenet_v2", 64))


def test_a_relu_where_the_network_has_one_right_behind_the_convolution() -> None:
    """Not behind the last one of a bottleneck, to whose output the residual is added first."""
    resnet = shapes_of("resnet50", 64)
    assert all(shape.rectified for shape in resnet if shape.kernel == 3)
    last = [shape for shape in resnet if shape.outputs == 4 * shape.channels]
    assert len(last) == 4
    assert not any(shape.rectified for shape in last)
    mobile = shapes_of("mobilenet_v2", 64)
    assert {shape.rectified for shape in mobile if shape.outputs == 6 * shape.channels} == {True}
    assert {shape.rectified for shape in mobile if shape.outputs < shape.channels} == {False}
    assert all(shape.rectified for shape in shapes_of("vgg16", 32))
    assert str(resnet[0]) == "64x16x16 1x1 64 ReLU"


@pytest.mark.parametrize("zeros", ZEROS)
def test_weights_have_their_share_of_zero_blocks(zeros: float) -> None:
    layer = layer_of(Shape("small", 64, 8, 3, 1, 64), zeros)
    blocks = layer.codes.reshape(64, 16, 4, 3, 3).any(axis=2)
    assert 1.0 - blocks.mean() == pytest.approx(zeros, abs=0.02)
    assert layer.block_pixels == blocks.sum() * 64


def test_channels_may_have_the_same_blocks() -> None:
    codes = layer_of(Shape("small", 16, 8, 3, 1, 10), 0.6, together=4).codes
    kept = codes.reshape(10, 4, 4, 9).any(axis=2).reshape(10, -1)
    for first in (0, 4, 8):
        assert (kept[first : first + 4] == kept[first]).all()
    assert (kept[0] != kept[4]).any()
    assert (codes[0] != codes[1]).any()


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [SMALL, Shape("small", 10, 9, 1, 2, 12), Shape("small", 12, 7, 1, 1, 10, rectified=True)],
)
def test_a_row_for_each_sparsity(shape: Shape, threads: int) -> None:
    taken = Turns()
    for _ in range(2):
        take_turns(shape, 2, threads, taken, turns=1, inferences=9, deepsparse=False)
    assert [len(turns) for turns in taken.ours.values()] == [2] * len(ZEROS)
    rows = taken.rows(shape, 2, threads)
    assert [row.zeros for row in rows] == list(ZEROS)
    for row in rows:
        assert row.dense_us > 0.0
        assert row.sparse_us > 0.0
        assert row.deepsparse_us is None
        vnni = "vnni" in sparse.instruction_set()
        assert (row.share_of_limit is not None) == vnni
        assert row.share_of_limit is None or 0.0 < row.share_of_limit < 1.0
    assert summary(rows).count("\n") == len(ZEROS) + 1
    assert details(rows).count("\n") == 2


@needs_kernels
def test_wrong_codes_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    one_more = sparse_kernels.Layer.blocked

    def wrong(self: sparse_kernels.Layer, batch: int, copies: int) -> bytes:
        other = sparse_kernels.Layer(self.shape, self.codes, self.bias + 3000)
        return one_more(other, batch, copies)

    monkeypatch.setattr(sparse_kernels.Layer, "blocked", wrong)
    with pytest.raises(MeasurementError, match="our codes are not ONNX Runtime's"):
        take_turns(SMALL, 1, 1, Turns(), turns=1, inferences=2, deepsparse=False)


def computed(content: bytes, x: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@needs_kernels
def test_every_copy_is_computed() -> None:
    """With a bias that is its own: ONNX Runtime does not merge them."""
    layer = layer_of(Shape("small", 16, 8, 1, 1, 16), 0.5)
    x = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 16), dtype=np.uint8)
    found = computed(layer.plain(1, 3), x)
    assert len(found) == 3
    assert (found[2] >= found[0]).all()
    assert (found[2] != found[0]).any()
    copies = Copies(partial(layer.plain, 1), 2, 1, x)
    np.testing.assert_array_equal(copies.output, found[0])
    assert copies.microseconds(9) > 0.0


def test_a_relu_leaves_no_negative_values() -> None:
    x = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 16), dtype=np.uint8)
    plain, rectified = (
        computed(layer_of(Shape("small", 16, 8, 1, 1, 16, relu), 0.5).plain(1, 1), x)[0].astype(int)
        for relu in (False, True)
    )
    inside = plain < 255
    np.testing.assert_array_equal(rectified[inside], np.maximum(plain - ZERO, 0)[inside])


@needs_kernels
def test_a_time_that_noise_hides_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(Shape("small", 16, 8, 1, 1, 16), 0.5)
    copies = Copies(partial(layer.plain, 1), 2, 1, np.zeros((1, 8, 8, 16), np.uint8))
    monkeypatch.setattr(copies, "_several", copies._one)
    monkeypatch.setattr(copies._one, "seconds", lambda inferences: 1.0)
    with pytest.raises(MeasurementError, match="3 copies took no longer than one"):
        copies.microseconds(3)


def test_small_operators_have_more_copies() -> None:
    assert copies_for(1e10) == 2
    assert copies_for(51e6) == 4
    assert copies_for(1.0) == MOST_COPIES


def test_means_are_over_shapes_and_geometric() -> None:
    rows = [
        Row(
            "net", f"shape {n}", 1, 1, zeros, 100.0, 100.0 / s, s, 0.2 * n,
            speedups=(s / 2, s, 4 * s),
        )
        for zeros, speedups in ((0.5, (1.0, 4.0)), (0.9, (2.0, 8.0)))
        for n, s in enumerate(speedups, 1)
    ]  # fmt: skip
    lines = summary(rows).splitlines()
    assert "| 50 % | 2.00x | 1.00x to 8.00x | 1.00x | 4.00x | - | 28 % |" in lines[2]
    assert "| 90 % | 4.00x | 2.00x to 16.00x | 2.00x | 8.00x | - | 28 % |" in lines[3]
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isclose(geometric_mean(np.full(3, 5.0)), 5.0)


@needs_kernels
def test_products_alone_counts_what_it_multiplies() -> None:
    """Twice the rounds are twice the products; without VNNI there is no such limit."""
    one, two = sparse.products_alone(10), sparse.products_alone(20)
    assert two == 2 * one
    assert (one > 0) == ("vnni" in sparse.instruction_set())
    with sparse.use_instruction_set("portable"):
        assert sparse.products_alone(10) == 0
