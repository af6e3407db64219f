"""The GPU benchmark's rehearsal on the CPU: everything runs, is checked, and is never a result."""

from __future__ import annotations

import json
import time

import pytest
import torch

from obc_deploy.benchmarks import gpu
from obc_deploy.benchmarks.gpu import KINDS, SMALL, VARIANTS, Findings, main, measure, two_four
from obc_deploy.benchmarks.gpu_engines import ENGINE_VARIANTS, engine_table
from obc_deploy.benchmarks.record import RESULTS
from obc_deploy.errors import RuntimeMissingError
from obc_deploy.exporters.engine import find_library
from obc_deploy.runtimes.cuda_layers import is_two_four
from obc_deploy.runtimes.tensorrt import why_no_gpu

try:
    find_library("tensorrt_rtx")
    NO_RTX = None
except RuntimeMissingError as error:
    NO_RTX = str(error)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    before = sorted(RESULTS.iterdir())
    assert main(["--cpu-rehearsal", "--output", str(folder), "--name", "A Test"]) == 0
    assert sorted(RESULTS.iterdir()) == before
    assert sorted(path.name for path in folder.iterdir()) == ["gpu-a-test.json", "gpu-a-test.md"]
    return json.loads((folder / "gpu-a-test.json").read_text()), (
        folder / "gpu-a-test.md"
    ).read_text()


def test_everything_is_measured_or_named(rehearsal):
    found, _ = rehearsal
    assert found["rehearsal"] is True
    missing = [each["what"] for each in found["missing"]]
    for name, *_ in SMALL.networks:
        for variant, *_ in VARIANTS:
            rows = [r for r in found["networks"] if (r["network"], r["variant"]) == (name, variant)]
            assert len(rows) == 1, found["missing"]
            assert rows[0]["ms"] > 0
            assert len(rows[0]["rounds_ms"]) == SMALL.rounds
            assert rows[0]["facts"]["layers"]
        assert f"network {name} through torch.compile" in missing
        for variant, _ in ENGINE_VARIANTS:
            rows = [r for r in found["engines"] if (r["network"], r["variant"]) == (name, variant)]
            assert len(rows) + missing.count(f"engine {name}, {variant}") == 1
    for kind in KINDS:
        timed = [r for r in found["products"] if r["kind"] == kind]
        if kind.startswith("2:4"):
            assert not timed
            assert f"product small, {kind}" in missing
        else:
            assert timed[0]["ms"] > 0
            assert timed[0]["speedup"] > 0
    solvers = {(r["task"], r["solver"]) for r in found["solver"]}
    assert solvers >= {(task, "torch, cpu") for task in SMALL.tasks}
    assert solvers >= {(task, "plain, CPU") for task in SMALL.tasks}


@pytest.mark.tensorrt_rtx
@pytest.mark.skipif(NO_RTX is not None, reason=str(NO_RTX))
@pytest.mark.skipif(why_no_gpu() is None, reason="a GPU is here")
def test_every_engine_is_built_where_none_runs(rehearsal):
    found, text = rehearsal
    reasons = [e["reason"] for e in found["missing"] if e["what"].startswith("engine ")]
    assert len(reasons) == len(SMALL.networks) * len(ENGINE_VARIANTS)
    for reason in reasons:
        assert reason.startswith("built by TensorRT-RTX ")
        assert reason.endswith(f"and not run: {why_no_gpu()}")
    assert "## Engines" not in text


def test_the_table_of_engines_says_which_kernels_are_sparse():
    row = {
        "network": "net", "batch": 8, "variant": "2:4+int8", "library": "TensorRT 10.9", "ms": 1.0,
        "ms_with_copies": 1.5, "speedup": 1.25, "error": 0.01, "sparse_found": 12,
        "sparse_chosen": None, "predicted_macs": 2.0, "predicted_bops": 4.0,
    }  # fmt: skip
    dense = {**row, "variant": "dense fp16", "speedup": None}
    *_, first, second = engine_table([dense, row])
    assert " | - | 2.00x | 4.00x | - | 1 % | TensorRT 10.9 |" in first
    assert " | 1.25x | 2.00x | 4.00x | ?/12 | 1 % |" in second
    assert engine_table([]) == []


def test_what_macs_and_bops_promise_stands_beside_what_was_measured(rehearsal):
    found, text = rehearsal
    by_variant = {
        r["variant"]: r for r in found["networks"] if r["network"] == SMALL.networks[1][0]
    }
    assert by_variant["dense fp16"]["predicted_macs"] == 1.0
    assert by_variant["dense fp16"]["predicted_bops"] == 1.0
    assert by_variant["int8"]["predicted_macs"] == 1.0
    assert 1.0 < by_variant["int8"]["predicted_bops"] <= 2.0
    assert by_variant["2:4 fp16"]["predicted_macs"] == by_variant["2:4 fp16"]["predicted_bops"]
    assert by_variant["2:4+int8"]["predicted_bops"] > by_variant["int8"]["predicted_bops"]
    assert text.startswith("# Rehearsal on the CPU: no measurement")
    assert "random weights" in text
    assert "the CPU has no 2:4 product" in text


def test_when_the_time_is_up_everything_is_named():
    found = measure(SMALL, CPU, 0.0, lambda text: None)
    assert not found.solver
    assert not found.products
    assert not found.networks
    reasons = {each.what: each.reason for each in found.missing}
    assert reasons["network small ViT"] == "the time was up"
    assert reasons["solver 8x64 2:4"] == "the time was up"


def test_a_wrong_product_is_named_and_not_timed(monkeypatch):
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: real(a, b) + 3000)
    found = Findings(time.monotonic() + 60, 60)
    gpu.product_speed(SMALL, CPU, found)
    assert "int8" not in {r["kind"] for r in found.products}
    reason = next(e.reason for e in found.missing if e.what == "product small, int8")
    assert reason.startswith("its outputs are off by")


def test_a_rehearsal_is_no_result(capsys):
    assert main(["--cpu-rehearsal", "--output", str(RESULTS)]) == 2
    assert "rehearsal measures nothing" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "no CUDA device works here; --cpu-rehearsal" in capsys.readouterr().err


def test_two_of_four_keeps_the_largest():
    weight = torch.randn(8, 32)
    kept = two_four(weight)
    assert is_two_four(kept)
    assert int((kept != 0).sum()) == weight.numel() // 2
    lost = weight.abs().reshape(8, -1, 4).topk(2, 2, largest=False).values
    torch.testing.assert_close((weight - kept).square().sum(), lost.square().sum())
