"""Latency tables: what each layer costs at each level, in milliseconds of one machine and runtime.

    latency(plan) = fixed + Σ ms(layer, scheme) + ms of a change · changes along the network

The last term counts changes between dense and sparse neighbours, for runtimes that fuse those which
are alike; a layer's own times come from networks where all are.

Tables are measured (`obc_deploy.benchmarks.latency`), never guessed, and hold for the machine that
they were measured on. All their milliseconds are of one speed of the machine: that at which the
dense network takes `dense_ms`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from obc_deploy.errors import LatencyError
from obc_deploy.manifest import write_json
from obc_deploy.schemes import Scheme, as_scheme, changes_between

if TYPE_CHECKING:
    from obc_deploy.layers import Layer

SCHEMA_VERSION: Literal[2] = 2
CACHE_VARIABLE = "OBC_DEPLOY_CACHE"
"""Folder of latency tables and databases; the user's cache folder where it is not set."""
MACHINE_FIELDS = ("cpu", "cpu_features", "physical_cores", "usable_cores")
"""What of a fingerprint decides how fast a network runs."""


class TimedNetwork(BaseModel):
    """One whole network that the table was made from.

    Attributes:
        scheme: what all layers had that could have it; in a mixed network, every few layers.
        ms: end to end, at the table's speed.
        layers_ms: the part of it that layers took; the rest belongs to none. In a mixed network,
            what their own times add up to.
        changes: between dense and sparse neighbours, beyond those that a layer's own times have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str
    ms: float
    layers_ms: float
    changes: int = 0


class LatencyTable(BaseModel):
    """Milliseconds of one inference, layer by layer and level by level.

    Attributes:
        schema_version: of this file.
        target: what the network was exported for.
        runtime: what ran it.
        runtime_version: its version.
        exporter: checksum of what wrote the networks that were timed, and of our own kernels.
        threads: threads it computed with.
        batch_size: samples in one inference.
        machine: fingerprint of the machine.
        network: `network_key` of the network's layers.
        layers: layer name to scheme to ms.
        fixed_ms: what an inference takes beside its layers.
        dense_ms: what the dense float network takes.
        change_ms: what it takes more for a layer with zeros to skip to follow one without, or the
            reverse, where both could be either.
        networks: the networks that were timed.
        created: when.
        command: by which command.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = SCHEMA_VERSION
    target: str
    runtime: str
    runtime_version: str
    exporter: str = ""
    threads: int
    batch_size: int
    machine: dict[str, Any]
    network: str
    layers: dict[str, dict[str, float]]
    fixed_ms: float
    dense_ms: float
    change_ms: float = 0.0
    networks: tuple[TimedNetwork, ...] = ()
    created: str = ""
    command: str = ""

    def ms(self, layer: str, scheme: Scheme | str) -> float:
        """What a layer takes.

        Raises:
            LatencyError: it was not measured.
        """
        found = self.layers.get(layer, {}).get(str(as_scheme(scheme)))
        if found is None:
            raise LatencyError(
                f"the latency table has no time of layer '{layer}' at '{scheme}'; measure it again "
                "with this level"
            )
        return found

    def predict(self, schemes: Mapping[str, Scheme | str]) -> float:
        """Milliseconds of a network whose layers have these schemes: fixed part, sum and changes.

        Raises:
            LatencyError: a layer was not measured at its scheme.
        """
        layers_ms = sum(self.ms(name, scheme) for name, scheme in schemes.items())
        return self.fixed_ms + layers_ms + self.change_ms * self.changes(schemes)

    @property
    def neighbours(self) -> tuple[tuple[str, str], ...]:
        """Layers next to one another in the network, each of which can be dense or sparse.

        One that can only be either is always next to the same: its neighbours' times have that.
        """
        return neighbours(self.layers)

    def changes(self, schemes: Mapping[str, Scheme | str]) -> int:
        """How many neighbours are not alike: one has zeros to skip and the other has none."""
        return sum(
            changes_between((as_scheme(schemes[one]), as_scheme(schemes[other])))
            for one, other in self.neighbours
            if one in schemes and other in schemes
        )

    def speedup(self, schemes: Mapping[str, Scheme | str]) -> float:
        """How many times faster than the dense float network that is."""
        return self.dense_ms / self.predict(schemes)

    def check(
        self,
        layers: Sequence[Layer],
        machine: Mapping[str, Any],
        *,
        exporter: str,
        allow_foreign: bool = False,
    ) -> None:
        """Make sure that the table says something of this network on this machine.

        Args:
            layers: the network's.
            machine: fingerprint of this machine.
            exporter: checksum of what writes the target's files here.
            allow_foreign: take times of another machine, or of files of another exporter.

        Raises:
            LatencyError: it is of other layers, or of another machine or another exporter and that
                is not allowed.
        """
        if self.network != network_key(layers):
            raise LatencyError(
                f"the latency table has times of other layers ({len(self.layers)} of them) than "
                f"this network's {len(layers)}; measure this network"
            )
        differing = [
            field for field in MACHINE_FIELDS if self.machine.get(field) != machine.get(field)
        ]
        if differing and not allow_foreign:
            field = differing[0]
            raise LatencyError(
                f"the latency table was measured on another machine ({field} "
                f"{self.machine.get(field)}, here {machine.get(field)}); measure here, or take it "
                "all the same with --allow-foreign-latency"
            )
        if self.exporter != exporter and not allow_foreign:
            raise LatencyError(
                "the latency table was measured with another version of what writes and runs "
                f"{self.target} files (checksum {self.exporter[:12] or 'unknown'}, here "
                f"{exporter[:12]}); measure again, or take it all the same with "
                "--allow-foreign-latency"
            )


def neighbours(layers: Mapping[str, Iterable[Scheme | str]]) -> tuple[tuple[str, str], ...]:
    """Layers next to one another, each of which can be dense or sparse.

    Args:
        layers: name to what the layer can be, in the network's order.
    """
    either = {
        name: len({as_scheme(scheme).skips_zeros for scheme in schemes}) == 2
        for name, schemes in layers.items()
    }
    return tuple((one, other) for one, other in pairwise(layers) if either[one] and either[other])


def network_key(layers: Sequence[Layer]) -> str:
    """SHA-256 of the layers' names, kinds, shapes and operations: what latency depends on."""
    described = [
        [layer.name, layer.kind.value, list(layer.weight_shape), layer.macs] for layer in layers
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def read_table(path: Path | str) -> LatencyTable:
    """A table from its file.

    Raises:
        LatencyError: there is none, or it cannot be read.
    """
    try:
        return LatencyTable.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LatencyError(f"cannot read latency table '{path}': {error.strerror}") from error
    except ValidationError as error:
        first = str(error).splitlines()[0]
        raise LatencyError(
            f"latency table '{path}' is damaged or of another version ({first}); delete it, and "
            "it is measured again"
        ) from error


def write_table(path: Path | str, table: LatencyTable) -> None:
    """Write a table, whole or not at all.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(path), table)


def cache_folder() -> Path:
    """Where tables and databases that nobody named are kept."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "obc-deploy"


def table_file(
    layers: Sequence[Layer],
    machine: Mapping[str, Any],
    *,
    target: str,
    runtime_version: str,
    threads: int | None,
    batch_size: int,
    exporter: str,
) -> Path:
    """Where the table of this network, machine, target, runtime and exporter is kept."""
    what = [
        network_key(layers),
        {field: machine.get(field) for field in MACHINE_FIELDS},
        target,
        runtime_version,
        threads,
        batch_size,
        exporter,
    ]
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]
    return cache_folder() / "latency" / f"{target}-{name}.json"
