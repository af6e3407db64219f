"""What an engine's inspector says of its layers: which kernel each runs, which ONNX nodes it holds.

The parser notes the nodes that a layer came from, and fusing joins the notes:

    {"Name": "conv1 + relu1", "TacticName": "...", "Metadata": "[ONNX Layer: conv1] [ONNX ..."}

An engine that was built to tell names alone lists texts instead.
"""

from __future__ import annotations

import json
import re
from typing import Any, Dict, List, NamedTuple

_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class EngineLayer(NamedTuple):
    """One layer of an engine."""

    kernel: str
    nodes: List[str]


def _described(layer: Dict[str, Any]) -> EngineLayer:
    kernel = str(layer.get("TacticName") or layer.get("LayerType") or "")
    return EngineLayer(kernel, _NODE.findall(str(layer.get("Metadata", ""))))


def engine_layers(text: str) -> Dict[str, EngineLayer]:
    """The layers of an inspector's JSON by name; those it gives a name alone are left out."""
    try:
        said = json.loads(text)
        layers = said["Layers"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {
        str(layer["Name"]): _described(layer)
        for layer in layers
        if isinstance(layer, dict) and "Name" in layer
    }
