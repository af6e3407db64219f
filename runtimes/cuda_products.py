"""Matrix products of compressed layers in PyTorch: y = x Wᵀ + b in several arithmetics.

    int8    s_x s_w (q_x - z) q_wᵀ + b     q_x = clamp(round(x / s_x) + z), the zero point's share
                                           -z Σ q_w is part of the bias
    fp8     s_x s_w q_x q_wᵀ + b           e4m3, one scale for the weight and one for the input
    int4    x (q_w s_w + z_w)ᵀ + b         weights alone, a scale and an offset a group of columns

Each exists dense and, but for int4, with a 2:4 weight (cuSPARSELt, with its algorithm search).
Everything takes (m, cols) and gives (m, rows).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from obc_deploy.activations import ActivationGrid
from obc_deploy.runtimes.cuda_layers import Kernel, int4_group
from obc_deploy.solvers.contract import CompressedLayer

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
_LEAST_INT8_ROWS = 32
"""Rows of activations below which CUDA's int8 product refuses; they are padded with zeros."""
_INT4_TILES = (8, 4, 2)


class Product(nn.Module, ABC):
    """One layer's product.

    Attributes:
        weight_values: (rows, cols) float32, what the weight stands for; dropped by `forget`.
        bias_values: (rows,) float32, or None; likewise.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Remember what is to be computed, to check the kernel against."""
        super().__init__()
        self.dtype = dtype
        self.weight_values: Tensor | None = weight.float()
        self.bias_values = None if bias is None else bias.float()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(m, cols) -> (m, rows), both in `dtype`."""

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the kernel reads it, float32."""
        return x.float()

    def expected(self, x: Tensor) -> Tensor:
        """What `forward` should give, from float32 values."""
        assert self.weight_values is not None
        return functional.linear(self.rounded(x), self.weight_values, self.bias_values)

    def tune(self, x: Tensor) -> None:
        """Search for the fastest algorithm for inputs like this one."""

    @property
    def sparse_weight(self) -> CompressedWeight | None:
        """The 2:4 weight, whose algorithm another product of this shape can take over."""
        weight = getattr(self, "_weight", None)
        return weight if isinstance(weight, CompressedWeight) else None

    def forget(self) -> None:
        """Drop what only `expected` needs."""
        self.weight_values = self.bias_values = None


def _buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    module.register_buffer(name, value)


def padded(x: Tensor, multiple: int, least: int = 0) -> Tensor:
    """Zero rows added up to a multiple, and up to `least`."""
    rows = max(x.shape[0], least)
    missing = rows + (-rows) % multiple - x.shape[0]
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


class DenseProduct(Product):
    """x Wᵀ + b in 16-bit floats."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Args: weight (rows, cols), bias (rows,), dtype of everything."""
        super().__init__(weight, bias, dtype)
        _buffer(self, "weight", weight.to(dtype))
        _buffer(self, "bias", None if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(m, cols) -> (m, rows)."""
        return functional.linear(x, self.weight, self.bias)


class CompressedWeight:
    """A 2:4 weight as cuSPARSELt packs it, and the algorithm that multiplies it fastest."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch._cslt_compress(weight.contiguous())
        self.algorithm: dict[str, Any] = {"alg_id": 0, "transpose_result": True}

    def search(self, x: Tensor, **options: Any) -> None:
        """Try cuSPARSELt's algorithms on an input; split-k ones where PyTorch can search them.

        Raises:
            RuntimeError: cuSPARSELt refuses the product.
        """
        for transposed in (True, False):
            try:
                found = self._fastest(x, transposed, options)
                self.algorithm = {**found, "transpose_result": transposed}
                self(x, **options)
            except RuntimeError:
                if not transposed:
                    raise
            else:
                return

    def _fastest(self, x: Tensor, transposed: bool, options: dict[str, Any]) -> dict[str, int]:
        search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
        if search is not None:
            found = search(
                self._packed, x.t(), options.get("bias"), options.get("alpha"),
                options.get("out_dtype"), transposed,
            )  # fmt: skip
            return {"alg_id": found[0], "split_k": found[1], "split_k_mode": found[2]}
        best = torch._cslt_sparse_mm_search(
            self._packed, x.t(), transpose_result=transposed, **options
        )
        return {"alg_id": int(best)}

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        """The product x Wᵀ, (m, rows)."""
        found = torch._cslt_sparse_mm(self._packed, x.t(), **self.algorithm, **options)
        return found if self.algorithm["transpose_result"] else found.t()


class SparseProduct(Product):
    """x Wᵀ + b in 16-bit floats with a 2:4 weight."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Args: weight (rows, cols) of 2:4, bias (rows,), dtype of everything."""
        super().__init__(weight, bias, dtype)
        self._weight = CompressedWeight(weight.to(dtype))
        _buffer(self, "bias", None if bias is None else bias.to(dtype))

    def tune(self, x: Tensor) -> None:
        """Search for the fastest algorithm."""
        self._weight.search(padded(x, 8), bias=self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(m, cols) -> (m, rows)."""
        return self._weight(padded(x, 8), bias=self.bias)[: x.shape[0]]


class _Int8(Product):
    """Codes and scales of an int8 product."""

    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        grid: ActivationGrid,
        dtype: torch.dtype,
    ) -> None:
        """Args: codes (rows, cols) int8, scale (rows,), bias (rows,), the input's grid, dtype."""
        super().__init__(codes.float() * scale[:, None], bias, dtype)
        self.grid = grid
        # Unsigned codes are moved to where int8 can hold them.
        self._shift = 128 if grid.code_max > 127 else 0
        both = scale.double() * grid.scale
        sums = codes.double().sum(1) * (self._shift - grid.zero_point)
        offset = both * sums if bias is None else both * sums + bias.double()
        _buffer(self, "scale", both.float())
        _buffer(self, "offset", offset.float())

    def codes_of(self, x: Tensor) -> Tensor:
        """The input's codes less the shift, int8."""
        grid = self.grid
        low, high = grid.code_min - self._shift, grid.code_max - self._shift
        codes = (x.float() / grid.scale).round_().add_(grid.zero_point - self._shift)
        return codes.clamp_(low, high).to(torch.int8)

    def rounded(self, x: Tensor) -> Tensor:
        """The input on its grid."""
        codes = self.codes_of(x).float() + (self._shift - self.grid.zero_point)
        return codes * self.grid.scale

    def scaled(self, sums: Tensor) -> Tensor:
        """int32 sums of codes as outputs."""
        return (sums * self.scale).add_(self.offset).to(self.dtype)


class Int8Product(_Int8):
    """x Wᵀ + b in int8 codes with int32 sums."""

    codes: Tensor

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        grid: ActivationGrid,
        dtype: torch.dtype,
    ) -> None:
        """Args: as for its base."""
        super().__init__(codes, scale, bias, grid, dtype)
        _buffer(self, "codes", codes.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(m, cols) -> (m, rows)."""
        read = padded(self.codes_of(x), 8, _LEAST_INT8_ROWS)
        return self.scaled(torch._int_mm(read, self.codes.t()))[: x.shape[0]]


class SparseInt8Product(_Int8):
    """The same with a 2:4 weight, and the scales applied inside the product where that works."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        grid: ActivationGrid,
        dtype: torch.dtype,
        *,
        fused: bool,
    ) -> None:
        """Args: as for its base; fused: let cuSPARSELt apply the scales and give `dtype`."""
        super().__init__(codes, scale, bias, grid, dtype)
        self._weight = CompressedWeight(codes)
        self._fused = fused

    def _options(self) -> dict[str, Any]:
        if self._fused:
            return {"alpha": self.scale, "out_dtype": self.dtype}
        return {"out_dtype": torch.int32}

    def tune(self, x: Tensor) -> None:
        """Search for the fastest algorithm."""
        self._weight.search(padded(self.codes_of(x), 16), **self._options())

    def forward(self, x: Tensor) -> Tensor:
        """(m, cols) -> (m, rows)."""
        found = self._weight(padded(self.codes_of(x), 16), **self._options())[: x.shape[0]]
        return (found + self.offset).to(self.dtype) if self._fused else self.scaled(found)


class _Fp8(Product):
    """A weight in e4m3 with one scale, and the input's scale: known, or taken from each input."""

    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, largest: float | None, dtype: torch.dtype
    ) -> None:
        """Args: weight (rows, cols), bias (rows,), the input's largest magnitude or None, dtype."""
        largest_weight = weight.abs().max().float().clamp(min=1e-12)
        self_scale = largest_weight / FP8_LARGEST
        codes = (weight.float() / self_scale).to(FP8)
        super().__init__(codes.float() * self_scale, bias, dtype)
        self._codes = codes.contiguous()
        _buffer(self, "weight_scale", self_scale)
        known = None
        if largest is not None:
            known = torch.tensor(max(largest, 1e-12) / FP8_LARGEST, device=weight.device)
        _buffer(self, "input_scale", known)
        _buffer(self, "bias", None if bias is None else bias.to(torch.bfloat16))

    def codes_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input in e4m3, and its scale."""
        values = x.float()
        scale = self.input_scale
        if scale is None:
            scale = values.abs().amax().clamp(min=1e-12) / FP8_LARGEST
        return (values / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scale

    def rounded(self, x: Tensor) -> Tensor:
        """The input in e4m3."""
        codes, scale = self.codes_of(x)
        return codes.float() * scale

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input in e4m3 with as many rows as kernels want, and its scale."""
        codes, scale = self.codes_of(x)
        return padded(codes.view(torch.int8), 16).view(FP8), scale


class Fp8Product(_Fp8):
    """x Wᵀ + b in e4m3."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(m, cols) -> (m, rows)."""
        codes, scale = self.read(x)
        found = torch._scaled_mm(
            codes, self._codes.t(), scale, self.weight_scale, bias=self.bias,
            out_dtype=torch.bfloat16,
        )  # fmt: skip
        return found[: x.shape[0]].to(self.dtype)


class SparseFp8Product(_Fp8):
    """The same with a 2:4 weight."""

    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, largest: float | None, dtype: torch.dtype
    ) -> None:
        """Args: as for its base."""
        super().__init__(weight, bias, largest, dtype)
        self._weight = CompressedWeight(self._codes)

    def tune(self, x: Tensor) -> None:
        """Search for the fastest algorithm."""
        codes, _ = self.read(x)
        self._weight.search(codes, out_dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """(m, cols) -> (m, rows)."""
        codes, scale = self.read(x)
        # A scalar alpha would be read back to the CPU, which a CUDA graph forbids.
        found = self._weight(codes, out_dtype=torch.bfloat16)[: x.shape[0]]
        found = found * (scale * self.weight_scale).to(torch.bfloat16)
        return (found if self.bias is None else found + self.bias).to(self.dtype)


class Int4Product(Product):
    """x Wᵀ + b with weights of 4 bits or less, computed in bfloat16."""

    bias: Tensor | None
    scales_and_zeros: Tensor

    def __init__(
        self, form: CompressedLayer[Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Args: a form with codes of 4 bits or less, bias (rows,), dtype."""
        assert form.codes is not None
        assert form.scale is not None
        assert form.zero_point is not None
        super().__init__(form.weight, bias, dtype)
        cols = form.codes.shape[1]
        group = int4_group(cols, cols // form.scale.shape[1])
        assert group is not None
        self._group = group
        # The kernel's weight is (q - 8) s + z with q of 0 to 15; ours is (code - zero point) s.
        repeats = cols // form.scale.shape[1] // group
        scale = form.scale.float().repeat_interleave(repeats, 1)
        zero = -form.zero_point.float().repeat_interleave(repeats, 1) * scale
        both = torch.stack((scale.t(), zero.t()), 2).to(torch.bfloat16).contiguous()
        _buffer(self, "scales_and_zeros", both)
        _buffer(self, "packed", pack_int4(form.codes))
        _buffer(self, "bias", None if bias is None else bias.to(torch.bfloat16))
        # What bfloat16 scales stand for.
        wide = both.float().repeat_interleave(group, 0)
        self.weight_values = form.codes.float() * wide[:, :, 0].t() + wide[:, :, 1].t()

    def rounded(self, x: Tensor) -> Tensor:
        """The input in bfloat16."""
        return x.to(torch.bfloat16).float()

    def forward(self, x: Tensor) -> Tensor:
        """(m, cols) -> (m, rows)."""
        multiply = (
            torch.ops.aten._weight_int4pack_mm
            if x.device.type == "cuda"
            else torch.ops.aten._weight_int4pack_mm_for_cpu
        )
        found: Tensor = multiply(
            x.to(torch.bfloat16).contiguous(), self.packed, self._group, self.scales_and_zeros
        )
        return (found if self.bias is None else found + self.bias).to(self.dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes of -8 to 7, (rows, cols), as the device's 4-bit product wants them."""
    unsigned = codes.to(torch.int32) + 8
    cols = codes.shape[1]
    if codes.device.type != "cuda":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, _INT4_TILES[-1])  # type: ignore[no-any-return]
    pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8).contiguous()
    tiles = next(tiles for tiles in _INT4_TILES if cols % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)  # type: ignore[no-any-return]


def products(
    kernel: Kernel,
    weight: Tensor,
    bias: Tensor | None,
    form: CompressedLayer[Tensor] | None,
    grid: ActivationGrid | None,
    largest: float | None,
    dtype: torch.dtype,
) -> list[Product]:
    """The products that may stand for a kernel, the one expected to be faster first.

    Args:
        kernel: which.
        weight: (rows, cols) float, on the device.
        bias: (rows,), on the device, or None.
        form: codes and scales, for integer kernels.
        grid: of the input, for int8.
        largest: magnitude of the input, for fp8; None where unknown.
        dtype: 16-bit float of inputs and outputs.

    Raises:
        RuntimeError: PyTorch refuses the weight.
    """
    if kernel is Kernel.DENSE:
        return [DenseProduct(weight, bias, dtype)]
    if kernel is Kernel.SPARSE:
        return [SparseProduct(weight, bias, dtype)]
    if kernel is Kernel.FP8:
        return [Fp8Product(weight, bias, largest, dtype)]
    if kernel is Kernel.SPARSE_FP8:
        return [SparseFp8Product(weight, bias, largest, dtype)]
    assert form is not None
    assert form.codes is not None
    assert form.scale is not None
    if kernel is Kernel.INT4:
        return [Int4Product(_moved(form, weight.device), bias, dtype)]
    assert grid is not None
    codes, scale = form.codes.to(weight.device), form.scale[:, 0].to(weight.device)
    if kernel is Kernel.INT8:
        return [Int8Product(codes, scale, bias, grid, dtype)]
    return [SparseInt8Product(codes, scale, bias, grid, dtype, fused=f) for f in (True, False)]


def _moved(form: CompressedLayer[Tensor], device: torch.device) -> CompressedLayer[Tensor]:
    from dataclasses import replace

    assert form.codes is not None
    assert form.scale is not None
    assert form.zero_point is not None
    return replace(
        form, weight=form.weight.to(device), codes=form.codes.to(device),
        scale=form.scale.to(device), zero_point=form.zero_point.to(device),
    )  # fmt: skip
