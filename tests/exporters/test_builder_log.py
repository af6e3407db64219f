"""Sparse kernels as a builder's log tells of them."""

from __future__ import annotations

import pytest

from obc_deploy.exporters.builder_log import SparseTactics, sparse_tactics

RECORDED = (
    "[TRT] [I] Local timing cache in use.",
    "[TRT] [I] (Sparsity) Found 3 layer(s) eligible to use sparse tactics: "
    "node_conv2d_1 + node_relu_1, node_conv2d_2, node_linear",
    "[TRT] [I] (Sparsity) Chose 2 layer(s) using sparse tactics: "
    "node_conv2d_1 + node_relu_1, node_linear",
    "[TRT] [I] Engine generation completed in 12.3 seconds.",
)


def test_found_and_chosen_layers():
    tactics = sparse_tactics(RECORDED)
    assert tactics.found == ("node_conv2d_1 + node_relu_1", "node_conv2d_2", "node_linear")
    assert tactics.chosen == ("node_conv2d_1 + node_relu_1", "node_linear")
    assert (tactics.found_count, tactics.chosen_count) == (3, 2)
    for node, picked in (
        ("node_conv2d_1", True),
        ("node_relu_1", True),
        ("node_linear", True),
        ("node_conv2d_2", False),
        ("node_conv2d", False),
    ):
        assert tactics.picked(node) is picked


def test_a_log_that_says_nothing():
    tactics = sparse_tactics(["[TRT] [I] Engine generation completed in 0.1 seconds."])
    assert tactics == SparseTactics()
    assert tactics.picked("node_conv2d") is None


@pytest.mark.parametrize(
    "line",
    [
        "(Sparsity) Chose 0 layer(s) using sparse tactics:",
        "(Sparsity) Chose 0 layer(s) using sparse tactics",
    ],
)
def test_none_chosen(line):
    tactics = sparse_tactics([line])
    assert tactics.chosen_count == 0
    assert tactics.picked("node_conv2d") is False


def test_a_list_cut_short_names_no_layer():
    tactics = sparse_tactics(["(Sparsity) Chose 40 layer(s) using sparse tactics: a, b, ..."])
    assert tactics.chosen is None
    assert tactics.chosen_count == 40
    assert tactics.picked("a") is None


def test_the_words_of_older_versions():
    tactics = sparse_tactics(
        [
            "[I] (Sparsity) Layers eligible for sparse math: conv1, conv2 + relu2",
            "[I] (Sparsity) TRT inference plan picked sparse implementation for layers: conv1",
        ]
    )
    assert tactics == SparseTactics(("conv1", "conv2 + relu2"), ("conv1",), 2, 1)
