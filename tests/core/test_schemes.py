"""The scheme grammar: every scheme reads back as itself, every mistake is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obc_deploy.errors import SchemeError
from obc_deploy.schemes import NM, Block4, Quantization, Scheme, Unstructured, as_scheme

SPARSITIES = st.integers(1, 999_999).map(lambda millionths: millionths / 1_000_000)
PATTERNS = st.one_of(
    SPARSITIES.map(Unstructured),
    SPARSITIES.map(Block4),
    st.integers(2, 64).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: NM(n, m))),
)
QUANTIZATIONS = st.builds(
    Quantization,
    weight_bits=st.integers(2, 8),
    group=st.none() | st.integers(2, 1024),
    activation_bits=st.none() | st.integers(2, 8),
    asymmetric=st.booleans(),
)
SCHEMES = st.builds(Scheme, st.none() | PATTERNS, st.none() | QUANTIZATIONS)


@given(SCHEMES)
def test_text_reads_back_as_the_same_scheme(scheme):
    assert Scheme.parse(str(scheme)) == scheme
    assert str(Scheme.parse(str(scheme))) == str(scheme)
    assert as_scheme(str(scheme)) == as_scheme(scheme) == scheme


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dense", "dense"),
        ("unstructured@.5", "unstructured@0.5"),
        ("block4@0.900", "block4@0.9"),
        (" 2:4+w8a8 ", "2:4+w8a8"),
        ("w4g128a8-asym", "w4g128a8-asym"),
        ("w3-asym", "w3-asym"),
    ],
)
def test_canonical_form(text, canonical):
    assert str(Scheme.parse(text)) == canonical


@given(PATTERNS)
def test_density_and_sparsity_add_up(pattern):
    assert pattern.density + pattern.sparsity == pytest.approx(1.0)
    assert Scheme(pattern).density == pattern.density


@pytest.mark.parametrize(
    ("bits", "asymmetric", "low", "high"),
    [(8, False, -127, 127), (8, True, -128, 127), (2, False, -1, 1), (2, True, -2, 1)],
)
def test_code_range(bits, asymmetric, low, high):
    grid = Quantization(bits, asymmetric=asymmetric)
    assert (grid.code_min, grid.code_max) == (low, high)


def test_bits_of_a_scheme():
    assert (Scheme.parse("w4").weight_bits, Scheme.parse("w4").activation_bits) == (4, 32)
    assert (Scheme().weight_bits, Scheme().activation_bits) == (32, 32)
    assert Scheme.parse("w4a6").activation_bits == 6
    assert Scheme().is_dense
    assert not Scheme.parse("w8").is_dense


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "cannot read scheme ''"),
        ("spars@0.5", "cannot read scheme 'spars@0.5'"),
        ("unstructured@90", "sparsity 90"),
        ("unstructured@0", "sparsity 0"),
        ("block4@1", "sparsity 1"),
        ("block4@1.5", "sparsity 1.5"),
        ("4:2", "'4:2' keeps 4 of 2"),
        ("0:4", "'0:4' keeps 0 of 4"),
        ("4:4", "'4:4'"),
        ("w1", "'w1' asks for 1-bit weights"),
        ("w9", "'w9' asks for 9-bit weights"),
        ("w8a1", "'a1' asks for 1-bit activations"),
        ("w8a16", "'a16' asks for 16-bit activations"),
        ("w4g1", "'g1' is no group"),
        ("w8+2:4", "'w8' in scheme 'w8+2:4' is no pattern"),
        ("2:4+8", "'8' in scheme '2:4+8' is no quantization"),
        ("2:4+w8+w8", "'w8+w8'"),
        ("dense+w8", "'dense' in scheme"),
        ("w8a8-sym", "cannot read scheme"),
        ("unstructured@-0.5", "cannot read scheme"),
    ],
)
def test_errors_name_the_value_on_one_line(text, named):
    with pytest.raises(SchemeError) as error:
        Scheme.parse(text)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
