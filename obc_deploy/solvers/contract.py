"""The contract every layer-wise solver keeps: a quadratic problem in, a compressed layer out.

For one layer with weight W and inputs x, the squared output error of another weight Ŵ is
quadratic, so a layer problem is just (W, H):

    H = 2/n · Σ x xᵀ                                   (OBC, arXiv 2208.11580, section 4.1)
    error = tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ)        relative squared output error
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from obc_deploy.schemes import Scheme

if TYPE_CHECKING:
    import numpy as np
    import torch

ArrayT = TypeVar("ArrayT", "np.ndarray", "torch.Tensor")

DEFAULT_DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian's diagonal."""


@dataclass(frozen=True)
class LayerProblem:
    """One layer as a matrix problem.

    Attributes:
        weight: (rows, cols) float. Columns run over input channels within one kernel position, so
            that `m` consecutive columns are `m` consecutive input channels.
        hessian: (cols, cols), or (groups, cols, cols) for a grouped convolution: its rows are split
            evenly and in order among the groups. Undamped. None where only
            methods that need none are asked for.
        damping: relative damping, `damping * mean(diag(H))` is added to the diagonal.
        channels: input channels that share one kernel position; blocks and N:M groups never cross a
            multiple of it. `cols` for a linear layer.
        name: the layer's name, for error messages.
    """

    weight: torch.Tensor
    hessian: torch.Tensor | None
    damping: float = DEFAULT_DAMPING
    channels: int | None = None
    name: str = "layer"


@dataclass(frozen=True)
class CompressedLayer(Generic[ArrayT]):
    """What a solver made of one layer problem.

    Attributes:
        scheme: what was asked for.
        weight: (rows, cols) the compressed weight; where quantized exactly
            `(codes - zero_point) * scale`.
        mask: (rows, cols) bool, True where a weight was allowed to stay.
        codes: (rows, cols) int8 grid indices, or None without quantization.
        scale: (rows, groups) float32 grid step, or None; `groups` is 1 for per-channel grids.
        zero_point: (rows, groups) int8 code of exact zero, or None.
        error: relative squared output error under the undamped Hessian.
        method: the solver that made it ("exact_obs", "magnitude", ...).
    """

    scheme: Scheme
    weight: ArrayT
    mask: ArrayT
    codes: ArrayT | None
    scale: ArrayT | None
    zero_point: ArrayT | None
    error: float
    method: str


Progress = Callable[[float], None]
"""Called with the share of a layer's work that is done, 0 to 1."""
