"""What a TensorRT builder said: which layers could have had a sparse kernel, and which got one.

    (Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv1, conv2 + relu2
    (Sparsity) Chose 1 layer(s) using sparse tactics: conv2 + relu2

Only these lines say so; TensorRT-RTX writes none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LINE = re.compile(
    r"\(Sparsity\)\s+(?P<verb>Found|Chose)\s+(?P<count>\d+)\b[^:]*(?::\s*(?P<names>.*))?"
)
_OLD_LINES = (
    ("Found", re.compile(r"\(Sparsity\)\s+Layers eligible for sparse math:\s*(?P<names>.*)")),
    (
        "Chose",
        re.compile(r"\(Sparsity\)\s+TRT inference plan picked sparse implementation for layers:\s*"
                   r"(?P<names>.*)"),
    ),
)  # fmt: skip
"""What versions before 10 wrote, without counts."""


@dataclass(frozen=True)
class SparseTactics:
    """A builder's own account of sparse kernels.

    Attributes:
        found: layers that could have had one; None where the log does not say.
        chosen: layers that got one; None where the log does not say.
        found_count: how many of the first there were; None where the log does not say.
        chosen_count: the same of the second.
    """

    found: tuple[str, ...] | None = None
    chosen: tuple[str, ...] | None = None
    found_count: int | None = None
    chosen_count: int | None = None

    def picked(self, node: str) -> bool | None:
        """Whether the layer that holds an ONNX node got a sparse kernel; None where not said."""
        if self.chosen is None:
            return None if self.chosen_count != 0 else False
        return any(node in layer.split(" + ") for layer in self.chosen)


def _names(text: str | None) -> tuple[str, ...]:
    parts = (part.strip() for part in (text or "").split(","))
    return tuple(part for part in parts if part and part.lower() != "none")


def sparse_tactics(lines: Iterable[str]) -> SparseTactics:
    """Read them out of a builder's log; of several such lines the last ones count.

    Args:
        lines: of the log, with whatever prefix the logger gave them.
    """
    names: dict[str, tuple[str, ...] | None] = {"Found": None, "Chose": None}
    counts: dict[str, int | None] = {"Found": None, "Chose": None}
    for line in lines:
        match = _LINE.search(line)
        if match is not None:
            verb, count = match["verb"], int(match["count"])
            listed = _names(match["names"])
            counts[verb] = count
            # A list that was cut short names no layer rather than some.
            names[verb] = listed if len(listed) == count else None
            continue
        for verb, pattern in _OLD_LINES:
            match = pattern.search(line)
            if match is not None:
                listed = _names(match["names"])
                names[verb], counts[verb] = listed, len(listed)
    return SparseTactics(names["Found"], names["Chose"], counts["Found"], counts["Chose"])
