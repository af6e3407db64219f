"""`obc-deploy runtimes`: which there are, and how they come and go."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from obc_deploy.commands import options as o
from obc_deploy.commands.output import Output
from obc_deploy.errors import RuntimeMissingError

RuntimeName = Annotated[
    str, typer.Argument(metavar="NAME", help="The runtime, such as deepsparse.", show_default=False)
]


def list_runtimes(json: o.JsonFile = None) -> None:
    """List the runtimes, installed or not."""
    from rich.table import Table
    from rich.text import Text

    from obc_deploy.runtimes.registry import RUNTIMES

    out = Output(json)
    found = [runtime.info() for runtime in RUNTIMES.values()]
    table = Table("name", "works", "version", "if not")
    for info in found:
        table.add_row(
            info.name, "yes" if info.works else "no", info.version or "-",
            Text("" if info.works else info.install_command),
        )  # fmt: skip
    out.show(table)
    for info in found:
        if info.reason:
            out.line(f"{info.title}: {info.reason}")
        if info.licence:
            out.line(f"{info.title}: {info.licence}")
    out.results([info.as_dict() for info in found])


def install(
    name: RuntimeName,
    python: Annotated[
        Path | None,
        typer.Option(
            "--python",
            metavar="PATH",
            help="The Python interpreter to build its environment on.",
            show_default="the first that fits",
        ),
    ] = None,
    json: o.JsonFile = None,
) -> None:
    """Install a runtime in an environment of its own."""
    from obc_deploy.runtimes.environments import install as install_environment
    from obc_deploy.runtimes.registry import runtime_info

    out = Output(json)
    before = runtime_info(name)
    if before.licence:
        out.line(f"{before.title}: {before.licence}")
    with out.working() as say:
        interpreter = install_environment(name, python, say=lambda line: say(line[:100], 0.0))
    info = runtime_info(name)
    out.line(f"{info.title} {info.version or ''} is installed: {interpreter}")
    out.results(info.as_dict())


def remove(name: RuntimeName, json: o.JsonFile = None) -> None:
    """Remove a runtime's own environment from the disk."""
    from obc_deploy.runtimes.environments import ENVIRONMENTS, find_environment

    out = Output(json)
    environment = ENVIRONMENTS.get(name)
    if environment is None:
        known = ", ".join(sorted(ENVIRONMENTS))
        raise RuntimeMissingError(f"'{name}' has no environment to remove; those with one: {known}")
    interpreter = find_environment(environment)
    if interpreter is None:
        raise RuntimeMissingError(f"'{name}' is not installed: there is nothing to remove")
    folder = interpreter.parent.parent
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise RuntimeMissingError(f"cannot remove '{folder}': {error.strerror}") from error
    out.line(f"removed {folder}")
    out.results({"removed": str(folder)})
