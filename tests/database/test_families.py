"""Families of levels, and which compounds are solved."""

from __future__ import annotations

import pytest

from obc_deploy.database import (
    Family,
    LayerOutline,
    as_families,
    block4_sparsities,
    choice_error,
    stored_form,
    stored_levels,
)
from obc_deploy.errors import SchemeError
from obc_deploy.schemes import DENSE, Scheme

LAYER = LayerOutline("conv", rows=8, cols=72, channels=8)


@pytest.mark.parametrize(
    "text",
    ["dense", "w8a8", "w4g128", "2:4", "2:4+w4a4", "unstructured", "block4+w8a8", "block4x2+w8a8"],
)
def test_a_family_reads_what_it_writes(text: str) -> None:
    assert str(Family.parse(text)) == text


def test_a_grid_has_all_its_levels_sparsest_last() -> None:
    levels = Family.parse("block4+w8a8").levels(LAYER)
    assert [str(level) for level in levels] == [f"block4@{s:g}+w8a8" for s in block4_sparsities()]
    assert len(Family.parse("unstructured").levels(LAYER)) == 45
    shared = Family.parse("block4x2").levels(LAYER)
    assert [str(level) for level in shared] == [f"block4x2@{s:g}" for s in block4_sparsities()]


@pytest.mark.parametrize(
    ("text", "outline"),
    [
        ("block4", LayerOutline("first", 8, 27, 3)),
        ("block4x2", LayerOutline("odd", 9, 72, 8)),
        ("block4x2", LayerOutline("grouped", 6, 72, 8, groups=2)),
        ("2:4+w8a8", LayerOutline("first", 8, 27, 3)),
        ("w4g128", LAYER),
    ],
)
def test_a_shape_that_a_family_does_not_divide_has_no_levels(
    text: str, outline: LayerOutline
) -> None:
    assert Family.parse(text).levels(outline) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("block5", "families are"),
        ("block4@0.5+w8a8", "one sparsity"),
        ("block4+", "families are"),
        ("", "families are"),
    ],
)
def test_what_is_no_family_says_what_one_is(text: str, said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        Family.parse(text)


def test_families_are_read_from_text_once_each() -> None:
    assert [str(one) for one in as_families("w8a8, block4+w8a8,w8a8")] == ["w8a8", "block4+w8a8"]
    with pytest.raises(SchemeError, match="no family"):
        as_families([])


def test_eight_bit_compounds_are_stored_as_their_pattern() -> None:
    choices = [Scheme.parse(text) for text in ("dense", "block4@0.5+w8a8", "2:4+w4a4", "w8a8")]
    assert [str(one) for one in stored_levels(choices)] == [
        "dense", "block4@0.5", "w8a8", "2:4", "2:4+w4a4",
    ]  # fmt: skip
    assert str(stored_form(choices[1])) == "block4@0.5"
    assert str(stored_form(choices[2])) == "2:4+w4a4"


def test_errors_of_eight_bit_compounds_add_up() -> None:
    errors = {
        Scheme.parse("block4@0.5"): 0.25, Scheme.parse("w8a8"): 0.5, Scheme.parse("2:4+w4a4"): 2.0,
    }  # fmt: skip
    assert choice_error(errors, Scheme.parse("block4@0.5+w8a8")) == 0.75
    assert choice_error(errors, Scheme.parse("2:4+w4a4")) == 2.0
    assert choice_error(errors, Scheme.parse("w8a8")) == 0.5
    assert choice_error(errors, DENSE) == 0.0
