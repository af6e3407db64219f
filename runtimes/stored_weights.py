"""The weights that an ONNX file stores for its layers, as numbers whose zeros are the real zeros.

    Conv, ConvTranspose    (outputs, groups, kernel positions, inputs of the group)
    Gemm, MatMul           (outputs, 1, 1, inputs), transposed or not, on either side

Behind DequantizeLinear the numbers are codes less their zero point, behind QuantizeLinear the codes
that it will give: what a runtime multiplies is zero where these are, whatever the scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from obc_deploy.errors import ArtifactError
from obc_deploy.runtimes.onnx_graph import read_onnx_graph
from obc_deploy.runtimes.regions import separated

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = frozenset({"Gemm", "MatMul"})
_MOVING = frozenset({"Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_ELEMENTWISE = frozenset({"Add", "Clip", "HardSigmoid", "Identity", "LeakyRelu", "Mul", "Relu"})
"""What may stand between a layer and the QuantizeLinear of its output."""


@dataclass(frozen=True)
class StoredWeight:
    """One layer's constant weight.

    Attributes:
        layer: name of the ONNX node, of its first output where it has none.
        output: the value that the node computes.
        operator: Conv, ConvTranspose, Gemm or MatMul.
        initializer: the constant that is stored.
        storage: its element type, as in "float16", "int8", "int4", "float8e4m3fn".
        values: (outputs, groups, positions, inputs): zero exactly where the weight is; None where
            the weight is computed from constants by an operator that is not followed.
        obstacle: that operator, in words; None elsewhere.
        quantized_input: the layer's other operand comes from DequantizeLinear.
        quantized_output: a QuantizeLinear follows, with only element-wise operators between.
    """

    layer: str
    output: str
    operator: str
    initializer: str
    storage: str
    values: Array | None
    obstacle: str | None
    quantized_input: bool
    quantized_output: bool


class _Unfollowed(Exception):
    pass


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    for item in node.attribute:
        if item.name == name:
            return helper.get_attribute_value(item)
    return default


def _along(part: Array, axis: int, block: int, shape: tuple[int, ...]) -> Array:
    """A scale or zero point spread over the values that share it."""
    if part.ndim == 0 or part.size == 1:
        return part.reshape(())
    axis %= len(shape)
    if block:
        return part.repeat(block, axis).take(range(shape[axis]), axis)
    return part.reshape([-1 if place == axis else 1 for place in range(len(shape))])


class _File:
    def __init__(self, path: Path) -> None:
        import onnx

        read_onnx_graph(path)
        try:
            self.graph = separated(onnx.load(path)).graph
        except Exception as error:
            raise ArtifactError(
                f"the weights of '{path}' cannot be read ({' '.join(str(error).split())[:160]}); "
                "put its external data beside it, or export it again"
            ) from error
        self.stored: Mapping[str, onnx.TensorProto] = {
            tensor.name: tensor for tensor in self.graph.initializer
        }
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.constant = set(self.stored)
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            if all(name in self.constant for name in node.input if name) and (
                node.input or node.op_type == "Constant"
            ):
                self.constant.update(node.output)

    def root(self, name: str) -> str | None:
        """The stored constant that a value is made of, or None where it depends on the inputs."""
        while name in self.constant and name not in self.stored:
            maker = self.makers[name]
            if not maker.input:
                return name
            name = maker.input[0]
        return name if name in self.constant else None

    def tensor(self, name: str) -> onnx.TensorProto | None:
        if name in self.stored:
            return self.stored[name]
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "Constant":
            return None
        value = _attribute(maker, "value", None)
        if value is None:
            raise _Unfollowed("a Constant that is no tensor")
        found: onnx.TensorProto = value
        return found

    def array(self, name: str) -> Array:
        """A constant's numbers, less their zero point where it is quantized."""
        from onnx import helper, numpy_helper

        tensor = self.tensor(name)
        if tensor is not None:
            return np.asarray(numpy_helper.to_array(tensor))
        node = self.makers[name]
        if node.domain not in ("", "ai.onnx"):
            raise _Unfollowed(f"{node.domain}::{node.op_type}")
        if node.op_type == "DequantizeLinear":
            return self._codes(node)
        if node.op_type not in _MOVING:
            raise _Unfollowed(node.op_type)
        array = self.array(node.input[0])
        if node.op_type == "Transpose":
            return array.transpose(_attribute(node, "perm", None))
        if node.op_type == "Cast":
            # Codes are small: no float type that they are cast to makes a zero of one.
            return array.astype(helper.tensor_dtype_to_np_dtype(_attribute(node, "to", 1)))
        if node.op_type == "Identity":
            return array
        return self._reshaped(node, array)

    def _reshaped(self, node: onnx.NodeProto, array: Array) -> Array:
        if node.op_type == "Flatten":
            axis = _attribute(node, "axis", 1)
            return array.reshape(math.prod(array.shape[:axis]), -1)
        if len(node.input) < 2:
            return np.squeeze(array)
        wanted = [int(size) for size in self.array(node.input[1]).reshape(-1)]
        if node.op_type == "Reshape":
            return array.reshape(
                [array.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
            )
        if node.op_type == "Squeeze":
            return np.squeeze(array, tuple(wanted))
        return np.expand_dims(array, tuple(wanted))

    def _codes(self, node: onnx.NodeProto) -> Array:
        source = self.makers.get(node.input[0])
        axis, block = _attribute(node, "axis", 1), _attribute(node, "block_size", 0)
        if source is not None and source.op_type == "QuantizeLinear":
            codes = self._quantized(source)
        else:
            codes = self.array(node.input[0])
        # All codes are exact in float32, whose differences do not wrap.
        wide = codes.astype(np.float32)
        if len(node.input) > 2 and node.input[2]:
            zero = self.array(node.input[2])
            wide = wide - _along(zero.astype(wide.dtype), axis, block, wide.shape)
        return wide

    def _quantized(self, node: onnx.NodeProto) -> Array:
        """The codes that QuantizeLinear makes of a constant."""
        from onnx import helper

        values, scale = self.array(node.input[0]), self.array(node.input[1])
        axis, block = _attribute(node, "axis", 1), _attribute(node, "block_size", 0)
        scale = _along(scale.astype(np.float32), axis, block, values.shape)
        steps = values.astype(np.float32) / scale
        zero = self.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        kind = _attribute(node, "output_dtype", 0)
        if zero is None:
            dtype = helper.tensor_dtype_to_np_dtype(kind) if kind else np.dtype(np.uint8)
            zero = np.zeros((), dtype)
        if "float8" in zero.dtype.name:
            return np.asarray(steps.astype(zero.dtype))
        bounds = ml_dtypes.iinfo(zero.dtype)  # type: ignore[no-untyped-call]
        shift = _along(zero.astype(np.float32), axis, block, values.shape)
        return np.clip(np.round(steps) + shift, bounds.min, bounds.max)

    def follows_quantizer(self, name: str) -> bool:
        """Whether a QuantizeLinear reads a value, or what element-wise operators make of it."""
        for _ in range(8):
            readers = self.readers.get(name, [])
            if any(reader.op_type == "QuantizeLinear" for reader in readers):
                return True
            if len(readers) != 1 or readers[0].op_type not in _ELEMENTWISE:
                return False
            name = readers[0].output[0]
        return False

    def dequantized(self, name: str) -> bool:
        """Whether a value comes from DequantizeLinear, moved about at most."""
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in _MOVING:
            maker = self.makers.get(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"


def _as_problem(node: onnx.NodeProto, weight: Array, left: bool) -> Array:
    """A weight as (outputs, groups, positions, inputs)."""
    groups = int(_attribute(node, "group", 1))
    if node.op_type == "Conv":
        # Each output channel reads one group only: the groups lie one behind another.
        outputs, inputs, *kernel = weight.shape
        flat = weight.reshape(groups, outputs // groups, inputs, math.prod(kernel))
        return np.moveaxis(flat, (0, 1, 2, 3), (1, 0, 3, 2))
    if node.op_type == "ConvTranspose":
        inputs, outputs, *kernel = weight.shape
        flat = weight.reshape(groups, inputs // groups, outputs, math.prod(kernel))
        return np.moveaxis(flat, (0, 1, 2, 3), (1, 3, 0, 2))
    if node.op_type == "Gemm":
        turned = bool(_attribute(node, "transA" if left else "transB", 0))
        weight = weight.T if turned else weight
    if weight.ndim == 1:
        return weight.reshape(1, 1, 1, -1)
    if not left:
        weight = np.swapaxes(weight, -1, -2)
    return weight.reshape(-1, 1, 1, weight.shape[-1])


def stored_weights(path: Path) -> tuple[StoredWeight, ...]:
    """The constant weights of a file's Conv, ConvTranspose, Gemm and MatMul, in the file's order.

    Raises:
        ArtifactError: there is no such file, or it is damaged.
    """
    file = _File(path)
    found = []
    for node in file.graph.node:
        if node.op_type not in CONVOLUTIONS | PRODUCTS or node.domain not in ("", "ai.onnx"):
            continue
        places = (1,) if node.op_type in CONVOLUTIONS else (1, 0)
        place = next((p for p in places if file.root(node.input[p]) is not None), None)
        if place is None or all(file.root(name) is not None for name in node.input[:2]):
            continue
        found.append(_stored(path, file, node, place))
    return tuple(found)


def _stored(path: Path, file: _File, node: onnx.NodeProto, place: int) -> StoredWeight:
    from onnx import TensorProto

    name = node.input[place]
    root = file.root(name)
    assert root is not None
    values, obstacle, storage = None, None, "unknown"
    try:
        tensor = file.tensor(root)
        if tensor is not None:
            storage = TensorProto.DataType.Name(tensor.data_type).lower()
        values = _as_problem(node, file.array(name), left=place == 0)
    except _Unfollowed as error:
        obstacle = f"its weight is computed by {error}, which is not followed"
    except Exception as error:
        raise ArtifactError(
            f"the weight '{root}' of '{node.name or node.output[0]}' in '{path}' is damaged "
            f"({' '.join(str(error).split())[:160]}); export the file again"
        ) from error
    return StoredWeight(
        layer=node.name or node.output[0],
        output=node.output[0],
        operator=node.op_type,
        initializer=root,
        storage="float32" if storage == "float" else storage,
        values=values,
        obstacle=obstacle,
        quantized_input=file.dequantized(node.input[1 - place]),
        quantized_output=file.follows_quantizer(node.output[0]),
    )
