"""What contradicts OPERATORS.md is an error with a message, and never a crash."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from sparse_models import FLOAT, UINT8, Graph, mask_of

from obc_deploy.runtimes import sparse

pytestmark = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())

BLOCKED = np.zeros((1, 2, 6, 6, 4), np.uint8)  # 5 channels, a border of 1
PLAIN = np.zeros((1, 5, 4, 4), np.uint8)
ROWS = np.zeros((3, 6), np.uint8)


@dataclass(frozen=True)
class Node:
    """A valid node. `fed` inputs are the graph's; the others are initializers."""

    kind: str
    fed: dict[str, np.ndarray]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    later: tuple[str, ...] = ()  # fed inputs that come after the constants
    output: int = UINT8

    def graph(self) -> tuple[Graph, str]:
        graph = Graph()
        first = [graph.input(name, self.fed[name]) for name in self.fed if name not in self.later]
        middle = [graph.constant(value) for value in self.constants.values()]
        last = [graph.input(name, self.fed[name]) for name in self.later]
        return graph, graph.sparse(self.kind, [*first, *middle, *last], **self.attributes)

    def run(self) -> np.ndarray:
        graph, output = self.graph()
        (made,) = graph.run(self.fed, {output: self.output})
        return made

    def without(self, *attributes: str) -> Node:
        kept = {key: value for key, value in self.attributes.items() if key not in attributes}
        return replace(self, attributes=kept)

    def having(self, **attributes: Any) -> Node:
        return replace(self, attributes={**self.attributes, **attributes})

    def holding(self, **constants: np.ndarray) -> Node:
        assert set(constants) <= set(self.constants)
        return replace(self, constants={**self.constants, **constants})

    def feeding(self, **fed: np.ndarray) -> Node:
        assert set(fed) <= set(self.fed)
        return replace(self, fed={**self.fed, **fed})


INPUT = {"input_scale": 0.5, "input_zero_point": 3}
OUTPUT = {"output_scale": 0.25, "output_zero_point": 7}
WEIGHTS = {
    "values": np.int8([[1, 2, 3, 4], [5, 0, 0, 0], [1, 1, 1, 1]]),
    "mask": mask_of([[0, 17], [], [2]], 18),
    "weight_scale": np.float32([0.5, 0.25, 1]),
    "bias": np.int32([1, 2, 3]),
}
ENTRIES = {
    "values": np.float32([1, 2, 3]),
    "mask": mask_of([[0, 44], [], [2]], 45),
    "bias": np.float32([1, 2, 3]),
}
THREE = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
TWO = {"input_scales": [0.5, 0.25], "input_zero_points": [3, 4], "input_borders": [1, 1]}

CONVOLUTION = Node(
    "SparseConvolution", {"x": BLOCKED}, WEIGHTS,
    {"channels": 5, "input_border": 1, **THREE, **INPUT, **OUTPUT},
)  # fmt: skip
WITH_RESIDUAL = replace(
    CONVOLUTION,
    fed={"x": BLOCKED, "residual": np.zeros((1, 1, 4, 4, 4), np.uint8)},
    later=("residual",),
).having(residual_scale=1.0, residual_zero_point=1, convolution_scale=1.0, convolution_zero_point=1)
DEPTHWISE = Node(
    "DepthwiseConvolution", {"x": BLOCKED},
    {"weight": np.ones((5, 1, 3, 3), np.int8), "weight_scale": np.float32([1] * 5),
     "bias": np.int32([1] * 5)},
    {"channels": 5, "input_border": 1, "pads": [1, 1, 1, 1], **INPUT, **OUTPUT},
)  # fmt: skip
LINEAR = Node(
    "SparseLinear", {"x": ROWS}, {**WEIGHTS, "mask": mask_of([[0, 1], [], [0]], 2)},
    {"features": 6, **INPUT, **OUTPUT},
)  # fmt: skip
DEQUANTIZE = Node(
    "SparseLinearDequantize", {"x": ROWS},
    {**LINEAR.constants, "bias": np.float32([1, 2, 3])}, {"features": 6, **INPUT}, output=FLOAT,
)  # fmt: skip
TO_BLOCKS = Node("ToBlocks", {"x": PLAIN}, {}, {"border": 1, "zero_point": 3})
QUANTIZE = Node("QuantizeToBlocks", {"x": PLAIN.astype(np.float32)}, {}, {"border": 1, **OUTPUT})
FROM_BLOCKS = Node("FromBlocks", {"x": BLOCKED}, {}, {"channels": 5, "input_border": 1})
FROM_TO_FLOAT = Node(
    "DequantizeFromBlocks", {"x": BLOCKED}, {}, {"channels": 5, "input_border": 1, **INPUT},
    output=FLOAT,
)  # fmt: skip
MAX_POOL = Node(
    "MaxPool", {"x": BLOCKED}, {}, {"channels": 5, "input_border": 1, "zero_point": 3, **THREE}
)
AVERAGE_POOL = Node(
    "AveragePool", {"x": BLOCKED}, {},
    {"channels": 5, "input_border": 1, **THREE, **INPUT, **OUTPUT},
)  # fmt: skip
GLOBAL_POOL = Node(
    "GlobalAveragePool", {"x": BLOCKED}, {},
    {"channels": 5, "input_border": 1, **INPUT, **OUTPUT},
)  # fmt: skip
ADD = Node("Add", {"a": BLOCKED, "b": BLOCKED}, {}, {"channels": 5, **TWO, **OUTPUT})
CONCAT = Node("Concat", {"x0": BLOCKED, "x1": BLOCKED}, {}, {"channels": [5, 6], **TWO, **OUTPUT})
CONVOLUTION_FLOAT = Node(
    "SparseConvolutionFloat", {"x": PLAIN.astype(np.float32)}, ENTRIES, {"channels": 5, **THREE},
    output=FLOAT,
)  # fmt: skip
LINEAR_FLOAT = Node(
    "SparseLinearFloat", {"x": ROWS.astype(np.float32)},
    {**ENTRIES, "mask": mask_of([[0, 5], [], [2]], 6)}, {"features": 6}, output=FLOAT,
)  # fmt: skip

VALID = (
    CONVOLUTION, WITH_RESIDUAL, DEPTHWISE, LINEAR, DEQUANTIZE, TO_BLOCKS, QUANTIZE, FROM_BLOCKS,
    FROM_TO_FLOAT, MAX_POOL, AVERAGE_POOL, GLOBAL_POOL, ADD, CONCAT, CONVOLUTION_FLOAT,
    LINEAR_FLOAT,
)  # fmt: skip


@pytest.mark.parametrize("node", VALID, ids=lambda node: node.kind)
def test_the_nodes_that_are_spoilt_below_run(node):
    assert np.isfinite(node.run()).all()


REQUIRED = [
    (node, name)
    for node in VALID
    for name in node.attributes
    if not name.endswith(("border", "borders", "margin", "margins", "pads", "strides"))
]


@pytest.mark.parametrize(
    ("node", "name"), REQUIRED, ids=lambda part: part if isinstance(part, str) else part.kind
)
def test_missing_attributes_and_wrong_types(node, name):
    value = node.attributes[name]
    other = "residual_scale" if name == "residual_scale" else name
    with pytest.raises(Exception, match=f"{node.kind} '{node.kind}_0': .*'{other}'.*missing"):
        node.without(name).run()
    wrong = "text" if name != "residual_scale" else 1
    with pytest.raises(Exception, match=rf"attribute '{name}' has another type.*, expected \w+"):
        node.having(**{name: wrong}).run()
    lists = isinstance(value, list)
    with pytest.raises(Exception, match=f"attribute '{name}' has another type"):
        node.having(**{name: value[0] if lists else [value]}).run()


@pytest.mark.parametrize(
    ("node", "attributes", "message"),
    [
        (CONVOLUTION, {"channels": 0}, "attribute 'channels' is 0, expected 1 to"),
        (CONVOLUTION, {"channels": 2**40}, "attribute 'channels' is 1099511627776"),
        (CONVOLUTION, {"border": 4}, "attribute 'border' is 4, expected 0 to 3"),
        (CONVOLUTION, {"border": -1}, "attribute 'border' is -1"),
        (CONVOLUTION, {"input_border": 4}, "'input_border' is 4, expected 0 to 3"),
        (CONVOLUTION, {"margin": 16}, "attribute 'margin' is 16, expected 0 to 15"),
        (CONVOLUTION, {"input_margin": -1}, "'input_margin' is -1, expected 0 to 15"),
        (CONVOLUTION, {"input_margin": 4}, "expected .* a border of 1 and a margin of 4"),
        (CONVOLUTION, {"input_border": 0}, "'pads' holds 1, expected at most .* border of 0"),
        (CONVOLUTION, {"pads": [1, 1, 2, 1]}, "'pads' holds 2, expected at most"),
        (CONVOLUTION, {"pads": [1, 1]}, "'pads' has 2 values, expected 4"),
        (CONVOLUTION, {"pads": [-1, 0, 0, 0]}, "'pads' is -1, expected 0 to"),
        (CONVOLUTION, {"kernel_shape": [3]}, "'kernel_shape' has 1 values, expected 2"),
        (CONVOLUTION, {"kernel_shape": [0, 3]}, "'kernel_shape' is 0, expected 1 to"),
        (CONVOLUTION, {"kernel_shape": [91, 91]}, "'kernel_shape' has 8281 positions, .* 8192"),
        (CONVOLUTION, {"kernel_shape": [1, 3]}, r"'mask' has shape \[3, 3\], expected \[3, 1\]"),
        (CONVOLUTION, {"strides": [3, 3]}, "'strides' is 3, expected 1 to 2"),
        (CONVOLUTION, {"strides": [1, 2]}, r"'strides' is \[1, 2\], expected \[1, 1\] or \[2, 2\]"),
        (CONVOLUTION, {"input_scale": 0.0}, "'input_scale' is 0, expected a finite number above"),
        (CONVOLUTION, {"input_scale": -1.0}, "'input_scale' is -1"),
        (CONVOLUTION, {"output_scale": float("nan")}, "'output_scale' is -?nan"),
        (CONVOLUTION, {"output_scale": float("inf")}, "'output_scale' is inf"),
        (CONVOLUTION, {"input_zero_point": 256}, "'input_zero_point' is 256, expected 0 to 255"),
        (CONVOLUTION, {"output_zero_point": -1}, "'output_zero_point' is -1"),
        (CONVOLUTION, {"lower": 9, "upper": 8}, "'upper' is 8, expected 9 to 255"),
        (CONVOLUTION, {"upper": 256}, "'upper' is 256"),
        (CONVOLUTION, {"output_scale": 1e-38, "input_scale": 1e30}, "infinite multiplier"),
        (CONVOLUTION, {"residual_scale": 1.0}, "'residual_zero_point' is missing"),
        (CONVOLUTION, {"channels": 3}, r"'mask' has shape \[3, 3\], expected \[3, 2\]"),
        (WITH_RESIDUAL, {"residual_border": 1}, r"'residual' has shape \[1, 1, 4, 4, 4\]"),
        (WITH_RESIDUAL, {"residual_margin": 1}, r"'residual' has shape \[1, 1, 4, 4, 4\]"),
        (DEPTHWISE, {"strides": [1, 3]}, "'strides' is 3"),
        (DEPTHWISE, {"input_border": 0}, "'pads' holds 1"),
        (DEPTHWISE, {"channels": 6}, r"'weight' has shape .* expected \[6, 1, height, width\]"),
        (LINEAR, {"features": 0}, "'features' is 0"),
        (LINEAR, {"features": 5}, r"input 'x' has shape \[3, 6\], expected \[..., 5\]|beyond"),
        (DEQUANTIZE, {"features": 8}, r"input 'x' has shape \[3, 6\], expected \[..., 8\]"),
        (TO_BLOCKS, {"zero_point": 256}, "'zero_point' is 256"),
        (TO_BLOCKS, {"border": 9}, "'border' is 9"),
        (QUANTIZE, {"lower": -1}, "'lower' is -1"),
        (FROM_BLOCKS, {"channels": 9}, r"has shape \[1, 2, 6, 6, 4\], expected \[N, 3, H \+ 2"),
        (FROM_BLOCKS, {"input_border": 3}, "expected .* for 5 channels, a border of 3"),
        (MAX_POOL, {"pads": [3, 0, 0, 0]}, "'pads' is .*, expected each below the kernel's size"),
        (MAX_POOL, {"kernel_shape": [9, 1], "pads": [1, 0, 1, 0]}, "padded height of 6, expected"),
        (MAX_POOL, {"strides": [0, 1]}, "'strides' is 0"),
        (AVERAGE_POOL, {"count_include_pad": 2}, "'count_include_pad' is 2"),
        (AVERAGE_POOL, {"kernel_shape": [1, 9], "pads": [0, 1, 0, 1]}, "padded width of 6"),
        (ADD, {"input_scales": [1.0]}, "'input_scales' has 1 values, expected 2"),
        (ADD, {"input_scales": [1.0, -2.0]}, "'input_scales' is -2"),
        (ADD, {"input_borders": [1, 0]}, r"input 'b' holds \[N, H, W\] = \[1, 6, 6\]"),
        (ADD, {"input_margins": [1, 0]}, r"input 'b' holds \[N, H, W\] = \[1, 4, 4\]"),
        (ADD, {"input_margins": [0]}, "'input_margins' has 1 values, expected 2"),
        (CONCAT, {"channels": [5]}, "'input_borders' has 2 values, expected 1"),
        (CONCAT, {"channels": [5, 13]}, "input 'x1' has shape"),
        (CONVOLUTION_FLOAT, {"lower": 2.0, "upper": 1.0}, "'lower' is 2, expected at most"),
        (CONVOLUTION_FLOAT, {"lower": float("nan")}, "'lower' is not a number"),
        (CONVOLUTION_FLOAT, {"pads": [3, 0, 0, 0]}, "expected each below the kernel's size"),
        (CONVOLUTION_FLOAT, {"channels": 6}, r"'mask' has shape \[3, 6\], expected \[3, 7\]"),
        (LINEAR_FLOAT, {"features": 5}, "'mask' has place 5 of output channel 0, .* from 0 to 4"),
    ],
)  # fmt: skip
def test_wrong_attributes(node, attributes, message):
    with pytest.raises(Exception, match=f"{node.kind} '{node.kind}_0': .*({message})"):
        node.having(**attributes).run()


SPOILT_WEIGHTS = [
    ({"values": np.ones((3, 3), np.int8)}, r"'values' has shape \[3, 3\], expected \[blocks, 4\]"),
    ({"values": np.ones(12, np.int8)}, r"'values' has shape \[12\]"),
    ({"values": np.ones((4, 4), np.int8)}, "'mask' has 3 places, expected 4, the rows of 'values'"),
    ({"values": np.ones((2, 4), np.int8)}, "'mask' has 3 or more places, expected 2"),
    ({"values": np.ones((0, 4), np.int8)}, "'mask' has [12] or more places, expected 0"),
    ({"mask": np.full((3, 4), 1, np.uint8)}, r"'mask' has shape \[3, 4\], expected \[3, [13]\]"),
    ({"mask": np.zeros((0, 3), np.uint8)}, r"'mask' has shape \[0, 3\], expected \[O, bytes\]"),
    ({"mask": np.zeros(3, np.uint8)}, r"'mask' has shape \[3\], expected \[O, bytes\]"),
    ({"mask": np.uint8(1)}, r"'mask' has shape \[\]"),
    ({"weight_scale": np.float32([1, 1])}, r"'weight_scale' has shape \[2\], expected \[3\] or"),
    ({"weight_scale": np.float32([1, 0, 1])}, "'weight_scale' holds 0 for output channel 1"),
    ({"weight_scale": np.float32([1, 1, np.nan])}, "'weight_scale' holds -?nan"),
    ({"bias": np.int32([1, 2])}, r"'bias' has shape \[2\], expected \[3\]"),
]
TOO_LARGE = ({"bias": np.int32([2**31 - 1, 0, 0])}, "output channel 0 reach .* int32")


@pytest.mark.parametrize("node", [CONVOLUTION, LINEAR, DEQUANTIZE], ids=lambda node: node.kind)
@pytest.mark.parametrize(("constants", "message"), [*SPOILT_WEIGHTS, TOO_LARGE])
def test_wrong_weights(node, constants, message):
    if node is DEQUANTIZE and "bias" in constants:
        if constants is TOO_LARGE[0]:
            pytest.skip("a float bias is not part of the sum")
        constants = {"bias": np.float32([1, 2])}
    with pytest.raises(Exception, match=f"{node.kind} '{node.kind}_0': .*{message}"):
        node.holding(**constants).run()


@pytest.mark.parametrize("node", [CONVOLUTION_FLOAT, LINEAR_FLOAT], ids=lambda node: node.kind)
@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"values": np.float32([[1, 2, 3]])}, r"'values' has shape \[1, 3\], expected \[entries\]"),
        ({"values": np.float32([1, 2])}, "'mask' has 3 or more places, expected 2"),
        ({"values": np.float32([1, 2, 3, 4])}, "'mask' has 3 places, expected 4"),
        ({"mask": mask_of([[0, 9], [1]], 99)}, r"'mask' has shape \[2, 13\], expected \[2, "),
        ({"bias": np.float32([1])}, r"'bias' has shape \[1\], expected \[3\]"),
    ],
)
def test_wrong_float_weights(node, constants, message):
    with pytest.raises(Exception, match=f"{node.kind} '{node.kind}_0': .*{message}"):
        node.holding(**constants).run()


@pytest.mark.parametrize(
    ("node", "places"),
    [(CONVOLUTION, 18), (LINEAR, 2), (CONVOLUTION_FLOAT, 45), (LINEAR_FLOAT, 6)],
    ids=["SparseConvolution", "SparseLinear", "SparseConvolutionFloat", "SparseLinearFloat"],
)  # fmt: skip
def test_bits_beyond_the_last_place(node, places):
    for rows in ([[0, places], [], [1]], [[0], [places], [1]], [[0], [1], [places]]):
        mask = mask_of(rows, places + 1)
        assert mask.shape == node.constants["mask"].shape
        output = next(i for i, row in enumerate(rows) if places in row)
        message = f"'mask' has place {places} of output channel {output}, .* 0 to {places - 1}"
        with pytest.raises(Exception, match=message):
            node.holding(mask=mask).run()


def test_weights_for_channels_that_are_not_there():
    values = WEIGHTS["values"].copy()
    values[1, 1] = 1  # block 17 is the last position's second: channel 4 alone
    with pytest.raises(Exception, match=r"a weight of 1 in row 1 .* beyond the last"):
        CONVOLUTION.holding(values=values).run()


@pytest.mark.parametrize(
    ("node", "fed", "message"),
    [
        (CONVOLUTION, {"x": PLAIN}, r"input 'x' has shape \[1, 5, 4, 4\], expected \[N, 2, H \+ 2"),
        (CONVOLUTION, {"x": BLOCKED[..., :3].copy()}, "input 'x' has shape"),
        (CONVOLUTION, {"x": BLOCKED[:, :1].copy()}, "input 'x' has shape"),
        (CONVOLUTION, {"x": BLOCKED[:, :, :2].copy()}, "input 'x' has shape"),
        (WITH_RESIDUAL, {"residual": np.zeros((1, 1, 4, 5, 4), np.uint8)}, "input 'residual' has"),
        (WITH_RESIDUAL, {"residual": np.zeros((2, 1, 4, 4, 4), np.uint8)}, "input 'residual' has"),
        (DEPTHWISE, {"x": BLOCKED[:, :1].copy()}, "input 'x' has shape"),
        (LINEAR, {"x": np.zeros((), np.uint8)}, r"input 'x' has shape \[\], expected \[..., 6\]"),
        (LINEAR_FLOAT, {"x": np.zeros((6, 1), np.float32)}, r"input 'x' has shape \[6, 1\]"),
        (TO_BLOCKS, {"x": BLOCKED}, r"input 'x' has shape .* expected \[N, C, H, W\]"),
        (TO_BLOCKS, {"x": np.zeros((1, 5, 0, 4), np.uint8)}, "input 'x' has shape"),
        (QUANTIZE, {"x": np.zeros((1, 5), np.float32)}, "input 'x' has shape"),
        (FROM_BLOCKS, {"x": PLAIN}, "input 'x' has shape"),
        (FROM_TO_FLOAT, {"x": BLOCKED[:, :, 1:2].copy()}, "input 'x' has shape"),
        (MAX_POOL, {"x": PLAIN}, "input 'x' has shape"),
        (AVERAGE_POOL, {"x": PLAIN}, "input 'x' has shape"),
        (GLOBAL_POOL, {"x": PLAIN}, "input 'x' has shape"),
        (ADD, {"b": BLOCKED[:, :, :5].copy()}, r"input 'b' holds .* expected 'a''s \[1, 4, 4\]"),
        (ADD, {"a": PLAIN}, "input 'a' has shape"),
        (CONCAT, {"x1": BLOCKED[:, :, :5].copy()}, r"input 'x1' holds .* expected the first's"),
        (CONVOLUTION_FLOAT, {"x": np.zeros((1, 5, 16), np.float32)}, "input 'x' has shape"),
        (CONVOLUTION_FLOAT, {"x": np.zeros((1, 5, 0, 4), np.float32)}, "input 'x' has shape"),
    ],
)  # fmt: skip
def test_wrong_shapes(node, fed, message):
    with pytest.raises(Exception, match=f"{node.kind} '{node.kind}_0': .*{message}"):
        node.feeding(**fed).run()


def test_more_dimensions_than_there_may_be():
    with pytest.raises(
        Exception, match=r"(SparseLinear|Region) .*9 dimensions, expected 8 at most"
    ):
        LINEAR.feeding(x=np.zeros((1,) * 8 + (6,), np.uint8)).run()


@pytest.mark.parametrize("node", VALID, ids=lambda node: node.kind)
def test_wrong_types(node):
    for name, value in node.fed.items():
        with pytest.raises(Exception, match=rf"(?i)type.*{node.kind}|{node.kind}.* type"):
            node.feeding(**{name: value.astype(np.int64)}).run()
    for name, value in node.constants.items():
        with pytest.raises(Exception, match=rf"(?i)type.*{node.kind}|{node.kind}.* type"):
            node.holding(**{name: value.astype(np.float64)}).run()


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weights_must_be_constant(name):
    graph, output = CONVOLUTION.graph()
    place = list(WEIGHTS).index(name)
    node = graph.nodes[0]
    node.input[place + 1] = graph.input(name, WEIGHTS[name])
    with pytest.raises(Exception, match=f"SparseConvolution .*'{name}' is .*computed, expected"):
        graph.run({"x": BLOCKED, name: WEIGHTS[name]}, {output: UINT8})


def test_too_few_and_too_many_inputs():
    graph, output = CONVOLUTION.graph()
    del graph.nodes[0].input[3:]
    with pytest.raises(Exception, match=r"SparseConvolution"):
        graph.run({"x": BLOCKED}, {output: UINT8})
    graph, output = TO_BLOCKS.graph()
    graph.nodes[0].input.append("x")
    with pytest.raises(Exception, match=r"ToBlocks"):
        graph.run({"x": PLAIN}, {output: UINT8})


def test_a_residual_must_be_announced():
    graph, output = WITH_RESIDUAL.graph()
    del graph.nodes[0].input[5:]
    with pytest.raises(Exception, match="'residual_scale' is there, but input 'residual' is miss"):
        graph.run(WITH_RESIDUAL.fed, {output: UINT8})
    with pytest.raises(Exception, match="'residual' is there, but attribute 'residual_scale' is m"):
        WITH_RESIDUAL.without("residual_scale").run()


def test_a_session_works_on_after_a_refusal():
    graph, output = FROM_BLOCKS.graph()
    graph.inputs.clear()
    graph.input("x", BLOCKED, ["a", "b", "c", "d", "e"])
    session = graph.session({output: UINT8})
    with pytest.raises(Exception, match=re.escape("FromBlocks 'FromBlocks_0': input 'x'")):
        session.run(None, {"x": BLOCKED[:, :1].copy()})
    assert session.run(None, {"x": BLOCKED})[0].shape == (1, 5, 4, 4)
