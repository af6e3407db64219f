"""Latency tables measured in ONNX Runtime, and what a profile says of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_networks import Plain, Residual, build, samples
from torch import nn
from torch.nn import functional

from obc_deploy.benchmarks import latency
from obc_deploy.benchmarks.latency import (
    LatencySettings,
    latency_table,
    layer_shares,
    measure_table,
)
from obc_deploy.benchmarks.pruned_copies import pruned_copy
from obc_deploy.calibrated import calibrate
from obc_deploy.compression import compress
from obc_deploy.errors import LatencyError
from obc_deploy.exporters.exporter_checksum import exporter_checksum
from obc_deploy.latency import read_table
from obc_deploy.runtimes import sparse
from obc_deploy.runtimes.audit import Audit, AuditedLayer
from obc_deploy.runtimes.contract import LayerProfile
from obc_deploy.runtimes.regions import separated
from obc_deploy.schemes import Scheme
from obc_deploy.targets import (
    DEEPSPARSE,
    ONNXRUNTIME,
    ONNXRUNTIME_QOPERATOR,
    ORT_SPARSE,
    Processor,
)

QUICK = LatencySettings(threads=1, rounds=1)
W8A8, SPARSE = Scheme.parse("w8a8"), Scheme.parse("2:4+w8a8")


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(build(Residual), samples(Residual))


@pytest.fixture(scope="module")
def levels(calibrated):
    middle = {"second", "third"}
    return {
        layer.name: (W8A8, SPARSE) if layer.name in middle else (W8A8,)
        for layer in calibrated.layers
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(cache, monkeypatch):
    monkeypatch.setenv("OBC_DEPLOY_CACHE", str(cache))
    return cache


@pytest.fixture
def table(here, calibrated, levels):
    return latency_table(calibrated, ONNXRUNTIME_QOPERATOR, levels, QUICK)


def test_every_level_of_every_layer_is_timed(table, levels) -> None:
    for name, schemes in levels.items():
        assert set(table.layers[name]) == {str(scheme) for scheme in schemes}
        assert all(ms >= 0.0 for ms in table.layers[name].values())
    assert [one.scheme for one in table.networks] == ["w8a8", "2:4+w8a8"]
    assert table.dense_ms > 0.0


def test_a_uniform_network_is_what_its_layers_and_the_rest_take(table, levels) -> None:
    """The table is made of the networks: with fixed parts alike it gives them back."""
    for one in table.networks:
        chosen = {
            name: one.scheme if one.scheme in table.layers[name] else "w8a8" for name in levels
        }
        spread = max(o.ms for o in table.networks) - min(o.ms for o in table.networks)
        assert abs(table.predict(chosen) - one.ms) <= spread + 0.5 * one.ms
        assert 0.0 <= one.layers_ms <= one.ms


def test_the_second_time_it_comes_from_the_cache(table, here, calibrated, levels) -> None:
    (file,) = (here / "latency").iterdir()
    assert read_table(file) == table
    said = []
    again = latency_table(
        calibrated, ONNXRUNTIME_QOPERATOR, levels, QUICK, progress=lambda *what: said.append(what)
    )
    assert again == table
    assert said == []


def test_tables_are_told_apart_by_what_writes_and_runs_the_files(tmp_path: Path, monkeypatch):
    plain, ours = (exporter_checksum(target) for target in (ONNXRUNTIME_QOPERATOR, ORT_SPARSE))
    assert plain == exporter_checksum(ONNXRUNTIME_QOPERATOR)
    assert (plain != ours) == sparse.is_available()
    library = tmp_path / "another.so"
    library.write_bytes(b"kernels of another build")
    monkeypatch.setattr(sparse, "is_available", lambda: True)
    monkeypatch.setattr(sparse, "library_path", lambda: library)
    assert exporter_checksum(ORT_SPARSE) not in (plain, ours)
    assert exporter_checksum(ONNXRUNTIME_QOPERATOR) == plain


def test_a_named_table_must_be_of_this_target_network_and_levels(
    table, calibrated, levels, tmp_path: Path
) -> None:
    file = tmp_path / "table.json"
    file.write_text(table.model_dump_json())
    target = ONNXRUNTIME_QOPERATOR
    assert latency_table(calibrated, target, levels, QUICK, file=file) == table
    with pytest.raises(LatencyError, match="of target onnxruntime-qoperator, not onnxruntime"):
        latency_table(calibrated, ONNXRUNTIME, levels, QUICK, file=file)
    more = {**levels, "head": (W8A8, Scheme.parse("w4a8"))}
    with pytest.raises(LatencyError, match="layer 'head' at 'w4a8'"):
        latency_table(calibrated, target, more, QUICK, file=file)
    other = calibrate(build(Plain), samples(Plain))
    with pytest.raises(LatencyError, match="other layers"):
        latency_table(other, target, {}, QUICK, file=file)
    foreign = table.model_copy(update={"machine": {**table.machine, "cpu": "Abacus"}})
    file.write_text(foreign.model_dump_json())
    with pytest.raises(LatencyError, match="Abacus"):
        latency_table(calibrated, target, levels, QUICK, file=file)
    taken = latency_table(calibrated, target, levels, QUICK, file=file, allow_foreign=True)
    assert taken == foreign


@pytest.mark.parametrize("target", [ONNXRUNTIME_QOPERATOR, DEEPSPARSE], ids=lambda t: t.name)
@pytest.mark.parametrize("pattern", ["2:4", "block4@0.75", "unstructured@0.6"])
def test_copies_have_the_patterns_zeros_and_no_others(
    calibrated, target, pattern, tmp_path: Path
) -> None:
    made = compress(calibrated, scheme="w8a8", target=target, method="rtn", baselines=False)
    artifact = made.export(tmp_path / "whole.onnx", target=target, check=False)
    schemes = {layer.name: Scheme.parse("w8a8") for layer in calibrated.layers}
    schemes |= dict.fromkeys(("second", "head"), Scheme.parse(f"{pattern}+w8a8"))
    pruned_copy(artifact, calibrated.folded_layers, schemes, tmp_path / "copy.onnx")
    before, after = (
        {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
        for path in (artifact.path, tmp_path / "copy.onnx")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"second", "head"}
    for name in changed:
        old, new = before[name], after[name]
        kept = new != 0
        assert np.array_equal(new[kept], old[kept])
        sparsity = Scheme.parse(pattern).pattern.sparsity
        assert 1.0 - kept.mean() >= sparsity - 0.03
        if pattern == "block4@0.75" and new.ndim == 4:
            blocks = kept.reshape(new.shape[0], -1, 4, *new.shape[2:])
            assert (1.0 - blocks.any(2).mean()) == pytest.approx(0.75, abs=0.01)


def test_changes_are_measured_where_neighbours_are_fused(here, calibrated, levels) -> None:
    """On ONNX Runtime, which ignores zeros, a change costs next to nothing."""
    fusing = replace(ONNXRUNTIME_QOPERATOR, fuses_alike=True)
    table = measure_table(calibrated, fusing, levels, QUICK)
    assert table.neighbours == (("second", "third"),)
    mixed = [one for one in table.networks if one.scheme.startswith("every")]
    assert {one.changes for one in mixed} == {0, 1}
    assert 0.0 <= table.change_ms < 0.5 * table.dense_ms
    schemes = {name: own[0] for name, own in levels.items()} | {"third": SPARSE}
    assert table.predict(schemes) == pytest.approx(
        table.fixed_ms
        + table.change_ms
        + sum(table.ms(name, scheme) for name, scheme in schemes.items())
    )


def _audit(steps, layers):
    return Audit("runtime", "1", 1.0, tuple(layers), tuple(steps), fallback=False, reasons=())


def _layer(name, step, *fused):
    return AuditedLayer(name, "Conv", (f"{name}_out", *fused), step, None, None, None, True, True)


def test_shares_of_fused_layers_go_by_their_operations() -> None:
    steps = [LayerProfile("a", "conv", 2.0), LayerProfile("bc", "chain", 6.0)]
    steps.append(LayerProfile("relu", "elementwise", 2.0))
    layers = [_layer("a", "a"), _layer("b", "bc"), _layer("c", "bc", "c_relu"), _layer("d", None)]
    outputs = {"a": "a_out", "b": "b_out", "c": "c_relu", "d": "d_out", "e": "nowhere"}
    macs = {"a": 5.0, "b": 1.0, "c": 2.0, "d": 1.0, "e": 1.0}
    shares = layer_shares(_audit(steps, layers), outputs, macs)
    # The ReLU runs behind b and c.
    assert shares == pytest.approx({"a": 0.2, "b": 0.8 / 3, "c": 1.6 / 3, "d": 0.0, "e": 0.0})


def test_steps_between_layers_go_to_the_layer_before() -> None:
    steps = [
        LayerProfile(name, "any", ms)
        for name, ms in (("first", 1.0), ("a", 2.0), ("add", 3.0), ("pool", 1.0), ("b", 3.0))
    ]
    found = _audit(steps, [_layer("a", "a"), _layer("b", "b")])
    shares = layer_shares(found, {"a": "a_out", "b": "b_out"}, {"a": 1.0, "b": 1.0})
    assert shares == pytest.approx({"a": 0.6, "b": 0.3})


def test_shares_of_nothing_are_nothing() -> None:
    steps = [LayerProfile("a", "conv", 0.0)]
    assert layer_shares(_audit(steps, [_layer("a", "a")]), {"a": "a_out"}, {"a": 0.0}) == {"a": 0.0}


def test_codes_that_are_not_there_are_missed(calibrated, tmp_path: Path) -> None:
    made = compress(calibrated, scheme="dense", baselines=False)
    artifact = made.export(tmp_path / "float.onnx", target=ONNXRUNTIME, check=False)
    schemes = {layer.name: SPARSE for layer in calibrated.layers}
    with pytest.raises(LatencyError, match="no integer codes"):
        pruned_copy(replace(artifact), calibrated.folded_layers, schemes, tmp_path / "copy.onnx")


class Wide(nn.Module):
    """Convolutions that are large enough to gain from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = functional.relu(self.second(functional.relu(self.first(x))))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.skipif(not sparse.is_available(), reason="the sparse kernels are not built")
def test_sparse_levels_are_timed_on_the_sparse_operators(tmp_path: Path) -> None:
    """The choice of operators is part of the level: a copy of the dense file would not have it."""
    wide = calibrate(Wide().eval(), torch.randn(8, 3, 16, 16))
    scheme = Scheme.parse("block4@0.9+w8a8")
    levels = {layer.name: (W8A8, scheme) for layer in wide.layers if layer.name == "second"}
    levels |= {layer.name: (W8A8,) for layer in wide.layers if layer.name != "second"}
    target = replace(ORT_SPARSE, processor=Processor.ZEN_4)
    wanted = latency._wanted(levels, target)
    dense, pruned = latency._written(wide, target, wanted, tmp_path, QUICK, lambda *_: None)
    stored = []
    for each in (dense, pruned):
        graph = separated(onnx.load(each.path)).graph
        (blocks,) = (one for one in graph.initializer if one.name == "second.weight_codes_blocks")
        assert any(
            node.op_type == "SparseConvolution" and blocks.name in node.input for node in graph.node
        )
        stored.append(blocks.dims[0])
    assert stored[1] == pytest.approx(0.1 * stored[0], rel=0.1)
