from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from obc_deploy.data import IMAGENET, Preprocessing
from obc_deploy.runtimes.worker.worker_framing import (
    PREFIX,
    FramingError,
    decode_frame,
    encode_frame,
)
from obc_deploy.runtimes.worker.worker_timing import postprocess, preprocess, take_samples

NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(sizes=(64, 128)),
)
ARRAYS = NUMBERS.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def exact(stream: io.BytesIO) -> Any:
    def read(size: int) -> bytes:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    return read


def frame(header: dict[str, Any], arrays: dict[str, Any]) -> bytes:
    return b"".join(bytes(piece) for piece in encode_frame(header, arrays))


@given(
    st.dictionaries(st.text().filter(lambda key: key != "arrays"), JSON, max_size=4),
    st.dictionaries(st.text(), ARRAYS, max_size=3),
)
def test_what_goes_in_comes_out(header: dict[str, Any], arrays: dict[str, Any]) -> None:
    stream = io.BytesIO(frame(header, arrays) + b"the next frame")
    found, taken = decode_frame(exact(stream))
    assert stream.read() == b"the next frame"
    assert found == header
    assert list(taken) == list(arrays)
    for name, array in arrays.items():
        assert taken[name].shape == array.shape
        assert taken[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(taken[name], array)
        assert taken[name].flags.writeable


@given(ARRAYS)
def test_strided_arrays_travel_by_value(array: Any) -> None:
    turned = array.T[..., ::-1] if array.ndim else array
    _, taken = decode_frame(exact(io.BytesIO(frame({}, {"turned": turned}))))
    np.testing.assert_array_equal(taken["turned"], turned)


@given(st.integers(0, 200))
def test_a_frame_cut_short_is_no_frame(cut: int) -> None:
    whole = frame({"request": "run"}, {"x": np.arange(20, dtype=np.float32)})
    with pytest.raises(EOFError):
        decode_frame(exact(io.BytesIO(whole[: min(cut, len(whole) - 1)])))


@given(st.binary(min_size=PREFIX.size, max_size=64).filter(lambda data: data[:4] != b"OBC1"))
def test_other_bytes_are_no_frame(data: bytes) -> None:
    with pytest.raises(FramingError, match="does not start a frame"):
        decode_frame(exact(io.BytesIO(data)))


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"arrays": [{"name": "x"}]}',
        b'{"arrays": [{"name": "x", "dtype": "O", "shape": []}]}',
        b'{"arrays": [{"name": "x", "dtype": "<f4", "shape": [-1]}]}',
        b'{"arrays": [{"name": "x", "dtype": "<f4", "shape": [3]}]}',
    ],
)
def test_a_header_that_describes_nothing_is_refused(text: bytes) -> None:
    data = PREFIX.pack(b"OBC1", len(text), 0) + text
    with pytest.raises(FramingError):
        decode_frame(exact(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("header", "arrays", "said"),
    [
        ({"arrays": []}, {}, "frame's own"),
        ({"value": float("nan")}, {}, "JSON"),
        ({"value": object()}, {}, "JSON"),
        ({}, {"x": np.array(["a"])}, "only numbers"),
        ({}, {"x": np.array([None])}, "only numbers"),
    ],
)
def test_what_cannot_travel_is_refused(
    header: dict[str, Any], arrays: dict[str, Any], said: str
) -> None:
    with pytest.raises(FramingError, match=said):
        frame(header, arrays)


def test_preprocessing_normalizes_each_channel() -> None:
    draw = np.random.default_rng(1)
    raw = draw.integers(0, 256, (2, 3, 4, 5)).astype(np.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    expected = raw.astype(np.float64) / 255
    for channel in range(3):
        expected[:, channel] = (expected[:, channel] - mean[channel]) / std[channel]
    how = Preprocessing(1 / 255, tuple(mean), tuple(std))
    found = preprocess(raw, how.as_dict())
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("how", [Preprocessing(), IMAGENET, Preprocessing(1.0)])
def test_a_worker_prepares_inputs_as_the_core_does(how: Preprocessing) -> None:
    raw = np.random.default_rng(1).integers(0, 256, (2, 3, 4, 5)).astype(np.uint8)
    before = raw.copy()
    np.testing.assert_array_equal(preprocess(raw, how.as_dict()), how.apply(raw))
    np.testing.assert_array_equal(raw, before)


def test_postprocessing_finds_the_largest_logit() -> None:
    logits = np.array([[1.0, 1000.0, 3.0], [-5.0, -1e4, -9.0]], dtype=np.float32)
    assert postprocess([logits]).tolist() == [1, 0]


def test_samples_are_taken_in_order_and_garbage_collection_comes_back() -> None:
    import gc

    calls = []
    feed = {"x": np.zeros(1, dtype=np.float32)}
    taken = take_samples(
        lambda feed: calls.append(gc.isenabled()) or [], feed, None, 2, 5, lambda done: None
    )
    assert taken.shape == (7,)
    assert (taken > 0).all()
    assert calls == [False] * 7
    assert gc.isenabled()
