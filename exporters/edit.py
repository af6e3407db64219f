"""Editing an ONNX graph: the few verbs that the passes share, over onnx-ir."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array behind an initializer, or None where the value is computed."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """The integers behind a small constant, or None."""
    array = constant(value)
    return None if array is None else [int(item) for item in array.reshape(-1)]


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, if it is of one of the types."""
    if value is None:
        return None
    node = value.producer()
    return node if node is not None and node.op_type in op_types else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, or None where there are several or it is a graph output."""
    users = {id(use.node): use.node for use in value.uses()}
    if len(users) != 1 or value.is_graph_output():
        return None
    return next(iter(users.values()))


def add_initializer(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new constant of the graph; an equal name with equal content is used again."""
    known = model.graph.initializers.get(name)
    if known is not None:
        found = constant(known)
        if found is not None and found.dtype == array.dtype and np.array_equal(found, array):
            return known
        name = f"{name}_{len(model.graph.initializers)}"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.initializers[name] = value
    return value


def insert_before(
    model: ir.Model,
    anchor: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    name: str | None = None,
) -> ir.Value:
    """A new node before another; returns its output value."""
    node = ir.node(op_type, inputs, dict(attributes or {}), domain=domain)
    base = name or f"{anchor.outputs[0].name}_{op_type.lower()}"
    node.name = base
    node.outputs[0].name = base
    model.graph.insert_before(anchor, node)
    if domain:
        model.graph.opset_imports.setdefault(domain, 1)
    return node.outputs[0]


def replace_node(
    model: ir.Model,
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
) -> ir.Node:
    """Put another operator in a node's place, with its output's name, type and users."""
    old = node.outputs[0]
    fresh = ir.node(op_type, inputs, dict(attributes or {}), domain=domain)
    fresh.name = node.name
    value = fresh.outputs[0]
    value.shape, value.type = old.shape, old.type
    model.graph.insert_before(node, fresh)
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    value.name = old.name
    model.graph.remove(node, safe=True)
    if domain:
        model.graph.opset_imports.setdefault(domain, 1)
    return fresh


def drop_dead(model: ir.Model) -> None:
    """Remove nodes and constants that nothing reads."""
    for node in reversed(list(model.graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
