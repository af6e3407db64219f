"""Latency tables: predictions, files, and whom they are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_networks import Plain, Residual, build, samples

from obc_deploy.calibrated import calibrate
from obc_deploy.errors import LatencyError
from obc_deploy.latency import (
    LatencyTable,
    cache_folder,
    network_key,
    read_table,
    table_file,
    write_table,
)

EXPORTER = "f" * 64
MACHINE = {"cpu": "Abacus", "cpu_features": ["avx2"], "physical_cores": 2, "usable_cores": 2}


@pytest.fixture(scope="module")
def layers():
    return calibrate(build(Plain), samples(Plain)).layers


@pytest.fixture
def table(layers):
    return LatencyTable(
        target="onnxruntime", runtime="onnxruntime", runtime_version="1", exporter=EXPORTER,
        threads=1, batch_size=1, machine=MACHINE, network=network_key(layers), fixed_ms=0.5,
        dense_ms=8.0,
        layers={
            "conv1": {"w8a8": 1.0, "2:4+w8a8": 0.5},
            "conv2": {"w8a8": 2.0, "2:4+w8a8": 1.0},
            "fc": {"w8a8": 0.5},
        },
    )  # fmt: skip


def test_a_prediction_is_the_fixed_part_and_the_sum(table) -> None:
    schemes = {"conv1": "2:4+w8a8", "conv2": "w8a8", "fc": "w8a8"}
    assert table.predict(schemes) == 3.5
    assert table.speedup(schemes) == 8.0 / 3.5


def test_changes_between_neighbours_that_could_be_alike_cost_more(table) -> None:
    changing = table.model_copy(update={"change_ms": 0.25})
    assert changing.neighbours == (("conv1", "conv2"),)
    schemes = {"conv1": "2:4+w8a8", "conv2": "w8a8", "fc": "w8a8"}
    assert changing.predict(schemes) == 3.75
    # The last layer is always dense: what that costs is in the times of conv2.
    assert changing.predict({**schemes, "conv2": "2:4+w8a8"}) == 2.5


def test_what_was_not_measured_is_not_guessed(table) -> None:
    with pytest.raises(LatencyError, match="layer 'fc' at '2:4"):
        table.predict({"fc": "2:4+w8a8"})


def test_a_table_is_for_its_machine_and_its_network(table, layers) -> None:
    table.check(layers, MACHINE, exporter=EXPORTER)
    other = {**MACHINE, "cpu": "Difference Engine"}
    with pytest.raises(LatencyError, match=r"Difference Engine.*--allow-foreign-latency"):
        table.check(layers, other, exporter=EXPORTER)
    table.check(layers, other, exporter=EXPORTER, allow_foreign=True)
    strangers = calibrate(build(Residual), samples(Residual)).layers
    with pytest.raises(LatencyError, match="other layers"):
        table.check(strangers, MACHINE, exporter=EXPORTER, allow_foreign=True)


@pytest.mark.parametrize(
    ("written_by", "named"), [("0123456789abcdef", "0123456789ab"), ("", "unknown")]
)
def test_a_table_is_of_one_exporters_files(table, layers, written_by, named) -> None:
    older = table.model_copy(update={"exporter": written_by})
    with pytest.raises(LatencyError, match=rf"version.*checksum {named}, here {EXPORTER[:12]}\)"):
        older.check(layers, MACHINE, exporter=EXPORTER)
    older.check(layers, MACHINE, exporter=EXPORTER, allow_foreign=True)


def test_the_network_is_known_by_shapes_not_weights(layers) -> None:
    again = calibrate(build(Plain, seed=1), samples(Plain)).layers
    assert network_key(again) == network_key(layers)
    assert network_key((replace(layers[0], macs=layers[0].macs + 1), *layers[1:])) != network_key(
        layers
    )


def test_files(table, tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    write_table(path, table)
    assert read_table(path) == table
    path.write_text(path.read_text()[:-40])
    with pytest.raises(LatencyError, match="damaged"):
        read_table(path)
    with pytest.raises(LatencyError, match="No such file"):
        read_table(tmp_path / "none.json")


def test_the_cache_tells_machines_and_threads_apart(
    layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBC_DEPLOY_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path

    def name(machine=MACHINE, threads=1, exporter="a"):
        return table_file(
            layers, machine, target="onnxruntime", runtime_version="1", threads=threads,
            batch_size=1, exporter=exporter,
        )  # fmt: skip

    assert name() == name(dict(MACHINE, load_average=[9.0]))
    others = name(threads=2), name(exporter="b"), name({**MACHINE, "cpu": "Difference Engine"})
    assert len({name(), *others}) == 4
    monkeypatch.delenv("OBC_DEPLOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "obc-deploy"
