"""Solving in batches on a device: what the compiled rows on the CPU find, and within its memory.

Tolerance: in float64 masks, codes and weights are the same to 1e-9; in float32 a tie may fall the
other way, so the relative error of the layer is the same to 0.1 %, and 98 % of the mask and of the
codes are.
"""

from __future__ import annotations

import pytest
import torch
from test_exact import make_problem

from obc_deploy import native
from obc_deploy.device_memory import bytes_left, limit_device_memory, memory_bytes
from obc_deploy.errors import DeviceMemoryError, ProblemError
from obc_deploy.schemes import Scheme
from obc_deploy.solvers import LayerProblem, SolverSettings, solve_levels
from obc_deploy.solvers.dispatch import torch_device
from obc_deploy.solvers.settings import torch_threads
from obc_deploy.solvers.staged import quantize_pruned

NO_CUDA = not torch.cuda.is_available()
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_CUDA, reason="no CUDA device")]
)
SCHEMES = [
    "unstructured@0.5", "unstructured@0.9", "block4@0.75", "2:4", "4:8", "w4", "w3-asym", "w4g16",
    "2:4+w8", "2:4+w4-asym", "unstructured@0.7+w4", "block4@0.5+w8",
    "block4x2@0.75", "block4x2@0.5+w8",
]  # fmt: skip
TORCH = {"float32": SolverSettings(torch.float32, native=False),
         "float64": SolverSettings(torch.float64, native=False)}  # fmt: skip


def problem(rows=12, cols=96, groups=1):
    weight, hessian = make_problem(3, rows, cols, groups, dead=2)
    return LayerProblem(torch.from_numpy(weight), torch.from_numpy(hessian), channels=cols)


@pytest.mark.skipif(not native.is_available(), reason="the compiled solvers are missing")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_device_gives_what_the_compiled_rows_give(device, scheme, dtype, groups):
    given = problem(groups=groups)
    (wanted,) = solve_levels(given, [scheme], dtype=dtype)
    (found,) = solve_levels(given, [scheme], device=device, settings=TORCH[dtype])
    assert found.weight.device.type == "cpu"
    if dtype == "float64":
        assert torch.equal(found.mask, wanted.mask)
        torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-6, atol=1e-7)
        assert found.error == pytest.approx(wanted.error, rel=1e-9)
    else:
        assert found.error == pytest.approx(wanted.error, rel=1e-3)
        assert (found.mask == wanted.mask).float().mean() > 0.98
    if wanted.codes is not None:
        agree = (found.codes == wanted.codes).float().mean()
        assert agree == 1.0 if dtype == "float64" else agree > 0.98


def out_of_memory_beyond(monkeypatch, name, rows, owner=torch):
    """The function runs out of memory for batches of more rows; returns the batches it did."""
    real, seen = getattr(owner, name), []

    def limited(first, *rest, **options):
        if first.dim() == 3:
            seen.append(first.shape[0])
            if first.shape[0] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return real(first, *rest, **options)

    monkeypatch.setattr(owner, name, limited)
    return seen


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scheme", ["unstructured@0.5", "block4@0.75", "2:4", "w4"])
def test_a_solve_that_runs_out_of_memory_goes_on_with_fewer_rows(monkeypatch, scheme, threads):
    # Wide enough to be compacted, and so that two threads get batches of their own.
    given = problem(rows=40, cols=328)
    (whole,) = solve_levels(given, [scheme], settings=TORCH["float64"])
    seen = out_of_memory_beyond(monkeypatch, "baddbmm", 7)
    with torch_threads(threads):
        (halved,) = solve_levels(given, [scheme], settings=TORCH["float64"])
    assert max(seen) > 7
    assert max(rows for rows in seen if rows <= 7) > 1
    assert torch.equal(halved.mask, whole.mask)
    torch.testing.assert_close(halved.weight, whole.weight, rtol=1e-6, atol=1e-7)
    if whole.codes is not None:
        assert torch.equal(halved.codes, whole.codes)


@pytest.mark.parametrize("scheme", ["unstructured@0.4", "unstructured@0.6+w4", "2:4+w4"])
def test_the_solves_of_survivors_are_halved_too(monkeypatch, scheme):
    given = problem(rows=40)
    (whole,) = solve_levels(given, [scheme], settings=TORCH["float64"])
    seen = out_of_memory_beyond(monkeypatch, "cholesky", 3, owner=torch.linalg)
    (halved,) = solve_levels(given, [scheme], settings=TORCH["float64"])
    assert max(seen) > 3
    torch.testing.assert_close(halved.weight, whole.weight, rtol=1e-6, atol=1e-7)
    assert halved.error == pytest.approx(whole.error, rel=1e-9)


def test_a_layer_of_which_no_row_fits_is_a_clear_error(monkeypatch):
    given = problem(cols=328)
    out_of_memory_beyond(monkeypatch, "baddbmm", 0)
    with pytest.raises(DeviceMemoryError, match=r"layer 'layer' \(12x328\) .*'cpu' even one row"):
        solve_levels(given, ["2:4"], settings=TORCH["float32"])
    dense = problem(cols=328)
    (kept,) = solve_levels(dense, ["dense"])
    with monkeypatch.context() as patched:
        patched.setattr(native, "is_available", lambda: False)
        patched.setattr(native, "why_missing", lambda: native.DISABLE_VARIABLE)
        with pytest.raises(DeviceMemoryError, match="even one row"):
            quantize_pruned(dense, kept, Scheme.parse("w4"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("750MiB", 750 * 2**20), ("1.5 gb", 1_500_000_000), ("4096", 4096),
     (4096, 4096), ("12kb", 12_000)],
)  # fmt: skip
def test_sizes_are_read(text, size):
    assert memory_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 potatoes", "-1GiB", "0", "0.1b", "1e9", "8GiB x"])
def test_other_sizes_are_refused(text):
    with pytest.raises(DeviceMemoryError, match="is no size; give one such as 8GiB"):
        memory_bytes(text)


def test_what_is_left_is_what_the_allocator_holds_unused_and_may_still_ask_for():
    whole = 1000
    unlimited = {"whole": whole, "fraction": 1.0}
    assert bytes_left(free=1000, reserved=0, allocated=0, **unlimited) == 1000
    assert bytes_left(free=700, reserved=300, allocated=100, **unlimited) == 900
    # Another process holds most of the device.
    assert bytes_left(free=50, reserved=300, allocated=100, **unlimited) == 250
    # The limit of 400 bites before the device is full.
    assert bytes_left(free=700, whole=whole, reserved=300, allocated=100, fraction=0.4) == 300
    assert bytes_left(free=0, whole=whole, reserved=500, allocated=500, fraction=0.4) == 0


def test_a_limit_needs_a_gpu():
    with pytest.raises(
        DeviceMemoryError, match=r"of 8\.0 GiB limits a GPU.*'cpu'; leave the limit out"
    ):
        limit_device_memory(torch.device("cpu"), "8GiB")


@pytest.mark.skipif(not NO_CUDA, reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_device_is_a_clear_error(name):
    with pytest.raises(ProblemError, match=f"device '{name}': .*; use 'cpu' or 'auto'"):
        torch_device(name)


@pytest.mark.parametrize("name", ["tpu", "meta", "gpu 0"])
def test_other_devices_are_refused(name):
    with pytest.raises(ProblemError, match=f"device '{name}' is .*use 'cpu', 'cuda' or 'auto'"):
        torch_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("scheme", ["2:4", "unstructured@0.6+w4", "w4"])
def test_a_limit_is_kept_and_changes_nothing(scheme):
    device = torch.device("cuda", 0)
    given = problem(rows=256, cols=512)
    (wanted,) = solve_levels(given, [scheme], dtype="float64", device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    limit = torch.cuda.memory_reserved(device) + 200 * 2**20
    limit_device_memory(device, limit)
    try:
        (found,) = solve_levels(given, [scheme], dtype="float64", device="cuda")
        assert torch.cuda.max_memory_reserved(device) <= limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert torch.equal(found.mask, wanted.mask)
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-6, atol=1e-7)
