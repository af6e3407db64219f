"""Operators of our sparse library that run as one node of a file, and what they are one by one.

A host takes a microsecond to come to a node, and another to call its threads; a small network's
layers run for some microseconds. So neighbours among our operators become a Region, which
OPERATORS.md specifies: the host comes to it once, and its threads stay until it is done.

    model --joined--> with regions --separated--> the same nodes as before
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from obc_deploy.errors import ArtifactError
from obc_deploy.runtimes.sparse import DOMAIN, DOMAIN_VERSION

if TYPE_CHECKING:
    import onnx

REGION = "Region"
"""The operator."""
JOINED = frozenset(
    {
        "ToBlocks",
        "QuantizeToBlocks",
        "FromBlocks",
        "SparseConvolution",
        "DepthwiseConvolution",
        "SparseLinear",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "Add",
        "Concat",
    }
)
"""Those of our operators that a region takes: their outputs are codes."""
MOST_OPERATORS = 4096
"""Of one region."""
_OWN = frozenset({"operator", "inputs", "name", "output"})
"""What a region says of each of its operators beside the operator's own attributes."""
_MISSING = -1


def _is_joined(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in JOINED


def _reads(node: onnx.NodeProto) -> set[str]:
    """Values that a node reads, or a graph within it."""
    found = set(node.input)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            for inner in graph.node:
                found |= _reads(inner)
            found.update(output.name for output in graph.output)
    return found - {""}


def _levels(nodes: Sequence[onnx.NodeProto], reads: Sequence[set[str]]) -> list[int]:
    """How many times a path to each node leaves our operators.

    Those of the same level can be one node: whatever lies between two of them is of this level too.
    """
    makers: dict[str, int] = {}
    levels: list[int] = []
    for index, node in enumerate(nodes):
        level = 0
        for value in reads[index]:
            if value in makers:
                maker = makers[value]
                left = _is_joined(nodes[maker]) and not _is_joined(node)
                level = max(level, levels[maker] + left)
        levels.append(level)
        makers.update((value, index) for value in node.output if value)
    return levels


def _region(members: Sequence[onnx.NodeProto], kept: Sequence[str], name: str) -> onnx.NodeProto:
    """One node for several.

    Args:
        members: in an order in which they can run.
        kept: values of theirs that others read.
        name: of the node.
    """
    from onnx import helper

    made = {node.output[0]: place for place, node in enumerate(members)}
    read = dict.fromkeys(value for node in members for value in node.input if value)
    outside = [value for value in read if value not in made]
    places = {value: place for place, value in enumerate(outside)}
    places |= {value: len(outside) + place for value, place in made.items()}
    outputs = [value for value in made if value in kept]
    region = helper.make_node(
        REGION, outside, outputs, name=name, domain=DOMAIN, operators=len(members),
        results=[made[value] for value in outputs],
    )  # fmt: skip
    for number, node in enumerate(members):
        own = {
            "operator": node.op_type,
            "name": node.name or node.output[0],
            "output": node.output[0],
            "inputs": [places.get(value, _MISSING) for value in node.input],
        }
        region.attribute.extend(
            helper.make_attribute(f"{key}_{number}", value) for key, value in own.items()
        )
        for attribute in node.attribute:
            added = region.attribute.add()
            added.CopyFrom(attribute)
            added.name = f"{attribute.name}_{number}"
    return region


def _groups(nodes: Sequence[onnx.NodeProto], reads: Sequence[set[str]]) -> list[list[int]]:
    """Places of the nodes that become one each; the others are alone."""
    levels = _levels(nodes, reads)
    groups: list[list[int]] = []
    by_level: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        if not _is_joined(node):
            groups.append([index])
            continue
        open_group = by_level.get(levels[index])
        if open_group is None or len(open_group) == MOST_OPERATORS:
            open_group = by_level[levels[index]] = []
            groups.append(open_group)
        open_group.append(index)
    return groups


def _sorted(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """In an order in which they can run, near to the one that they have."""
    makers = {value: index for index, node in enumerate(nodes) for value in node.output if value}
    readers: dict[int, set[int]] = {}
    waits = []
    for index, node in enumerate(nodes):
        sources = {makers[value] for value in _reads(node) if value in makers}
        waits.append(len(sources))
        for source in sources:
            readers.setdefault(source, set()).add(index)
    ready = [index for index, count in enumerate(waits) if not count]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(nodes[index])
        for reader in readers.get(index, ()):
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, reader)
    return order


def joined(model: onnx.ModelProto, *, fewest: int = 2) -> onnx.ModelProto:
    """The same model, in which neighbours among our operators are one node.

    Args:
        model: nodes in an order in which they can run; not changed.
        fewest: operators that become a region.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    nodes = list(graph.node)
    reads = [_reads(node) for node in nodes]
    taken = {node.name for node in nodes}
    names = (name for i in range(len(nodes) + len(taken)) if (name := f"region_{i}") not in taken)
    ends = {output.name for output in graph.output}
    written: list[onnx.NodeProto] = []
    inner: set[str] = set()
    for group in _groups(nodes, reads):
        if len(group) < fewest or not _is_joined(nodes[group[0]]):
            written.extend(nodes[i] for i in group)
            continue
        within = set(group)
        read = ends.union(*(reads[i] for i in range(len(nodes)) if i not in within))
        region = _region([nodes[i] for i in group], [*read], next(names))
        inner.update(nodes[i].output[0] for i in group if nodes[i].output[0] not in read)
        written.append(region)
    if not any(map(_is_region, written)):
        return result
    written = _sorted(written)
    described = [value for value in graph.value_info if value.name not in inner]
    _replace(graph.node, written)
    _replace(graph.value_info, described)
    for version in result.opset_import:
        if version.domain == DOMAIN:
            version.version = DOMAIN_VERSION
    return result


def _replace(field: object, items: Iterable[object]) -> None:
    """Give a repeated field other messages, some of which may be its own."""
    import copy

    kept = [copy.deepcopy(item) for item in items]
    del field[:]  # type: ignore[attr-defined]
    field.extend(kept)  # type: ignore[attr-defined]


def _is_region(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == REGION


def has_regions(model: onnx.ModelProto) -> bool:
    """Whether several of our operators are one node somewhere."""
    return any(_is_region(node) for node in model.graph.node)


def _members(region: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes that a region was made of."""
    from onnx import AttributeProto, helper

    attributes = {item.name: item for item in region.attribute}
    count = attributes["operators"].i
    results = list(attributes["results"].ints)
    own: dict[str, list[AttributeProto]] = {str(number): [] for number in range(count)}
    for item in region.attribute:
        name, _, number = item.name.rpartition("_")
        if number in own and name not in _OWN:
            copy = AttributeProto()
            copy.CopyFrom(item)
            copy.name = name
            own[number].append(copy)

    def text(name: str, number: int) -> str:
        found: str = attributes[f"{name}_{number}"].s.decode()
        return found

    values = list(region.input)
    members: list[onnx.NodeProto] = []
    for number in range(count):
        places = attributes[f"inputs_{number}"].ints
        inputs = ["" if place == _MISSING else values[place] for place in places]
        if number in results:
            output = region.output[results.index(number)]
        elif f"output_{number}" in attributes:
            output = text("output", number)
        else:
            output = f"{region.output[0]}_{number}"
        node = helper.make_node(
            text("operator", number), inputs, [output], name=text("name", number), domain=DOMAIN
        )
        node.attribute.extend(own[str(number)])
        values.append(output)
        members.append(node)
    return members


def _separated(region: onnx.NodeProto) -> list[onnx.NodeProto]:
    """`_members` of a region that may be malformed."""
    try:
        return _members(region)
    except (KeyError, IndexError) as error:
        raise ArtifactError(
            f"node '{region.name}' is no region as they are specified ({error}): "
            "export the file again"
        ) from error


def separated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with each region's operators in its place.

    Args:
        model: not changed; itself where it has no regions.

    Raises:
        ArtifactError: a region is not what OPERATORS.md says.
    """
    import onnx

    if not has_regions(model):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.extend(_separated(node) if _is_region(node) else [node])
    _replace(result.graph.node, nodes)
    return result


def regions_of(path: Path) -> dict[str, str]:
    """Which region computes a value: its name, by the value's name once regions are taken apart.

    Args:
        path: an ONNX file.

    Raises:
        ArtifactError: a region is not what OPERATORS.md says.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    return {
        member.output[0]: node.name
        for node in model.graph.node
        if _is_region(node)
        for member in _separated(node)
    }


def separated_copy(path: Path, folder: Path) -> Path | None:
    """Write a file's model with its regions' operators one by one.

    Args:
        path: an ONNX file.
        folder: where the copy goes.

    Returns:
        The copy; None, and no copy, where the file has no regions.

    Raises:
        ArtifactError: a region is not what OPERATORS.md says.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    if not has_regions(model):
        return None
    copy = folder / path.name
    onnx.save(separated(onnx.load(path)), copy)
    return copy
