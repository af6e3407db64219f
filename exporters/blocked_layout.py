"""Pass: part of an integer graph moves onto blocked tensors, where that is cheapest.

Each operator that has a blocked form gets it or not, so that the measured costs of all operators
and of the conversions between the forms are least. Then the blocked ones are written as operators
of our domain, with conversions where a value passes from one form to the other, borders as wide as
the widest padding among a value's readers, margins where a reader gains by them, and residual
additions inside their convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir

from obc_deploy.exporters.blocked_forms import BlockedForm, blocked_forms, plane_of
from obc_deploy.exporters.cheapest_forms import Choice, Passing, cheapest_forms
from obc_deploy.exporters.edit import add_initializer, constant, drop_dead, insert_before
from obc_deploy.exporters.frames import Frame
from obc_deploy.exporters.sparse_cost import nanoseconds, residual_ns
from obc_deploy.runtimes.sparse import DOMAIN, DOMAIN_VERSION

BLOCKED_SUFFIX = "_blocked"
"""A blocked value is named after the plain one."""
_RESIDUAL = 5
"""Place of a sparse convolution's input of that name."""
_CHANNELS_LAST = frozenset(
    {"QLinearConv", "MaxPool", "QLinearAveragePool", "QLinearGlobalAveragePool"}
)
"""What ONNX Runtime computes channels last, behind a Transpose."""


@dataclass(frozen=True)
class BlockedLayout:
    """What the pass made.

    Attributes:
        convolutions: sparse convolutions of layers, in order: output and fraction of blocks that
            are not stored.
        conversions: ToBlocks, FromBlocks and those that quantize on the way.
        views: nodes that are not in the graph: each computes the plain codes of a blocked value,
            under the name that they have in the plain graph.
    """

    convolutions: tuple[tuple[str, float], ...] = ()
    conversions: int = 0
    views: tuple[onnx.NodeProto, ...] = ()


@dataclass
class _Passed:
    """One value: the forms that make and read it."""

    value: ir.Value
    maker: BlockedForm | None = None
    readers: list[BlockedForm] = field(default_factory=list)
    read_plainly: bool = False


def _passed(forms: Sequence[BlockedForm]) -> dict[int, _Passed]:
    covering = {id(node) for form in forms for node in form.covered}
    found: dict[int, _Passed] = {}
    for form in forms:
        if form.makes_blocks:
            found.setdefault(id(form.output), _Passed(form.output)).maker = form
        if form.reads_blocks:
            for value in dict.fromkeys(form.data):
                found.setdefault(id(value), _Passed(value)).readers.append(form)
    for passed in found.values():
        value = passed.value
        passed.read_plainly = value.is_graph_output() or any(
            id(use.node) not in covering for use in value.uses()
        )
    return found


def _slower_ns(form: BlockedForm, values: Mapping[int, _Passed]) -> float:
    """What a blocked input costs a plain form, and plain ones behind it that it hands on to."""
    found = form.plain_after_blocks_ns
    if form.operator in {"Add", "Concat", "MaxPool"} and id(form.output) in values:
        found += sum(each.plain_after_blocks_ns for each in values[id(form.output)].readers)
    return found


def _conversion_ns(passed: _Passed, values: Mapping[int, _Passed]) -> tuple[float, float]:
    """(to blocks, from blocks), with what a neighbour takes longer that wants channels last."""
    plane = plane_of(passed.value)
    if plane is None:
        return 0.0, 0.0
    work = plane.work()
    turn = nanoseconds("Transpose", work)
    maker = passed.value.producer()
    turned = maker is not None and maker.op_type in _CHANNELS_LAST
    read_turned = any(use.node.op_type in _CHANNELS_LAST for use in passed.value.uses())
    return (
        nanoseconds("ToBlocks", work) + turn * turned,
        nanoseconds("FromBlocks", work)
        + turn * read_turned
        + sum(_slower_ns(form, values) for form in passed.readers),
    )


def _fusions(forms: Sequence[BlockedForm], values: Mapping[int, _Passed]) -> dict[int, int]:
    """For an addition the operand whose convolution it can be part of, by the form's identity."""
    found = {}
    taken = set()
    for form in forms:
        if form.operator != "Add" or form.data[0] is form.data[1]:
            continue
        candidates = []
        for place, value in enumerate(form.data):
            passed = values[id(value)]
            maker = passed.maker
            if maker is None or maker.operator != "SparseConvolution" or id(maker) in taken:
                continue
            alone = passed.readers == [form] and not passed.read_plainly
            if alone and "lower" not in maker.attributes:
                candidates.append((maker.stored is None, -maker.blocked_ns, place, maker))
        if candidates:
            _, _, place, maker = min(candidates, key=lambda each: each[:3])
            found[id(form)] = place
            taken.add(id(maker))
    return found


def _blocked_ns(form: BlockedForm, *, fused: bool) -> float:
    return residual_ns(form.plane.channels * form.plane.pixels) if fused else form.blocked_ns


def _choose(
    forms: Sequence[BlockedForm], values: Mapping[int, _Passed], fusions: Mapping[int, int]
) -> list[bool]:
    places = {id(form): place for place, form in enumerate(forms)}
    choices = [
        Choice(form.plain_ns, _blocked_ns(form, fused=id(form) in fusions)) for form in forms
    ]
    passing = []
    for passed in values.values():
        readers: list[int | None] = [places[id(form)] for form in passed.readers]
        if passed.read_plainly:
            readers.append(None)
        to_blocks, from_blocks = _conversion_ns(passed, values)
        maker = None if passed.maker is None else places[id(passed.maker)]
        passing.append(Passing(maker, tuple(readers), to_blocks, from_blocks))
    return cheapest_forms(choices, passing)


class _Writer:
    """Writes the chosen forms into the graph."""

    def __init__(
        self, model: ir.Model, chosen: Sequence[BlockedForm], values: Mapping[int, _Passed]
    ) -> None:
        self._model = model
        self._values = values
        self._chosen = {id(form) for form in chosen}
        self._blocked: dict[int, ir.Value] = {}
        self._frames: dict[int, Frame] = {}
        self.conversions = 0
        self.views: list[onnx.NodeProto] = []

    def frame(self, value: ir.Value) -> Frame:
        """A border as wide as the widest padding among the blocked readers, else their margin."""
        known = self._frames.get(id(value))
        if known is None:
            passed = self._values.get(id(value))
            readers = [] if passed is None else passed.readers
            readers = [form for form in readers if id(form) in self._chosen]
            border = max((form.padding for form in readers), default=0)
            plane = plane_of(value)
            known = Frame(border) if plane is None else Frame.around(
                plane.height, plane.width, border=border,
                gains_by_margin=any(form.gains_by_margin for form in readers),
            )  # fmt: skip
            self._frames[id(value)] = known
        return known

    def _insert(
        self, anchor: ir.Node, operator: str, inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any], name: str,
    ) -> ir.Value:  # fmt: skip
        value = insert_before(self._model, anchor, operator, inputs, attributes, domain=DOMAIN,
                              name=name)  # fmt: skip
        self._model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        value.type = ir.TensorType(ir.DataType.UINT8)
        return value

    def _read(self, form: BlockedForm, place: int, anchor: ir.Node) -> ir.Value:
        """The blocked tensor of one of a form's data; converted here where it is plain."""
        value = form.data[place]
        if not form.reads_blocks:
            return value
        known = self._blocked.get(id(value))
        if known is None:
            attributes = {
                "zero_point": form.zero_points[place], **self.frame(value).attributes()
            }  # fmt: skip
            known = self._insert(
                anchor, "ToBlocks", [value], attributes, f"{value.name}{BLOCKED_SUFFIX}"
            )
            self._blocked[id(value)] = known
            self.conversions += 1
        return known

    def _constants(self, form: BlockedForm, layer: str) -> list[ir.Value | None]:
        values: list[ir.Value | None] = [
            None if array is None else add_initializer(self._model, f"{layer}_{name}", array)
            for name, array in form.constants.items()
        ]
        while values and values[-1] is None:
            values.pop()
        return values

    def write(self, form: BlockedForm, fused: tuple[BlockedForm, int] | None) -> None:
        """One form.

        Args:
            form: what to write.
            fused: a convolution that the form, an addition, is written as part of, and the place of
                the convolution's result among the addition's operands.
        """
        anchor, main = form.node, form if fused is None else fused[0]
        attributes = dict(main.attributes)
        if main.operator in {"Add", "Concat"}:
            frames = [self.frame(value) for value in main.data]
            attributes["input_borders"] = [frame.border for frame in frames]
            if any(frame.margin for frame in frames):
                attributes["input_margins"] = [frame.margin for frame in frames]
        elif main.reads_blocks:
            attributes |= self.frame(main.data[0]).attributes("input_")
        inputs: list[ir.Value | None] = [
            self._read(main, place, anchor) for place in range(len(main.data))
        ]
        inputs += self._constants(main, _layer_name(main))
        if fused is not None:
            place = 1 - fused[1]
            residual = form.data[place]
            inputs += [None] * (_RESIDUAL - len(inputs))
            inputs.append(self._read(form, place, anchor))
            for name in ("scale", "zero_point"):
                attributes[f"convolution_{name}"] = attributes[f"output_{name}"]
                attributes[f"residual_{name}"] = form.attributes[f"input_{name}s"][place]
            attributes |= self.frame(residual).attributes("residual_")
            attributes |= {
                name: form.attributes[name]
                for name in ("output_scale", "output_zero_point", "lower", "upper")
                if name in form.attributes
            }
        value = form.output
        if not form.makes_blocks:
            made = self._insert(anchor, main.operator, inputs, attributes, f"{value.name}_values")
            made.shape, made.type = value.shape, value.type
            self._replace(value, made, anchor)
            self.conversions += 1
            return
        self.conversions += main.operator == "QuantizeToBlocks"
        frame = self.frame(value)
        attributes |= frame.attributes()
        made = self._insert(
            anchor, main.operator, inputs, attributes, f"{value.name}{BLOCKED_SUFFIX}"
        )
        node = made.producer()
        assert node is not None
        node.name = main.node.name or node.name
        self._blocked[id(value)] = made
        back: dict[str, Any] = {"channels": form.plane.channels, **frame.attributes("input_")}
        passed = self._values.get(id(value))
        if passed is None or (not passed.read_plainly and all(
            id(reader) in self._chosen for reader in passed.readers
        )):  # fmt: skip
            self.views.append(
                onnx.helper.make_node(
                    "FromBlocks", [made.name or ""], [value.name or ""], domain=DOMAIN, **back
                )
            )
            return
        plain = self._insert(anchor, "FromBlocks", [made], back, f"{value.name}_plain")
        plain.shape, plain.type = value.shape, value.type
        self._replace(value, plain, anchor)
        self.conversions += 1

    def _replace(self, old: ir.Value, new: ir.Value, anchor: ir.Node) -> None:
        """Let plain readers read another value, which takes over the name."""
        name = old.name
        old.name = f"{name}_before"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name = name
        # What was chosen before still knows the old value by its identity.
        if id(old) in self._blocked:
            self._blocked[id(new)] = self._blocked[id(old)]


def _layer_name(form: BlockedForm) -> str:
    """What a form's constants are named after: its weights, else its output."""
    if form.stored is not None or form.operator == "DepthwiseConvolution":
        inner = next(node for node in form.covered if node.op_type == "QLinearConv")
        weight = inner.inputs[3]
        if weight is not None and weight.name and constant(weight) is not None:
            return weight.name
    return form.output.name or form.operator


def to_blocked_layout(model: ir.Model) -> BlockedLayout:
    """Rewrite what is cheaper on blocked tensors; nothing where no convolution is.

    Args:
        model: an integer graph with sizes on its values, changed in place.
    """
    forms = blocked_forms(model)
    values = _passed(forms)
    fusions = _fusions(forms, values)
    blocked = _choose(forms, values, fusions)
    chosen = [form for form, is_blocked in zip(forms, blocked, strict=True) if is_blocked]
    if not any(form.stored is not None for form in chosen):
        return BlockedLayout()
    picked = {id(form) for form in chosen}
    inside: dict[int, tuple[BlockedForm, int]] = {}
    for form in chosen:
        if id(form) in fusions:
            place = fusions[id(form)]
            maker = values[id(form.data[place])].maker
            if maker is not None and id(maker) in picked:
                inside[id(form)] = maker, place
    within = {id(maker) for maker, _ in inside.values()}
    writer = _Writer(model, chosen, values)
    convolutions = []
    for form in chosen:
        if id(form) in within:
            continue
        fused = inside.get(id(form))
        writer.write(form, fused)
        main = form if fused is None else fused[0]
        if main.stored is not None:
            convolutions.append((form.output.name or "", main.stored.zeros))
    drop_dead(model)
    return BlockedLayout(tuple(convolutions), writer.conversions, tuple(writer.views))
