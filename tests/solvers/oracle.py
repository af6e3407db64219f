"""ExactOBS and OBQ as the paper writes them: plain loops, a fresh inverse at every step.

Nothing is shared with the package: inverses are `numpy.linalg.inv` of the submatrix of H that is
left, so agreement shows that down-dating, batching, lazy updates and compaction change nothing.
"""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np


def row_hessians(hessian, rows):
    """One damped-elsewhere (cols, cols) Hessian a row; dead inputs get H_ii = 1."""
    stack = hessian.reshape(-1, *hessian.shape[-2:])
    repeated = np.repeat(stack, rows // len(stack), axis=0).copy()
    for one in repeated:
        dead = np.diag(one) == 0
        one[dead, dead] = 1.0
    return repeated


def damped(hessian, damping):
    """H + damping · mean(diag H) · I, group by group."""
    stack = hessian.reshape(-1, *hessian.shape[-2:]).copy()
    for one in stack:
        dead = np.diag(one) == 0
        amount = damping * np.mean(np.diag(one))
        one[np.diag_indices_from(one)] += np.where(dead, 0.0, amount)
    return stack.reshape(hessian.shape)


def without_dead(weight, hessian):
    """W with zero columns where the Hessian's diagonal is zero."""
    stack = hessian.reshape(-1, *hessian.shape[-2:])
    diagonals = np.repeat([np.diag(one) for one in stack], len(weight) // len(stack), axis=0)
    return np.where(diagonals == 0, 0.0, weight)


def relative_error(weight, compressed, hessian):
    """tr(D H Dᵀ) / tr(W H Wᵀ), row by row."""
    stack = hessian.reshape(-1, *hessian.shape[-2:])
    each = np.repeat(stack, len(weight) // len(stack), axis=0)
    lost = sum((w - c) @ h @ (w - c) for w, c, h in zip(weight, compressed, each, strict=True))
    whole = sum(w @ h @ w for w, h in zip(weight, each, strict=True))
    return lost / whole


def _remove(w, h, left, chosen, values):
    """Move the `chosen` columns to `values`, the other columns in `left` best for it."""
    inverse = np.linalg.inv(h[np.ix_(left, left)])
    at = [left.index(p) for p in chosen]
    gap = w[chosen] - values
    w[left] -= inverse[:, at] @ np.linalg.solve(inverse[np.ix_(at, at)], gap)
    w[chosen] = values
    return [p for p in left if p not in chosen]


def _increase(w, h, left, chosen):
    inverse = np.linalg.inv(h[np.ix_(left, left)])
    at = [left.index(p) for p in chosen]
    return w[chosen] @ np.linalg.solve(inverse[np.ix_(at, at)], w[chosen])


def _trace(rows, h, width):
    """Loss increases, and weights after 0, 1, 2... prunings, of rows that share a mask."""
    rows, left = rows.copy(), list(range(rows.shape[1]))
    increases, snapshots = [], [rows.copy()]
    while left:
        blocks = [left[i : i + width] for i in range(0, len(left), width)]
        costs = [sum(_increase(w, h, left, block) for w in rows) for block in blocks]
        best = int(np.argmin(costs))
        increases.append(costs[best])
        for w in rows:
            after = _remove(w, h, left, blocks[best], np.zeros(width))
        left = after
        snapshots.append(rows.copy())
    return increases, snapshots


def prune_globally(weight, hessian, sparsity, width, together=None):
    """Unstructured (width 1) or block pruning with one choice over all rows.

    `together` are lists of rows that share a mask; each row has its own where not given.
    """
    units = [[row] for row in range(len(weight))] if together is None else together
    each = row_hessians(hessian, len(weight))
    traces = [_trace(weight[rows], each[rows[0]], width) for rows in units]
    count = math.ceil(Decimal(sum(len(costs) for costs, _ in traces)) * Decimal(repr(sparsity)))
    steps = sorted((cost, unit) for unit, (costs, _) in enumerate(traces) for cost in costs)
    taken = [0] * len(units)
    for _, unit in steps[:count]:
        taken[unit] += 1
    result = np.empty_like(weight)
    for rows, n, (_, snapshots) in zip(units, taken, traces, strict=True):
        result[rows] = snapshots[n]
    return result


def prune_nm(weight, hessian, n, m):
    """N:M pruning, every row on its own."""
    result = []
    for row, h in zip(weight, row_hessians(hessian, len(weight)), strict=True):
        w, left = row.copy(), list(range(len(row)))
        zeros = [0] * (len(row) // m)
        while min(zeros) < m - n:
            open_columns = [p for p in left if zeros[p // m] < m - n]
            costs = [_increase(w, h, left, [p]) for p in open_columns]
            p = open_columns[int(np.argmin(costs))]
            zeros[p // m] += 1
            left = _remove(w, h, left, [p], np.zeros(1))
        result.append(w)
    return np.array(result)


def find_grid(values, bits, asymmetric):
    """(scale, zero point, smallest code, largest code) of one row or group, signed codes."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if low == high:
        low, high = -1.0, 1.0
    top = 2 ** (bits - 1) - 1
    bottom = -top - 1 if asymmetric else -top
    best = (math.inf, 1.0, 0)
    for step in range(80):
        share = 1.0 - step / 100
        if asymmetric:
            scale = float(np.float32(share * (high - low) / (top - bottom)))
            zero = bottom + np.round(-share * low / scale)
        else:
            scale = float(np.float32(share * max(-low, high) / top))
            zero = 0.0
        codes = np.clip(np.round(values / scale) + zero, bottom, top)
        loss = np.sum(np.abs((codes - zero) * scale - values) ** 2.4)
        if loss < best[0]:
            best = (loss, scale, zero)
    return best[1], best[2], bottom, top


def quantize(weight, hessian, grid_weight, bits, asymmetric, group=None, mask=None):
    """OBQ of the columns in `mask` (all without one); returns codes, scales and zero points."""
    rows, cols = weight.shape
    width = group or cols
    mask = np.ones_like(weight, dtype=bool) if mask is None else mask
    codes = np.zeros(weight.shape, dtype=int)
    scales, zeros = np.zeros((rows, cols // width)), np.zeros((rows, cols // width), dtype=int)
    for r, h in enumerate(row_hessians(hessian, rows)):
        grids = [
            find_grid(grid_weight[r, i : i + width], bits, asymmetric)
            for i in range(0, cols, width)
        ]
        scales[r], zeros[r] = [g[0] for g in grids], [g[1] for g in grids]
        scale, zero = np.repeat(scales[r], width), np.repeat(zeros[r], width)
        bottom, top = grids[0][2:]
        codes[r] = zero
        w, left = weight[r].copy(), [int(p) for p in np.flatnonzero(mask[r])]
        while left:
            code = np.clip(np.round(w / scale) + zero, bottom, top)
            target = (code - zero) * scale
            miss = np.abs(target - w)
            diagonal = dict(zip(left, np.diag(np.linalg.inv(h[np.ix_(left, left)])), strict=True))
            outliers = [p for p in left if miss[p] > scale[p] / 2]
            if outliers:
                p = max(outliers, key=lambda k: miss[k])
            else:
                p = min(left, key=lambda k: miss[k] ** 2 / diagonal[k])
            codes[r, p] = code[p]
            left = _remove(w, h, left, [p], np.array([target[p]]))
    return codes, scales, zeros
