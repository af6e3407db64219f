"""The packed form of a compressed layer: mask as bits, survivors only, codes in their bit width.

    mask         1 bit a weight; 1 bit a block where whole blocks of four live or die; none if dense
    weight       float32 of survivors, where there is no grid
    codes        `bits` bits of each survivor's code - code_min, where there is one
    scale        float32 of each grid
    zero_point   int8 of each grid, unless all are 0

Bits run from the most significant down and fill whole bytes at the end. What was pruned has weight
0 and its grid's zero point for a code, so nothing of it need be kept; packing checks that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch

from obc_deploy.errors import DatabaseError
from obc_deploy.schemes import BLOCK_SIZE, NM, Block4, Pattern, Scheme
from obc_deploy.solvers.contract import CompressedLayer
from obc_deploy.solvers.exact_obs import zeros_of

Packed: TypeAlias = dict[str, np.ndarray]
"""The arrays of a packed form by name."""

_CODES_AT_A_TIME = 1 << 20
"""Codes that are spread into bits at a time; a multiple of eight, so that chunks end on bytes."""


def stored_scheme(scheme: Scheme) -> Scheme:
    """The scheme less its activations: levels that differ there alone share one packed form."""
    if scheme.quantization is None:
        return scheme
    return replace(scheme, quantization=replace(scheme.quantization, activation_bits=None))


def pack(form: CompressedLayer[torch.Tensor]) -> Packed:
    """The packed arrays of a compressed layer; `unpack` gives back the same bits.

    Raises:
        DatabaseError: the layer is not what its contract says, so that something would be lost.
    """
    weight = form.weight.detach().cpu().numpy()
    mask = form.mask.cpu().numpy()
    packed = _pack_mask(mask)
    quantization = form.scheme.quantization
    if quantization is None:
        packed["weight"] = weight[mask]
    else:
        if form.codes is None or form.scale is None or form.zero_point is None:
            raise DatabaseError(f"a layer with scheme '{form.scheme}' has no codes to pack")
        codes = form.codes.cpu().numpy()[mask].astype(np.int16) - quantization.code_min
        packed["codes"] = pack_codes(codes, quantization.weight_bits)
        packed["scale"] = form.scale.cpu().numpy()
        zero_point = form.zero_point.cpu().numpy()
        if zero_point.any():
            packed["zero_point"] = zero_point
    rows, cols = weight.shape
    again = unpack(packed, form.scheme, rows, cols, error=form.error, method=form.method)
    if not _same(form, again):
        raise DatabaseError(
            f"a layer with scheme '{form.scheme}' by '{form.method}' cannot be packed: its pruned "
            "weights are not zero, or its weights are not those of its codes"
        )
    return packed


def unpack(
    packed: Mapping[str, np.ndarray],
    scheme: Scheme,
    rows: int,
    cols: int,
    *,
    error: float,
    method: str,
) -> CompressedLayer[torch.Tensor]:
    """The compressed layer of packed arrays, on the CPU.

    Args:
        packed: what `pack` made.
        scheme: the layer's scheme.
        rows: rows of the weight.
        cols: columns of the weight.
        error: relative squared output error.
        method: the solver.
    """
    mask = _unpack_mask(packed, rows, cols)
    weight = np.zeros((rows, cols), dtype=np.float32)
    quantization = scheme.quantization
    codes = scale = zero_point = None
    if quantization is None:
        weight[mask] = packed["weight"]
    else:
        scale = packed["scale"]
        zero_point = packed.get("zero_point", np.zeros(scale.shape, dtype=np.int8))
        width = cols // scale.shape[1]
        codes = np.repeat(zero_point, width, axis=1)
        offsets = unpack_codes(packed["codes"], quantization.weight_bits, int(mask.sum()))
        codes[mask] = offsets.astype(np.int16) + quantization.code_min
        steps = codes.astype(np.float32).reshape(rows, -1, width) - zero_point[:, :, None]
        weight = (steps * scale[:, :, None]).reshape(rows, cols)
    return CompressedLayer(
        scheme=scheme,
        weight=torch.from_numpy(weight),
        mask=torch.from_numpy(mask),
        codes=None if codes is None else torch.from_numpy(codes),
        scale=None if scale is None else torch.from_numpy(scale.copy()),
        zero_point=None if zero_point is None else torch.from_numpy(zero_point.copy()),
        error=error,
        method=method,
    )


def packed_bytes(scheme: Scheme, rows: int, cols: int) -> int:
    """Bytes of a scheme's packed arrays on a (rows, cols) layer, before there are any."""
    total = rows * cols
    kept = total - _zeros(scheme.pattern, rows, cols)
    size = 0
    if scheme.pattern is not None:
        width = BLOCK_SIZE if isinstance(scheme.pattern, Block4) else 1
        size += _whole_bytes(total // width)
    quantization = scheme.quantization
    if quantization is None:
        return size + 4 * kept
    grids = rows * (cols // (quantization.group or cols))
    zero_points = grids if quantization.asymmetric else 0
    return size + _whole_bytes(kept * quantization.weight_bits) + 4 * grids + zero_points


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Non-negative integers below 2^bits as a string of bits, uint8.

    Raises:
        DatabaseError: one of them takes more bits.
    """
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise DatabaseError(
            f"codes from {codes.min()} to {codes.max()} above the least do not fit {bits} bits"
        )
    small = codes.astype(np.uint8)
    if bits == 8:
        return small
    parts = [
        np.packbits(np.unpackbits(small[i : i + _CODES_AT_A_TIME, None], axis=1)[:, 8 - bits :])
        for i in range(0, small.size, _CODES_AT_A_TIME)
    ]
    return np.concatenate(parts) if parts else small


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` integers, uint8, of what `pack_codes` made."""
    if bits == 8:
        return packed
    codes = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _CODES_AT_A_TIME):
        end = min(start + _CODES_AT_A_TIME, count)
        chunk = packed[start * bits // 8 : _whole_bytes(end * bits)]
        spread = np.unpackbits(chunk, count=(end - start) * bits).reshape(-1, bits)
        # Each code fills the high bits of a byte of its own.
        codes[start:end] = np.packbits(spread, axis=1)[:, 0] >> (8 - bits)
    return codes


def _pack_mask(mask: np.ndarray) -> Packed:
    if mask.all():
        return {}
    if mask.shape[1] % BLOCK_SIZE == 0:
        blocks = mask.reshape(-1, BLOCK_SIZE)
        if (blocks == blocks[:, :1]).all():
            return {"block_mask": np.packbits(blocks[:, 0])}
    return {"mask": np.packbits(mask)}


def _unpack_mask(packed: Mapping[str, np.ndarray], rows: int, cols: int) -> np.ndarray:
    if "mask" in packed:
        bits = np.unpackbits(packed["mask"], count=rows * cols)
    elif "block_mask" in packed:
        blocks = np.unpackbits(packed["block_mask"], count=rows * cols // BLOCK_SIZE)
        bits = np.repeat(blocks, BLOCK_SIZE)
    else:
        bits = np.ones(rows * cols, dtype=np.uint8)
    return bits.astype(np.bool_).reshape(rows, cols)


def _same(one: CompressedLayer[torch.Tensor], other: CompressedLayer[torch.Tensor]) -> bool:
    """Whether two layers have the same bits; NaN is itself here, and -0 is not 0."""
    pairs = (
        (one.weight.detach(), other.weight),
        (one.mask, other.mask),
        (one.codes, other.codes),
        (one.scale, other.scale),
        (one.zero_point, other.zero_point),
    )
    return all(_same_bits(a, b) for a, b in pairs)


def _same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (each.cpu().contiguous().view(torch.uint8) for each in (one, other))
    return torch.equal(left, right)


def _zeros(pattern: Pattern | None, rows: int, cols: int) -> int:
    if pattern is None:
        return 0
    if isinstance(pattern, NM):
        return rows * cols // pattern.m * (pattern.m - pattern.n)
    width = BLOCK_SIZE * pattern.together if isinstance(pattern, Block4) else 1
    return width * zeros_of(rows * cols // width, pattern.sparsity)


def _whole_bytes(bits: int) -> int:
    return math.ceil(bits / 8)
