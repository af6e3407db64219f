"""A benchmark's record: the command, the time, the machine and the versions above its results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obc_deploy.manifest import now, versions, write_json
from obc_deploy.runtimes.fingerprint import Fingerprint, take_fingerprint

RESULTS = Path(__file__).resolve().parent / "results"


def say_stages() -> Callable[[str, float], None]:
    """A progress that names each stage on stderr when it begins."""
    last = ""

    def say(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            print(what, file=sys.stderr, flush=True)
            last = what

    return say


@dataclass(frozen=True)
class Record:
    """What every result file begins with.

    Attributes:
        command: what to type for the same results.
        created: the time in UTC, to the second.
        machine: where it ran.
        versions: of this package and of what its results depend on.
    """

    command: str
    created: str
    machine: Fingerprint
    versions: dict[str, str]

    @property
    def head(self) -> str:
        """Command and processor as Markdown; a comma and the conditions may follow."""
        return f"`{self.command}`\n\n{self.machine.cpu}"

    def write(self, folder: Path, name: str, results: Mapping[str, Any], text: str) -> None:
        """Write `<name>.json`, this record and the results, and `<name>.md`; print the latter.

        Args:
            folder: where to; made if need be.
            name: of both files.
            results: JSON-ready values.
            text: the same for readers, in Markdown.

        Raises:
            OSError: the folder cannot be made.
            RunDirectoryError: the JSON file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "command": self.command,
            "created": self.created,
            "machine": self.machine.as_dict(),
            "versions": self.versions,
        }
        write_json(folder / f"{name}.json", described | dict(results))
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)


def take_record(benchmark: str) -> Record:
    """The record of this run of `obc_deploy.benchmarks.<benchmark>`, as of now."""
    command = f"python -m obc_deploy.benchmarks.{benchmark} {' '.join(sys.argv[1:])}".strip()
    return Record(command, now(), take_fingerprint(), versions())
