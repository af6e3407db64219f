"""The packed form: the same bits back, in as few bytes as were promised."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import LEVELS, make_problem, same_bits

from obc_deploy.database import compact
from obc_deploy.database.compact import pack, pack_codes, packed_bytes, stored_scheme, unpack
from obc_deploy.errors import DatabaseError
from obc_deploy.schemes import Quantization, Scheme
from obc_deploy.solvers import METHODS, CompressedLayer, solve_levels

quick = settings(max_examples=60, deadline=None, derandomize=True)


def round_trip(form):
    rows, cols = form.weight.shape
    return unpack(pack(form), form.scheme, rows, cols, error=form.error, method=form.method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2])
def test_solved_layers_come_back(method, groups):
    problem = make_problem(rows=6, cols=16, groups=groups, channels=8)
    for form in solve_levels(problem, LEVELS, method=method):
        assert same_bits(round_trip(form), form)


@pytest.mark.parametrize(("rows", "cols", "channels"), [(6, 16, 8), (5, 24, 24), (1, 8, 4)])
def test_bytes_are_known_beforehand(rows, cols, channels):
    problem = make_problem(rows=rows, cols=cols, channels=channels)
    for form in solve_levels(problem, LEVELS):
        arrays = pack(form)
        # Grids of zero points 0 alone do without them, whatever the scheme.
        spared = 0
        if form.zero_point is not None and "-asym" in str(form.scheme):
            spared = 0 if "zero_point" in arrays else form.zero_point.numel()
        packed = sum(array.nbytes for array in arrays.values())
        assert packed == packed_bytes(stored_scheme(form.scheme), rows, cols) - spared


@st.composite
def layers(draw):
    """Any mask, any grid: what no solver of ours need ever have made."""
    rows, blocks = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    cols = 4 * blocks if draw(st.booleans()) else draw(st.integers(1, 37))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["dense", "weights", "blocks", "nothing"]))
    mask = rng.random((rows, cols)) < draw(st.floats(0.0, 1.0))
    if kind == "blocks" and cols % 4 == 0:
        mask = np.repeat(mask[:, ::4], 4, axis=1)
    elif kind in ("dense", "nothing"):
        mask = np.full((rows, cols), kind == "dense")
    bits = draw(st.sampled_from([None, 2, 3, 4, 5, 6, 7, 8]))
    weight = torch.from_numpy(rng.standard_normal((rows, cols)).astype(np.float32))
    weight[0, 0] = -0.0
    stays = torch.from_numpy(mask)
    if bits is None:
        weight = weight.masked_fill(~stays, 0.0)
        scheme = Scheme.parse("unstructured@0.5")
        return CompressedLayer(scheme, weight, stays, None, None, None, 0.25, "magnitude")
    group = draw(st.sampled_from([each for each in (2, 4, cols) if each > 1 and cols % each == 0]
                                 or [None]))  # fmt: skip
    grid = Quantization(bits, group=group, asymmetric=draw(st.booleans()))
    groups = cols // (group or cols)
    zero_point = np.zeros((rows, groups), dtype=np.int8)
    if grid.asymmetric:
        zero_point = rng.integers(
            grid.code_min, grid.code_max, size=(rows, groups), endpoint=True, dtype=np.int8
        )
    of_weight = np.repeat(zero_point, cols // groups, axis=1)
    codes = rng.integers(
        grid.code_min, grid.code_max, size=(rows, cols), endpoint=True, dtype=np.int8
    )
    codes = np.where(mask, codes, of_weight)
    scale = np.exp(rng.standard_normal((rows, groups))).astype(np.float32)
    steps = torch.from_numpy(codes).float() - torch.from_numpy(of_weight)
    weight = steps * torch.from_numpy(np.repeat(scale, cols // groups, axis=1))
    return CompressedLayer(
        Scheme(None, grid), weight, stays, torch.from_numpy(codes), torch.from_numpy(scale),
        torch.from_numpy(zero_point), 0.5, "rtn",
    )  # fmt: skip


@quick
@given(layers())
def test_any_layer_comes_back(form):
    assert same_bits(round_trip(form), form)


@quick
@given(st.lists(st.integers(0, 255), max_size=70), st.integers(2, 8), st.sampled_from([8, 16]))
def test_codes_come_back_across_chunks(values, bits, chunk):
    codes = np.array([value % (1 << bits) for value in values], dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "_CODES_AT_A_TIME", chunk)
        packed = pack_codes(codes, bits)
        assert packed.size == math.ceil(bits * codes.size / 8)
        assert compact.unpack_codes(packed, bits, codes.size).tolist() == codes.tolist()
    # One long number in base 2^bits says the same.
    number = sum(int(c) << bits * (codes.size - 1 - i) for i, c in enumerate(codes))
    number <<= 8 * packed.size - bits * codes.size
    assert packed.tobytes() == number.to_bytes(packed.size, "big")


def test_three_bits_by_hand():
    packed = pack_codes(np.array([1, 2, 3, 4, 5, 6, 7, 0]), 3)
    assert packed.tobytes() == bytes([0b00101001, 0b11001011, 0b10111000])


def test_codes_beyond_their_bits_are_refused():
    with pytest.raises(DatabaseError, match="do not fit 3 bits"):
        pack_codes(np.array([0, 8]), 3)


def broken(form, **tensors):
    return replace(form, **{name: tensor.clone() for name, tensor in tensors.items()})


def test_what_would_be_lost_is_refused():
    pruned, quantized = solve_levels(make_problem(), ["unstructured@0.5", "unstructured@0.5+w4"])
    lost = pruned.weight.masked_fill(~pruned.mask, 1e-9)
    negative = pruned.weight.masked_fill(~pruned.mask, -0.0)
    for form in (
        broken(pruned, weight=lost),
        broken(pruned, weight=negative),
        broken(pruned, weight=pruned.weight.double()),
        broken(quantized, weight=quantized.weight * 1.001),
        replace(quantized, codes=None),
    ):
        with pytest.raises(DatabaseError, match=r"unstructured@0\.5"):
            pack(form)


def test_activations_do_not_count():
    assert str(stored_scheme(Scheme.parse("block4@0.5+w4g8a8-asym"))) == "block4@0.5+w4g8-asym"
    assert str(stored_scheme(Scheme.parse("2:4"))) == "2:4"
