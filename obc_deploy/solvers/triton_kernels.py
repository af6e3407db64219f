"""Triton kernels: one program takes a row's steps between two updates of its inverse.

A row's weights, diagonal and scores stay in registers. The stored inverse is read one row a step;
the update vectors go to memory, where the matrix product of the update wants them, and come back
from the first-level cache, which they fit for rows of up to a thousand columns or so.

Importing this module needs Triton. `triton_steps.py` launches what is here.
"""

from __future__ import annotations

import triton
import triton.language as tl

_COUNTS = ["rows", "size", "steps", "groups", "group", "zeros", "cols", "blocks"]
_COUNTS += ["code_min", "code_max", "gram_stride"]
_SLICES = ["order", "increase"]
_WIDTH = tl.constexpr(4)  # columns of a block
_MAGIC_32 = tl.constexpr(1.5 * 2.0**23)  # added and taken away, it rounds to even
_MAGIC_64 = tl.constexpr(1.5 * 2.0**52)


@triton.jit
def _present(
    stored,
    entry_stride,
    vectors,
    step_stride,
    p,
    pivot,
    kept,
    at,
    size,
    AHEAD: tl.constexpr,
):
    """G_p: and G_pp without what is kept aside.

    `stored` points at the stored row p, `pivot` is its entry p; `size` of the places `at` are real.
    """
    v = tl.load(stored + at * entry_stride, mask=at < size, other=0.0)
    for start in range(0, kept, AHEAD):
        for ahead in tl.static_range(AHEAD):
            k = start + ahead
            of_k = vectors + k * step_stride
            there = at < tl.where(k < kept, size, 0)
            share = tl.load(of_k + p, mask=k < kept, other=0.0)
            v -= share * tl.load(of_k + at, mask=there, other=0.0)
            pivot -= share * share
    return v, pivot


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_SLICES)
def prune_columns(
    stored,
    row_stride,
    column_stride,
    entry_stride,
    vectors,
    vector_row_stride,
    step_stride,
    weight,
    diagonal,
    closed,
    floor,
    column,
    given,
    order,
    increase,
    rows,
    size,
    steps,
    groups,
    group,
    zeros,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """argmin_p w_p² / G_pp, `steps` times; `order` gets columns. See `prune_columns.ColumnRun`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < size
    stored += row * row_stride
    vectors += row * vector_row_stride
    weight += row * size
    floor += row * size
    column += row * size
    closed += row * size + at
    w = tl.load(weight + at, mask=real, other=0.0)
    d = tl.load(diagonal + row * size + at, mask=real, other=1.0)
    c = tl.load(closed, mask=real, other=float("inf"))
    f = tl.load(floor + at, mask=real, other=1.0)
    if GROUPED:
        given += row * groups
        own = (tl.load(column + at, mask=real, other=0) // group).to(tl.int32)
    for step in range(steps):
        score, p = tl.min(w * w / d + c, axis=0, return_indices=True)
        p = tl.minimum(p, size - 1).to(tl.int64)  # numbers that are not numbers may pick anything
        picked = tl.load(column + p)
        tl.store(order + step * rows + row, picked)
        tl.store(increase + step * rows + row, score)

        from_p = stored + p * column_stride
        pivot = tl.load(from_p + p * entry_stride)
        v, pivot = _present(
            from_p, entry_stride, vectors, step_stride, p, pivot, step, at, size, AHEAD
        )
        root = tl.sqrt(tl.maximum(pivot, tl.load(floor + p)))
        v = v / root
        w -= v * (tl.load(weight + p) / root)
        d = tl.maximum(d - v * v, f)
        c = tl.where(at == p, float("inf"), c)
        if GROUPED:
            full = picked // group
            count = tl.load(given + full) + 1
            c = tl.where((own == full) & (count == zeros), float("inf"), c)
        # All of the program's threads have read what is written now, and read it only afterwards.
        tl.debug_barrier()
        if GROUPED:
            tl.store(given + full, count)
        tl.store(weight + at, w, mask=real)
        tl.store(vectors + step * step_stride + at, v, mask=real)
        tl.debug_barrier()
    tl.store(closed, c, mask=real)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_SLICES)
def quantize(
    stored,
    row_stride,
    column_stride,
    entry_stride,
    vectors,
    vector_row_stride,
    step_stride,
    weight,
    diagonal,
    closed,
    floor,
    column,
    scale,
    zero_point,
    codes,
    cols,
    size,
    steps,
    code_min,
    code_max,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """argmin_p (q(w_p) - w_p)² / G_pp or the worst outlier, `steps` times; `codes` (rows, cols)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < size
    stored += row * row_stride
    vectors += row * vector_row_stride
    weight += row * size
    floor += row * size
    column += row * size
    scale += row * size
    zero_point += row * size
    codes += row * cols
    closed += row * size + at
    w = tl.load(weight + at, mask=real, other=0.0)
    d = tl.load(diagonal + row * size + at, mask=real, other=1.0)
    c = tl.load(closed, mask=real, other=float("inf"))
    f = tl.load(floor + at, mask=real, other=1.0)
    s = tl.load(scale + at, mask=real, other=1.0)
    z = tl.load(zero_point + at, mask=real, other=0.0)
    for step in range(steps):
        miss = _rounded(w, s, code_min - z, code_max - z) * s - w
        p = tl.argmin(miss * miss / d + c, axis=0)
        error = tl.abs(miss) - c
        worst, outlier = tl.max(tl.where(error > 0.5 * s, error, 0.0), axis=0, return_indices=True)
        p = tl.where(worst > 0.0, outlier, p)
        p = tl.minimum(p, size - 1).to(tl.int64)  # numbers that are not numbers may pick anything
        w_p, s_p, z_p = tl.load(weight + p), tl.load(scale + p), tl.load(zero_point + p)
        q = _rounded(w_p, s_p, code_min - z_p, code_max - z_p)
        tl.store(codes + tl.load(column + p), q + z_p)

        from_p = stored + p * column_stride
        pivot = tl.load(from_p + p * entry_stride)
        v, pivot = _present(
            from_p, entry_stride, vectors, step_stride, p, pivot, step, at, size, AHEAD
        )
        root = tl.sqrt(tl.maximum(pivot, tl.load(floor + p)))
        v = v / root
        w += v * ((q * s_p - w_p) / root)
        d = tl.maximum(d - v * v, f)
        c = tl.where(at == p, float("inf"), c)
        # All of the program's threads have read what is written now, and read it only afterwards.
        tl.debug_barrier()
        tl.store(weight + at, w, mask=real)
        tl.store(vectors + step * step_stride + at, v, mask=real)
        tl.debug_barrier()
    tl.store(closed, c, mask=real)


@triton.jit
def _rounded(w, scale, low, high):
    """clamp(round(w / s), low, high) with whole bounds; ties go to even."""
    x = tl.minimum(tl.maximum(w / scale, low), high)
    magic: tl.constexpr = _MAGIC_64 if x.dtype == tl.float64 else _MAGIC_32
    return (x + magic) - magic


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_SLICES)
def prune_blocks(
    stored,
    row_stride,
    column_stride,
    entry_stride,
    vectors,
    vector_row_stride,
    step_stride,
    weight,
    gram,
    gram_stride,
    closed,
    floor,
    column,
    order,
    increase,
    rows,
    blocks,
    steps,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """argmin_B |L⁻¹ w_B|² with G_BB = L Lᵀ, `steps` times; `order` gets blocks of the layer.

    Each tensor holds one component of all blocks; `gram` is (4, 4, rows, blocks), pairs
    `gram_stride` apart. A block's columns are eliminated one after the other, which is the same as
    all at once.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < blocks
    stored += row * row_stride
    vectors += row * vector_row_stride
    weight += row * blocks * _WIDTH
    floor += row * blocks * _WIDTH
    column += row * blocks * _WIDTH
    closed += row * blocks + at
    gram += row * blocks + at
    first = at * _WIDTH
    w0 = tl.load(weight + first, mask=real, other=0.0)
    w1 = tl.load(weight + first + 1, mask=real, other=0.0)
    w2 = tl.load(weight + first + 2, mask=real, other=0.0)
    w3 = tl.load(weight + first + 3, mask=real, other=0.0)
    f0 = tl.load(floor + first, mask=real, other=1.0)
    f1 = tl.load(floor + first + 1, mask=real, other=1.0)
    f2 = tl.load(floor + first + 2, mask=real, other=1.0)
    f3 = tl.load(floor + first + 3, mask=real, other=1.0)
    g00 = tl.load(gram, mask=real, other=1.0)
    g10 = tl.load(gram + 4 * gram_stride, mask=real, other=0.0)
    g11 = tl.load(gram + 5 * gram_stride, mask=real, other=1.0)
    g20 = tl.load(gram + 8 * gram_stride, mask=real, other=0.0)
    g21 = tl.load(gram + 9 * gram_stride, mask=real, other=0.0)
    g22 = tl.load(gram + 10 * gram_stride, mask=real, other=1.0)
    g30 = tl.load(gram + 12 * gram_stride, mask=real, other=0.0)
    g31 = tl.load(gram + 13 * gram_stride, mask=real, other=0.0)
    g32 = tl.load(gram + 14 * gram_stride, mask=real, other=0.0)
    g33 = tl.load(gram + 15 * gram_stride, mask=real, other=1.0)
    c = tl.load(closed, mask=real, other=float("inf"))
    for step in range(steps):
        # L row by row, its diagonal inverted, and y = L⁻¹ w_B.
        i0 = 1.0 / tl.sqrt(tl.maximum(g00, f0))
        y0 = w0 * i0
        l10 = g10 * i0
        i1 = 1.0 / tl.sqrt(tl.maximum(g11 - l10 * l10, f1))
        y1 = (w1 - l10 * y0) * i1
        l20 = g20 * i0
        l21 = (g21 - l20 * l10) * i1
        i2 = 1.0 / tl.sqrt(tl.maximum(g22 - l20 * l20 - l21 * l21, f2))
        y2 = (w2 - l20 * y0 - l21 * y1) * i2
        l30 = g30 * i0
        l31 = (g31 - l30 * l10) * i1
        l32 = (g32 - l30 * l20 - l31 * l21) * i2
        i3 = 1.0 / tl.sqrt(tl.maximum(g33 - l30 * l30 - l31 * l31 - l32 * l32, f3))
        y3 = (w3 - l30 * y0 - l31 * y1 - l32 * y2) * i3
        score, b = tl.min(y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3 + c, axis=0, return_indices=True)
        b = tl.minimum(b, blocks - 1).to(tl.int64)  # numbers that are not numbers may pick anything
        tl.store(order + step * rows + row, tl.load(column + b * _WIDTH) // _WIDTH)
        tl.store(increase + step * rows + row, score)
        c = tl.where(at == b, float("inf"), c)

        for part in range(_WIDTH):
            p = b * _WIDTH + part
            kept = step * _WIDTH + part
            from_p = stored + p * column_stride
            pivot = tl.load(from_p + p * entry_stride)
            v0, v1, v2, v3, pivot = _present_block(
                from_p, entry_stride, vectors, step_stride, p, pivot, kept, at, blocks, AHEAD
            )
            root = tl.sqrt(tl.maximum(pivot, tl.load(floor + p)))
            v0, v1, v2, v3 = v0 / root, v1 / root, v2 / root, v3 / root
            amount = tl.load(weight + p) / root
            w0, w1, w2, w3 = w0 - v0 * amount, w1 - v1 * amount, w2 - v2 * amount, w3 - v3 * amount
            g00 -= v0 * v0
            g10 -= v1 * v0
            g11 -= v1 * v1
            g20 -= v2 * v0
            g21 -= v2 * v1
            g22 -= v2 * v2
            g30 -= v3 * v0
            g31 -= v3 * v1
            g32 -= v3 * v2
            g33 -= v3 * v3
            # All of the program's threads have read what is written now, and read it only
            # afterwards.
            tl.debug_barrier()
            tl.store(weight + first, w0, mask=real)
            tl.store(weight + first + 1, w1, mask=real)
            tl.store(weight + first + 2, w2, mask=real)
            tl.store(weight + first + 3, w3, mask=real)
            to = vectors + kept * step_stride + first
            tl.store(to, v0, mask=real)
            tl.store(to + 1, v1, mask=real)
            tl.store(to + 2, v2, mask=real)
            tl.store(to + 3, v3, mask=real)
            tl.debug_barrier()
    tl.store(closed, c, mask=real)


@triton.jit
def _present_block(
    stored,
    entry_stride,
    vectors,
    step_stride,
    p,
    pivot,
    kept,
    at,
    blocks,
    AHEAD: tl.constexpr,
):
    """`_present` in four components of all blocks; `at` counts blocks."""
    first = at * _WIDTH
    real = at < blocks
    from_p = stored + first * entry_stride
    v0 = tl.load(from_p, mask=real, other=0.0)
    v1 = tl.load(from_p + entry_stride, mask=real, other=0.0)
    v2 = tl.load(from_p + 2 * entry_stride, mask=real, other=0.0)
    v3 = tl.load(from_p + 3 * entry_stride, mask=real, other=0.0)
    for start in range(0, kept, AHEAD):
        for ahead in tl.static_range(AHEAD):
            k = start + ahead
            of_k = vectors + k * step_stride + first
            there = at < tl.where(k < kept, blocks, 0)
            share = tl.load(vectors + k * step_stride + p, mask=k < kept, other=0.0)
            v0 -= share * tl.load(of_k, mask=there, other=0.0)
            v1 -= share * tl.load(of_k + 1, mask=there, other=0.0)
            v2 -= share * tl.load(of_k + 2, mask=there, other=0.0)
            v3 -= share * tl.load(of_k + 3, mask=there, other=0.0)
            pivot -= share * share
    return v0, v1, v2, v3, pivot
