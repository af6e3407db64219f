"""Frames between a session and its worker: a JSON header and the raw bytes of named arrays.

A frame is

    magic b"OBC1" | header length, uint32 | payload length, uint64 | header | payload

in little-endian byte order. The header is a JSON object; its entry "arrays" lists name, dtype and
shape of each array, whose C-order bytes follow one another in the payload.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

import numpy as np

MAGIC = b"OBC1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 1 << 28

Header = Dict[str, Any]
Arrays = Dict[str, "np.ndarray[Any, Any]"]


class FramingError(ValueError):
    """Bytes that are no frame, or a value that no frame can carry."""


def _little_endian(name: str, array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    if array.dtype.kind not in "biufc":
        raise FramingError("array '%s' has dtype %s; only numbers travel" % (name, array.dtype))
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def encode_frame(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> Iterator[memoryview]:
    """The frame's bytes, piece by piece, without a copy of contiguous arrays.

    Raises:
        FramingError: a value that is not JSON, or an array that holds no numbers.
    """
    if "arrays" in header:
        raise FramingError("header entry 'arrays' is the frame's own; choose another name")
    contiguous = {name: _little_endian(name, np.asarray(array)) for name, array in arrays.items()}
    described = dict(header)
    described["arrays"] = [
        {"name": name, "dtype": array.dtype.str, "shape": list(array.shape)}
        for name, array in contiguous.items()
    ]
    try:
        text = json.dumps(described, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise FramingError("header cannot be written as JSON: %s" % error) from error
    size = sum(array.nbytes for array in contiguous.values())
    yield memoryview(PREFIX.pack(MAGIC, len(text), size) + text)
    for array in contiguous.values():
        if array.nbytes:
            yield array.reshape(-1).view(np.uint8).data


def _array_sizes(header: Header) -> List[Tuple[str, "np.dtype[Any]", Tuple[int, ...], int]]:
    sizes = []
    for described in header.pop("arrays"):
        dtype = np.dtype(described["dtype"])
        shape = tuple(int(size) for size in described["shape"])
        count = 1
        for size in shape:
            count *= size
        if dtype.kind not in "biufc" or any(size < 0 for size in shape):
            raise FramingError("array '%s' is described as %s" % (described["name"], described))
        sizes.append((str(described["name"]), dtype, shape, count * dtype.itemsize))
    return sizes


def decode_frame(read: Callable[[int], "bytes | bytearray"]) -> Tuple[Header, Arrays]:
    """Read one frame; `read(n)` returns exactly n bytes.

    Raises:
        FramingError: the bytes are no frame.
    """
    magic, header_size, payload_size = PREFIX.unpack(bytes(read(PREFIX.size)))
    if magic != MAGIC or header_size > MAX_HEADER_BYTES:
        raise FramingError("%r does not start a frame" % (magic,))
    try:
        header = json.loads(bytes(read(header_size)).decode("utf-8"))
        sizes = _array_sizes(header)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FramingError("a frame's header cannot be read: %s" % error) from error
    if sum(size for _, _, _, size in sizes) != payload_size:
        raise FramingError("a frame's payload of %d bytes does not fit its arrays" % payload_size)
    arrays = {}
    for name, dtype, shape, size in sizes:
        data = bytearray(read(size)) if size else bytearray()
        arrays[name] = np.frombuffer(data, dtype=dtype).reshape(shape)
    return header, arrays
