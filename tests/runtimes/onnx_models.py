from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obc_deploy.runtimes import deepsparse

CHANNELS = 16
SIZE = 8


_INFO = deepsparse.info()
DEEPSPARSE_MARKS = (
    pytest.mark.deepsparse,
    pytest.mark.skipif(not _INFO.works, reason=f"{_INFO.reason}; run: {_INFO.install_command}"),
)


def needs_deepsparse(function: Any) -> Any:
    for mark in DEEPSPARSE_MARKS:
        function = mark(function)
    return function


class OnnxBuilder:
    """Small graphs over x (1, 16, 8, 8), the weights drawn once from a fixed seed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw = np.random.default_rng(0)
        shape = (CHANNELS, CHANNELS, 3, 3)
        self.x = draw.standard_normal((1, CHANNELS, SIZE, SIZE)).astype(np.float32)
        self.codes = draw.integers(-127, 128, shape).astype(np.int8)
        self.weight = draw.standard_normal(shape).astype(np.float32)
        self.bias = draw.standard_normal(CHANNELS).astype(np.float32)
        self.bias_codes = draw.integers(-500, 500, CHANNELS).astype(np.int32)
        self.weight_scale = np.linspace(0.001, 0.002, CHANNELS, dtype=np.float32)
        self.scale = np.float32(0.03)
        self.zero_point = np.uint8(128)
        self.output_scale = np.float32(0.05)

    def save(
        self,
        name: str,
        nodes: list[onnx.NodeProto],
        weights: dict[str, Any],
        *,
        opset: int = 13,
        ir_version: int = 8,
        output: tuple[int, ...] = (1, CHANNELS, SIZE, SIZE),
    ) -> Path:
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(self.x.shape))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(output))],
            [numpy_helper.from_array(np.asarray(value), key) for key, value in weights.items()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
        )
        path = self.folder / f"{name}.onnx"
        onnx.save(model, path)
        return path

    def float_conv(self, **versions: int) -> Path:
        nodes = [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1] * 4),
            helper.make_node("Relu", ["c"], ["r"], name="relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
            helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
            helper.make_node("Gemm", ["f", "fw"], ["y"], name="fc"),
        ]
        weights = {"w": self.weight, "b": self.bias, "fw": np.eye(CHANNELS, dtype=np.float32)}
        return self.save("float", nodes, weights, output=(1, CHANNELS), **versions)

    def _grid(self, per_channel: bool) -> dict[str, Any]:
        return {
            "s": self.scale,
            "z": self.zero_point,
            "ws": self.weight_scale if per_channel else np.float32(0.001),
            "wz": np.zeros(CHANNELS, np.int8) if per_channel else np.int8(0),
            "w": self.codes,
            "ys": self.output_scale,
        }

    def qlinear_conv(self, *, per_channel: bool) -> Path:
        inputs = ["q", "s", "z", "w", "ws", "wz", "ys", "z", "b"]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
            helper.make_node("QLinearConv", inputs, ["c"], name="conv", pads=[1] * 4),
            helper.make_node("DequantizeLinear", ["c", "ys", "z"], ["y"], name="dequantize"),
        ]
        weights = {**self._grid(per_channel), "b": self.bias_codes}
        return self.save(f"qlinear{per_channel}", nodes, weights)

    def conv_integer(self) -> Path:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
            helper.make_node(
                "ConvInteger", ["q", "w", "z", "wz"], ["c"], name="conv", pads=[1] * 4
            ),
            helper.make_node("Add", ["c", "b"], ["i"], name="bias"),
            helper.make_node("Cast", ["i"], ["f"], name="cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "m"], ["r"], name="rescale"),
            helper.make_node("Relu", ["r"], ["y"], name="relu"),
        ]
        grid = self._grid(per_channel=False)
        rescale = (self.scale * self.weight_scale).reshape(1, CHANNELS, 1, 1)
        bias = self.bias_codes.reshape(1, CHANNELS, 1, 1)
        weights = {**{key: grid[key] for key in ("s", "z", "w", "wz")}, "m": rescale, "b": bias}
        return self.save("integer", nodes, weights)

    def qdq(self) -> Path:
        """The output of `first` is quantized, that of `second` is not."""
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q1"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d1"),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], name="dw1", axis=0),
            helper.make_node("Conv", ["d", "dw"], ["c1"], name="first", pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
            helper.make_node("QuantizeLinear", ["r1", "ys", "z0"], ["q2"], name="q2"),
            helper.make_node("DequantizeLinear", ["q2", "ys", "z0"], ["d2"], name="d2"),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["ew"], name="dw2", axis=0),
            helper.make_node("Conv", ["d2", "ew"], ["y"], name="second", pads=[1] * 4),
        ]
        return self.save("qdq", nodes, {**self._grid(per_channel=True), "z0": np.uint8(0)})


def convolve(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """3x3 convolution with padding 1 in float64, one kernel position after another."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    total = np.zeros((x.shape[0], weight.shape[0], *x.shape[2:]))
    for row in range(3):
        for column in range(3):
            window = padded[:, :, row : row + x.shape[2], column : column + x.shape[3]]
            total += np.einsum(
                "nchw,oc->nohw", window, weight[:, :, row, column].astype(np.float64)
            )
    return total
