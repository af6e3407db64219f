"""Several operators as one node: the same numbers, and the same nodes once they are parted."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from blocked_cases import QUICK, SETS, THREADS
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from sparse_models import UINT8, Graph, block_sparse, blocks_of

from obc_deploy.errors import ArtifactError
from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.onnx_graph import read_onnx_graph
from obc_deploy.runtimes.regions import JOINED, REGION, joined, separated, separated_copy

needs_kernels = pytest.mark.skipif(not sparse.is_available(), reason=sparse.why_missing())
GRID = {"input_scale": 0.1, "input_zero_point": 3, "output_scale": 0.4, "output_zero_point": 9}
TWO = {"input_scales": [0.4, 0.4], "input_zero_points": [9, 9]}


@pytest.fixture(autouse=True)
def form(monkeypatch):
    """Graphs are joined by the tests themselves."""
    monkeypatch.setattr(Graph, "joined", False)


# What becomes of a graph's nodes.


@st.composite
def graphs(draw):
    """A model of operators of ours and of others, each reading values made before it."""
    nodes, values = [], ["x"]
    for index in range(draw(st.integers(1, 14))):
        inputs = draw(st.lists(st.sampled_from([*values[-5:], "w"]), min_size=1, max_size=3))
        ours = draw(st.booleans())
        kind = draw(st.sampled_from(["Add", "SparseConvolution", "SparseLinearFloat"]))
        node = helper.make_node(
            kind if ours else "Sum", inputs, [f"v{index}"], name=f"n{index}",
            domain=sparse.DOMAIN if ours else "",
        )  # fmt: skip
        if ours:
            attributes = {"pads": [1, 2, index], "output_scale": 0.5, "a_1": index}
            node.attribute.extend(helper.make_attribute(*each) for each in attributes.items())
        nodes.append(node)
        values.append(f"v{index}")
    ends = draw(st.sets(st.sampled_from(values[1:]), min_size=1)) | {values[-1]}
    return helper.make_model(
        helper.make_graph(
            nodes, "drawn", [helper.make_tensor_value_info("x", TensorProto.UINT8, [1])],
            [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in sorted(ends)],
            [helper.make_tensor("w", TensorProto.UINT8, [1], [1])],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(sparse.DOMAIN, 2)],
    )  # fmt: skip


def assert_runs_in_order(model):
    known = {"x", "w"}
    for node in model.graph.node:
        assert set(node.input) <= known
        known |= set(node.output)
    assert {output.name for output in model.graph.output} <= known


@QUICK
@given(graphs())
def test_joined_nodes_come_apart_as_they_were(model):
    before = model.SerializeToString()
    whole = joined(model)
    assert_runs_in_order(whole)
    parted = separated(whole)
    assert_runs_in_order(parted)
    assert model.SerializeToString() == before
    by_name = {node.name: node for node in parted.graph.node}
    assert len(by_name) == len(model.graph.node)
    for node in model.graph.node:
        found = by_name[node.name]
        assert list(found.input) == list(node.input)
        assert list(found.output) == list(node.output)
        assert (found.op_type, found.domain) == (node.op_type, node.domain)
        attributes = [
            {item.name: helper.get_attribute_value(item) for item in each.attribute}
            for each in (found, node)
        ]
        assert attributes[0] == attributes[1]


@QUICK
@given(graphs())
def test_no_two_neighbours_are_left_that_could_be_one(model):
    whole = joined(model)
    makers = {value: node for node in whole.graph.node for value in node.output}

    def takes(node):
        return node.domain == sparse.DOMAIN and (node.op_type == REGION or node.op_type in JOINED)

    def reaches(node, goal, through):
        """Whether a path from the goal comes to the node, by way of another operator or not."""
        return any(
            maker is not None
            and ((maker is goal and through) or reaches(maker, goal, through or maker is not goal))
            for maker in map(makers.get, node.input)
        )

    for node in whole.graph.node:
        for source in map(makers.get, node.input):
            if source is not None and takes(node) and takes(source):
                # A region and its reader are two only where something between them is not ours.
                assert reaches(node, source, through=False)


def test_values_that_only_a_subgraph_reads_leave_the_region():
    add = {"domain": sparse.DOMAIN}
    then = helper.make_graph(
        [helper.make_node("Identity", ["v0"], ["t"])], "then", [],
        [helper.make_tensor_value_info("t", TensorProto.UINT8, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Add", ["x", "x"], ["v0"], name="n0", **add),
        helper.make_node("Add", ["v0", "v0"], ["v1"], name="n1", **add),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then),
    ]
    graph = helper.make_graph(
        nodes, "branch", [helper.make_tensor_value_info("x", TensorProto.UINT8, [1]),
                          helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in ("y", "v1")],
    )  # fmt: skip
    whole = joined(helper.make_model(graph))
    (region,) = (node for node in whole.graph.node if node.op_type == REGION)
    assert set(region.output) == {"v0", "v1"}
    assert [node.op_type for node in whole.graph.node] == [REGION, "If"]


def test_one_operator_alone_stays_a_node():
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "x"], ["y"], domain=sparse.DOMAIN)], "alone",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, [1])],
            [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        )
    )  # fmt: skip
    assert [node.op_type for node in joined(model).graph.node] == ["Add"]
    assert separated(model) is model


# What they compute.


def convolution(graph: Graph, x: str, weight: np.ndarray, border: int, **more: object) -> str:
    inputs = [x, *(graph.constant(part) for part in blocks_of(weight))]
    inputs.append(graph.constant(np.float32([0.02])))
    side = weight.shape[2]
    return graph.sparse(
        "SparseConvolution", inputs, channels=weight.shape[1], kernel_shape=[side, side],
        pads=[side // 2] * 4, input_border=1, border=border, **GRID, **more,
    )  # fmt: skip


def network(random: np.random.Generator, channels: int, sizes: list[object]) -> tuple[Graph, list]:
    """Branches, a sum, a layer of ONNX Runtime's between ours, two outputs."""
    graph = Graph()
    graph.input("x", np.zeros((1, channels, 4, 4), np.uint8), sizes)
    x = graph.sparse("ToBlocks", ["x"], border=1, zero_point=3)
    a = convolution(graph, x, block_sparse(random, channels, channels, 3, 3, 0.5), 1)
    b = convolution(graph, a, block_sparse(random, channels, channels, 1, 1, 0.7), 1)
    c = graph.sparse(
        "Add", [a, b], channels=channels, input_borders=[1, 1], border=1, output_scale=0.1,
        output_zero_point=3, **TWO,
    )  # fmt: skip
    d = convolution(graph, c, block_sparse(random, 7, channels, 3, 3, 0.3), 0)
    plain = graph.sparse("FromBlocks", [d], channels=7)
    turned = graph.add("Transpose", [plain], perm=[0, 1, 3, 2])
    e = graph.sparse("ToBlocks", [turned], border=1, zero_point=3)
    f = convolution(graph, e, block_sparse(random, 9, 7, 3, 3, 0.5), 0)
    g = graph.sparse("FromBlocks", [f], channels=9)
    return graph, [c, g]


def session_of(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(sparse.library_path()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def both_forms(graph: Graph, outputs: list[str], threads: int) -> list:
    model = onnx.ModelProto.FromString(graph.model(dict.fromkeys(outputs, UINT8)))
    whole = joined(model)
    kinds = [node.op_type for node in whole.graph.node]
    assert kinds == [REGION, "Transpose", REGION]
    return [session_of(each, threads) for each in (model, whole)]


@needs_kernels
@QUICK
@given(
    st.integers(0, 99), st.sampled_from([3, 8, 17]), SETS, THREADS,
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 4, 9, 20])), min_size=1, max_size=7),
)  # fmt: skip
def test_a_region_computes_what_its_operators_do(seed, channels, name, threads, shapes):
    random = np.random.default_rng(seed)
    graph, outputs = network(random, channels, ["N", channels, "H", "W"])
    with sparse.use_instruction_set(name):
        alone, whole = both_forms(graph, outputs, threads)
    # Shapes come back: where values lie is remembered for the last few.
    for images, size in shapes + shapes[::-1]:
        x = random.integers(0, 256, (images, channels, size, size + 1)).astype(np.uint8)
        for found, wanted in zip(whole.run(None, {"x": x}), alone.run(None, {"x": x}), strict=True):
            np.testing.assert_array_equal(found, wanted)


@needs_kernels
def test_a_region_is_run_by_many_threads_at_once():
    random = np.random.default_rng(5)
    graph, outputs = network(random, 16, ["N", 16, "H", "W"])
    alone, whole = both_forms(graph, outputs, 2)
    images = [random.integers(0, 256, (1 + i % 2, 16, 9, 9)).astype(np.uint8) for i in range(60)]
    wanted = [alone.run(None, {"x": image}) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: whole.run(None, {"x": image}), images))
    for a, b in zip(found, wanted, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(one, other)


@needs_kernels
def test_an_empty_batch():
    graph, outputs = network(np.random.default_rng(1), 8, ["N", 8, 5, 6])
    for session in both_forms(graph, outputs, 2):
        found = session.run(None, {"x": np.zeros((0, 8, 5, 6), np.uint8)})
        assert [each.shape[0] for each in found] == [0, 0]


@needs_kernels
def test_shapes_are_inferred_through_a_region():
    graph, outputs = network(np.random.default_rng(1), 8, [2, 8, 5, 6])
    alone, whole = both_forms(graph, outputs, 1)
    for session in (alone, whole):
        assert [each.shape for each in session.get_outputs()] == [[2, 2, 7, 8, 4], [2, 9, 6, 5]]


@needs_kernels
def test_a_copy_of_a_file_with_its_operators_one_by_one(tmp_path):
    graph, outputs = network(np.random.default_rng(1), 8, [1, 8, 5, 6])
    model = onnx.ModelProto.FromString(graph.model(dict.fromkeys(outputs, UINT8)))
    file = tmp_path / "network.onnx"
    onnx.save(model, file)
    folder = tmp_path / "parted"
    folder.mkdir()
    assert separated_copy(file, folder) is None
    onnx.save(joined(model), file)
    copy = separated_copy(file, folder)
    assert copy == folder / "network.onnx"
    kinds = sorted(node.op_type for node in model.graph.node)
    assert sorted(node.op_type for node in onnx.load(copy).graph.node) == kinds


def small_region() -> onnx.ModelProto:
    """One region of three operators."""
    graph = Graph()
    graph.input("x", np.zeros((1, 4, 5, 5), np.uint8))
    x = graph.sparse("ToBlocks", ["x"], border=1, zero_point=3)
    a = convolution(graph, x, block_sparse(np.random.default_rng(0), 4, 4, 3, 3, 0.5), 1)
    out = graph.sparse("FromBlocks", [a], channels=4, input_border=1)
    return joined(onnx.ModelProto.FromString(graph.model({out: UINT8})))


@pytest.mark.parametrize("names", [True, False])
def test_what_is_handed_on_may_have_no_names(names):
    region = small_region()
    for item in region.graph.node[0].attribute:
        if item.name.startswith("output_") and not names:
            item.name = f"unknown{item.name}"
    parted = separated(region).graph.node
    made = [node.output[0] for node in parted]
    assert made[-1] == region.graph.output[0].name
    assert len(set(made)) == 3
    assert [node.input[0] for node in parted] == ["x", *made[:-1]]


# What is refused.


def spoilt(change) -> str:
    """The message for a region whose node was changed."""
    model = small_region()
    (region,) = model.graph.node
    change(region)
    with pytest.raises(Exception, match=r"Region '\w*': ") as caught:
        session_of(model, 1).run(None, {"x": np.zeros((1, 4, 5, 5), np.uint8)})
    return str(caught.value)


def setting(**values):
    def change(region):
        for name, value in values.items():
            kept = [item for item in region.attribute if item.name != name]
            del region.attribute[:]
            region.attribute.extend(kept)
            if value is not None:
                region.attribute.append(helper.make_attribute(name, value))

    return change


@needs_kernels
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"operators": None}, "'operators' is missing"),
        ({"operators": 0}, "'operators' is 0, expected 1 to 4096"),
        ({"operators": 5000}, "'operators' is 5000"),
        ({"operators": 4}, "'operator' is missing"),
        ({"operators": 2}, "'results' is 2, expected 0 to 1"),
        ({"operator_1": "Softmax"}, "'operator_1' is 'Softmax', expected an operator whose"),
        ({"operator_2": "DequantizeFromBlocks"}, "'operator_2' is 'DequantizeFromBlocks', exp"),
        ({"operator_1": 3}, "'operator' has another type, expected a string"),
        ({"name_1": None}, "'name' is missing"),
        ({"inputs_0": None}, "'inputs' is missing"),
        ({"inputs_0": [0, 0]}, "'inputs_0' has 2 values, expected 1 to 1 for ToBlocks"),
        ({"inputs_1": [4]}, "'inputs_1' has 1 values, expected 4 to 6 for SparseConvolution"),
        ({"inputs_0": [4]}, "'inputs' is 4, expected -1 to 3"),  # its own result
        ({"inputs_0": [-2]}, "'inputs' is -2"),
        ({"inputs_2": [-1]}, "FromBlocks 'FromBlocks_2': input 0 'x' is missing"),
        ({"inputs_1": [4, 4, 2, 3]}, "_1': input 1 'values' is missing or computed"),
        ({"inputs_1": [4, 2, 1, 3]}, "_1': input '(values|mask)' has element type"),
        ({"inputs_1": [1, 1, 2, 3]}, "_1': input 'x' has element type 3, expected 2"),
        ({"results": None}, "'results' is missing"),
        ({"results": [2, 2]}, "'results' names operator 2 twice"),
        ({"results": [1, 2]}, "'results' has 2 values, and there are 1 outputs"),
        ({"results": [3]}, "'results' is 3, expected 0 to 2"),
        ({"channels_1": 9}, r"SparseConvolution 'SparseConvolution_1': input 'mask' has shape"),
        ({"channels_2": 9}, r"FromBlocks 'FromBlocks_2': input 'x' has shape \[1, 1, 7, 7, 4\]"),
    ],
    ids=str,
)  # fmt: skip
def test_a_region_that_makes_no_sense(values, message):
    assert re.search(message, spoilt(setting(**values)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"operators": None}, "'region_0' is no region as they are specified .*operators"),
        ({"results": None}, "no region as they are specified .*results"),
        ({"inputs_1": None}, "no region as they are specified .*inputs_1"),
        ({"inputs_1": [40]}, "no region as they are specified .*range.*: export the file again"),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_whose_region_makes_no_sense(values, message, tmp_path):
    model = small_region()
    setting(**values)(model.graph.node[0])
    onnx.save(model, tmp_path / "spoilt.onnx")
    with pytest.raises(ArtifactError, match=message):
        read_onnx_graph(tmp_path / "spoilt.onnx")
