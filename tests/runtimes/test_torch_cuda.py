"""Sessions of PyTorch on a GPU: which kernel each layer gets, and that every product is right.

Choosing needs no GPU, and the integer, fp8 and 4-bit products run on the CPU too; 2:4 products and
CUDA graphs are tested where there is a CUDA device.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from obc_deploy.activations import ActivationGrid, ActivationRange, activation_grid
from obc_deploy.compression import compress
from obc_deploy.errors import RuntimeFailedError, RuntimeMissingError
from obc_deploy.quantized_network import quantize_dequantize
from obc_deploy.runtimes.cuda_layers import (
    Arithmetic,
    GpuAbilities,
    Kernel,
    LayerFacts,
    choose_kernel,
    is_two_four,
)
from obc_deploy.runtimes.cuda_products import (
    DenseProduct,
    Fp8Product,
    Int4Product,
    Int8Product,
    SparseFp8Product,
    SparseInt8Product,
    SparseProduct,
)
from obc_deploy.runtimes.torch_cuda import (
    CudaOptions,
    fitting_product,
    open_torch_cuda,
    relative_rms,
)
from obc_deploy.solvers import solve

NO_CUDA = not torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_CUDA, reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]

HOPPER = GpuAbilities("a Hopper GPU", (9, 0), cusparselt=True)
AMPERE = GpuAbilities("an Ampere GPU", (8, 0), cusparselt=True)
TURING = GpuAbilities("a Turing GPU", (7, 5), cusparselt=True)
BARE = GpuAbilities("a Hopper GPU", (9, 0), cusparselt=False)
CPU = GpuAbilities.of(torch.device("cpu"))

W8A8 = {"weight_bits": 8, "activation_bits": 8, "has_range": True}
SPARSE = {"is_sparse": True, "is_two_four": True}


def facts(rows=64, cols=64, **others):
    others.setdefault("grid_group", cols)
    return LayerFacts("fc", rows, cols, **others)


CHOICES = {
    "2:4 in fp16": (facts(**SPARSE), "fp16", HOPPER, "2:4", None),
    "2:4 in bf16 on Ampere": (facts(**SPARSE), "bf16", AMPERE, "2:4", None),
    "2:4 of 48 in fp16": (facts(48, 16, **SPARSE), "fp16", HOPPER, "2:4", None),
    "2:4 and int8": (facts(**SPARSE, **W8A8), "int8", HOPPER, "2:4+int8", None),
    "2:4 and fp8": (facts(**SPARSE), "fp8", HOPPER, "2:4+fp8", None),
    "dense": (facts(), "fp16", HOPPER, "dense", None),
    "int8": (facts(**W8A8), "int8", TURING, "int8", None),
    "int4": (facts(64, 256, weight_bits=4), "int4", AMPERE, "int4", None),
    "3 bits in int4": (facts(64, 32, weight_bits=3, symmetric=False), "int4", AMPERE, "int4", None),
    "24 rows": (facts(24, 64, **SPARSE), "fp16", HOPPER, "dense", "24x64 are no multiples of 16"),
    "48 columns in int8": (
        facts(64, 48, **SPARSE, **W8A8), "int8", HOPPER, "int8", "64x48 are no multiples of 32"),
    "12 columns in int8": (
        facts(64, 12, **W8A8), "int8", HOPPER, "dense", "64x12 are no multiples of 8"),
    "24 columns in fp8": (facts(64, 24), "fp8", HOPPER, "dense", "64x24 are no multiples of 16"),
    "unstructured": (facts(is_sparse=True), "fp16", HOPPER, "dense", "no 2:4 pattern"),
    "a 3x3 convolution": (
        facts(**SPARSE, not_a_product="a 3x3 convolution"), "fp16", HOPPER, "dense", "a 3x3"),
    "fp8 on Ampere": (facts(), "fp8", AMPERE, "dense", "fp8 needs compute capability 8.9"),
    "bf16 on Turing": (facts(**SPARSE), "bf16", TURING, "dense", "bf16 needs .* 8.0"),
    "2:4 on Turing": (facts(**SPARSE), "fp16", TURING, "dense", "2:4 needs .* 8.0, and a Turing"),
    "no cuSPARSELt": (facts(**SPARSE), "fp16", BARE, "dense", "has no cuSPARSELt"),
    "2:4 and int8 without cuSPARSELt": (
        facts(**SPARSE, **W8A8), "int8", BARE, "int8", "has no cuSPARSELt"),
    "2:4 on the CPU": (facts(**SPARSE), "fp16", CPU, "dense", "the CPU has no 2:4 product"),
    "2:4 in int4": (
        facts(64, 64, **SPARSE, weight_bits=4), "int4", HOPPER, "int4", "no 2:4 product of int4"),
    "float activations": (facts(weight_bits=8), "int8", HOPPER, "dense", "leaves .* in float"),
    "float weights": (facts(), "int8", HOPPER, "dense", "leaves weights or activations in float"),
    "an asymmetric grid": (
        facts(**W8A8, symmetric=False), "int8", HOPPER, "dense", "grid is asymmetric"),
    "grid groups": (facts(**W8A8, grid_group=16), "int8", HOPPER, "dense", "16 columns share"),
    "no range": (
        facts(weight_bits=8, activation_bits=8), "int8", HOPPER, "dense", "no range of its input"),
    "8 bits in int4": (facts(weight_bits=8), "int4", HOPPER, "dense", "4 bits or less"),
    "48 columns in int4": (facts(64, 48, weight_bits=4), "int4", HOPPER, "dense", "do not divide"),
    "narrow groups in int4": (
        facts(64, 64, weight_bits=4, grid_group=16), "int4", HOPPER, "dense", "each 16 do not"),
    "12 rows in int4": (
        facts(12, 64, weight_bits=4), "int4", HOPPER, "dense", "12 output channels"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "arithmetic", "device", "kernel", "reason"), CHOICES.values(), ids=CHOICES.keys()
)
def test_the_kernel_of_a_layer(layer, arithmetic, device, kernel, reason):
    choice = choose_kernel(layer, Arithmetic(arithmetic), device)
    assert choice.kernel.value == kernel
    if reason is None:
        assert choice.reason is None
    else:
        assert choice.reason is not None
        assert re.search(reason, choice.reason)
    dense = choose_kernel(layer, Arithmetic(arithmetic), device, sparse=False)
    assert "2:4" not in dense.kernel.value


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.builds(
        facts, st.integers(1, 130), st.integers(1, 130), is_sparse=st.booleans(),
        is_two_four=st.booleans(), weight_bits=st.sampled_from([None, 3, 4, 8]),
        activation_bits=st.sampled_from([None, 8]), symmetric=st.booleans(),
        has_range=st.booleans(),
    ),
    st.sampled_from(Arithmetic),
    st.sampled_from([HOPPER, AMPERE, TURING, BARE, CPU]),
)  # fmt: skip
def test_a_kernel_always_fits_its_layer(layer, arithmetic, device):
    choice = choose_kernel(layer, arithmetic, device)
    name = choice.kernel.value
    assert choice.layer == "fc"
    if "2:4" in name:
        multiple = 16 if arithmetic.is_float else 32
        assert layer.is_two_four
        assert layer.rows % multiple == layer.cols % multiple == 0
        assert device in (HOPPER, AMPERE)
    if "int8" in name:
        assert layer.symmetric
        assert layer.weight_bits is not None
        assert layer.has_range
    if choice.kernel is Kernel.DENSE and not arithmetic.is_float:
        assert choice.reason
    if layer.is_sparse and "2:4" not in name:
        assert choice.reason


def test_two_of_four():
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3], [0, 0, 0, 0, 1, 1, 0, 0]])
    assert is_two_four(weight)
    weight[1, 6] = 1
    assert not is_two_four(weight)
    assert not is_two_four(torch.zeros(2, 6))


def layer_of(scheme, rows=64, cols=96, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, cols)).astype(np.float32) / cols**0.5
    inputs = rng.standard_normal((cols, 4 * cols))
    form = solve(
        torch.from_numpy(weight), torch.from_numpy(inputs @ inputs.T), scheme, method="magnitude"
    )
    return form, torch.from_numpy(rng.standard_normal(rows).astype(np.float32))


def tensors_of(form, device):
    return form.weight.to(device), form.codes.to(device), form.scale[:, 0].to(device)


RANGES = {
    "one-sided": ActivationRange(0.0, 2.5),
    "two-sided": ActivationRange(-1.5, 3.0),
    "negative": ActivationRange(-2.0, 0.0),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 7, 4])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("interval", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("rows_in", [1, 16, 17, 40])
def test_int8_is_the_simulated_arithmetic(rows_in, interval, signed, bits, device):
    form, bias = layer_of("w8")
    grid = activation_grid(interval, bits=bits, signed=signed)
    x = torch.randn(rows_in, 96, device=device) * 1.5
    _, codes, scale = tensors_of(form, device)
    product = Int8Product(codes, scale, bias.to(device), grid, torch.float32).to(device)
    on_grid = quantize_dequantize(
        x, torch.tensor(grid.scale, device=device), torch.tensor(grid.zero_point, device=device),
        grid.code_min, grid.code_max,
    )  # fmt: skip
    wanted = functional.linear(
        on_grid.double(), form.weight.to(device).double(), bias.to(device).double()
    )
    torch.testing.assert_close(product(x).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product.expected(x).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["w4", "w4-asym", "w3-asym", "w2", "w4g32", "w4g64-asym"])
@pytest.mark.parametrize("rows_in", [1, 5, 33])
def test_int4_is_what_its_codes_stand_for(scheme, rows_in, device):
    form, bias = layer_of(scheme, cols=128)
    moved = type(form)(**{
        **vars(form), "weight": form.weight.to(device), "codes": form.codes.to(device),
        "scale": form.scale.to(device), "zero_point": form.zero_point.to(device),
    })  # fmt: skip
    product = Int4Product(moved, bias.to(device), torch.float32).to(device)
    x = torch.randn(rows_in, 128, device=device)
    wanted = functional.linear(x.double(), moved.weight.double(), bias.to(device).double())
    assert relative_rms(product(x), wanted) < 0.01
    assert relative_rms(product.expected(x), wanted) < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rows_in", [3, 32])
def test_fp8_is_close_to_float_and_equal_to_its_own_codes(known, rows_in, device):
    if device == "cuda" and GpuAbilities.of(torch.device(device)).lacks(Arithmetic.FP8):
        pytest.skip("this GPU has no fp8")
    form, bias = layer_of("dense")
    x = torch.randn(rows_in, 96, device=device)
    largest = float(x.abs().max()) if known else None
    product = Fp8Product(form.weight.to(device), bias.to(device), largest, torch.float32)
    product.to(device)
    wanted = functional.linear(x, form.weight.to(device), bias.to(device))
    assert relative_rms(product.expected(x), wanted) < 0.05
    assert relative_rms(product(x), product.expected(x)) < 0.005


def test_a_wrong_or_refused_product_is_left_out_with_the_reason(monkeypatch):
    form, bias = layer_of("2:4+w8")
    grid = ActivationGrid(0.02, 100)
    x = torch.rand(8, 96)
    given = (form.weight, bias, form, grid, None, torch.float32, x)
    assert isinstance(fitting_product(Kernel.INT8, *given), Int8Product)
    # The CPU has no cuSPARSELt: what PyTorch says about it is the reason.
    refused = fitting_product(Kernel.SPARSE_INT8, *given)
    assert isinstance(refused, str)
    assert refused.startswith("2:4+int8: ")
    assert "_cslt_compress" in refused
    monkeypatch.setattr(Int8Product, "forward", lambda self, x: 1.1 * self.expected(x))
    assert fitting_product(Kernel.INT8, *given) == "int8: its outputs are off by 10 %"


class Mixed(nn.Module):
    """A 3x3 convolution, 1x1 convolutions with and without stride, a residual, linears."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.wide = nn.Conv2d(32, 64, 1)
        self.down = nn.Conv2d(64, 32, 1, stride=2)
        self.side = nn.Conv2d(32, 32, 1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 1, groups=2)
        self.tokens = nn.Linear(32, 64)
        self.head = nn.Linear(64, 24)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        x = self.down(functional.relu(self.wide(x))) + self.side(x)
        x = self.grouped(functional.relu(x))
        x = x.view(x.shape[0], 32, -1).transpose(1, 2)
        return self.head(functional.relu(self.tokens(x)).mean(1))


def compressed(scheme, method="magnitude"):
    torch.manual_seed(0)
    samples = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    return compress(
        Mixed(), samples, scheme=scheme, method=method, skip=["stem"], baselines=False,
        bn_reestimate=False, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def dense():
    return compressed("dense")


@pytest.fixture(scope="module")
def int8():
    return compressed("w8a8")


@pytest.fixture(scope="module")
def sparse_int8():
    return compressed("2:4+w8a8")


@pytest.fixture(scope="module")
def int4():
    return compressed("w4")


def batch(count):
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


def simulated(model, x):
    with torch.no_grad():
        return model.module()(torch.from_numpy(x)).numpy()


def kernels(session):
    return {choice.layer: choice.kernel.value for choice in session.layers}


CASES = {
    "fp16": ("dense", Arithmetic.FLOAT16, 2e-3),
    "bf16": ("dense", Arithmetic.BFLOAT16, 2e-2),
    "int8": ("int8", Arithmetic.INT8, 3e-2),
    "2:4+int8": ("sparse_int8", Arithmetic.INT8, 3e-2),
    "2:4 in fp16": ("sparse_int8", Arithmetic.FLOAT16, 3e-2),
    "fp8": ("dense", Arithmetic.FP8, 0.15),
    "int4": ("int4", Arithmetic.INT4, 2e-2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("name", "arithmetic", "tolerance"), CASES.values(), ids=CASES.keys())
def test_a_session_computes_what_the_model_does(
    name, arithmetic, tolerance, count, device, request
):
    model = request.getfixturevalue(name)
    x = batch(count)
    wanted = simulated(model, x)
    options = CudaOptions(arithmetic, faster_only=False)
    with open_torch_cuda(model, options, batch_size=count, device=device) as session:
        (found,) = session.run({"x": x}).values()
        assert found.shape == (count, 24)
        assert found.dtype == np.float32
        error = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
        assert error < tolerance
        chosen = kernels(session)
        assert set(chosen) == {layer.name for layer in model.layers}
        reasons = {choice.layer: choice.reason for choice in session.layers}
    if arithmetic.is_float and device == "cpu":
        assert set(chosen.values()) == {"dense"}
    if arithmetic is Arithmetic.INT8:
        wanted_kernel = "2:4+int8" if name == "sparse_int8" and device == "cuda" else "int8"
        for layer in ("wide", "down", "side", "tokens"):
            assert chosen[layer] == wanted_kernel, reasons[layer]
        assert chosen["head"] == "int8"  # 24 rows are no multiple of 32
    if not arithmetic.is_float:
        assert chosen["stem"] == chosen["grouped"] == "dense"
        assert "3x3 convolution" in reasons["stem"]
        assert "2 groups" in reasons["grouped"]
    if name == "sparse_int8" and device == "cpu":
        assert "the CPU has no 2:4 product" in reasons["wide"]
        assert "24x64 are no multiples" in reasons["head"]


def test_a_session_times_and_profiles_what_it_runs(int8):
    x = {"x": batch(2)}
    options = CudaOptions(Arithmetic.INT8)
    with open_torch_cuda(int8, options, batch_size=2, device="cpu") as session:
        assert session.inputs[0].shape == (2, 3, 8, 8)
        assert session.outputs[0].shape == (2, 24)
        for copies in (False, True):
            taken = session.time(x, warmup=2, samples=5, copies=copies)
            assert taken.warmup_ms.shape == (2,)
            assert taken.samples_ms.shape == (5,)
            assert (taken.samples_ms > 0).all()
        profile = session.profile(x, warmup=1, iterations=2)
        products = [layer for layer in profile if layer.int8]
        assert len(products) == sum(name == "int8" for name in kernels(session).values())
        assert all(layer.ms > 0 for layer in profile)
        assert session.facts["layers"][0]["layer"] == "stem"
        assert session.facts["graph"] is False
    with pytest.raises(RuntimeFailedError, match="closed"):
        session.run(x)
    session.close()


def test_a_run_directory_opens_too(int8, tmp_path):
    folder = int8.save(tmp_path / "run")
    x = {"x": batch(3)}
    found = []
    for given_model in (int8, folder):
        with open_torch_cuda(
            given_model, CudaOptions(Arithmetic.INT8), batch_size=3, device="cpu"
        ) as session:
            found += session.run(x).values()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


BAD = {
    "another name": ({"y": batch(2)}, "name exactly these"),
    "another batch": ({"x": batch(3)}, r"takes float32 \(2, 3, 8, 8\)"),
    "another type": ({"x": batch(2).astype(np.float64)}, "is float64"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD.keys())
def test_inputs_that_do_not_fit_are_refused(dense, inputs, message):
    with (
        open_torch_cuda(dense, batch_size=2, device="cpu") as session,
        pytest.raises(RuntimeFailedError, match=message),
    ):
        session.run(inputs)


def test_nothing_to_time_is_refused(dense):
    with (
        open_torch_cuda(dense, device="cpu") as session,
        pytest.raises(RuntimeFailedError, match="0 samples cannot be timed"),
    ):
        session.time({"x": batch(1)}, samples=0)


def test_no_batch_is_refused(dense):
    with pytest.raises(RuntimeFailedError, match="batch size 0"):
        open_torch_cuda(dense, batch_size=0, device="cpu")


@pytest.mark.skipif(not NO_CUDA, reason="there is a CUDA device")
def test_no_cuda_device_is_a_clear_error(dense):
    with pytest.raises(RuntimeMissingError, match="PyTorch on CUDA: device 'cuda'"):
        open_torch_cuda(dense)


def needs_sparsity():
    reason = GpuAbilities.of(torch.device("cuda")).lacks_sparsity
    if reason:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 96), (64, 768, 3072), (100, 3072, 768)])
def test_2_4_products_on_a_gpu(shape, dtype):
    needs_sparsity()
    m, cols, rows = shape
    form, bias = layer_of("2:4+w8", rows, cols)
    weight, codes, scale = tensors_of(form, "cuda")
    bias = bias.cuda()
    x = torch.randn(m, cols, device="cuda", dtype=dtype)
    grid = activation_grid(ActivationRange(-3.0, 3.0))
    checked = [
        SparseProduct(weight, bias, dtype),
        SparseInt8Product(codes, scale, bias, grid, dtype, fused=False),
    ]
    if GpuAbilities.of(torch.device("cuda")).lacks(Arithmetic.FP8) is None:
        checked.append(SparseFp8Product(weight, bias, 3.0, dtype))
    for product in checked:
        product.cuda()
        product.tune(x)
        assert relative_rms(product(x), product.expected(x)) < 0.01, type(product).__name__


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("graph", [True, False])
def test_a_graph_reads_new_inputs(sparse_int8, graph):
    needs_sparsity()
    options = CudaOptions(Arithmetic.INT8, faster_only=False, graph=graph)
    with open_torch_cuda(sparse_int8, options, batch_size=4) as session:
        assert session.facts["graph"] is graph
        one, two = batch(4), 2 * batch(4)
        first, second, again = (session.run({"x": x})["output"] for x in (one, two, one))
        assert np.abs(first - second).max() > 0.01
        np.testing.assert_array_equal(first, again)
        assert (session.time({"x": one}, warmup=1, samples=3).samples_ms > 0).all()


def test_dense_products_are_linears():
    form, bias = layer_of("dense")
    x = torch.randn(7, 96)
    product = DenseProduct(form.weight, bias, torch.float32)
    torch.testing.assert_close(product(x), functional.linear(x, form.weight, bias))
