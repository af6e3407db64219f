"""What a command says, and where: results on stdout, progress on stderr, JSON on request."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console, RenderableType
from rich.text import Text

from obc_deploy.errors import ArtifactError
from obc_deploy.whole_files import whole_file

Stage: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""

STDOUT = "-"
LOG_WIDTH = 120
PATIENCE_S = 3.0
"""Seconds before a command that nobody watches starts to say what it is doing."""


def check_writable(path: Path, what: str) -> None:
    """Make sure that a file can be written there, before the work that fills it.

    Raises:
        ArtifactError: it is a folder, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise ArtifactError(f"cannot write {what} to '{path}': it is a folder; name a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ArtifactError(
            f"cannot write {what} to '{path}': there is no folder '{parent}'; make it first"
        )
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ArtifactError(f"cannot write {what} to '{path}': no permission; choose another place")


def _write_whole(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():
        # A pipe or a device is written to, never replaced.
        path.write_text(text, encoding="utf-8")
        return
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _width() -> int | None:
    """Columns of stdout: a log has room for all of a table, a terminal says itself."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH


class Output:
    """Where one command's results go.

    Args:
        json_file: a file, "-" for stdout (then nothing else is printed there), or None.

    Raises:
        ArtifactError: the file cannot be written.
    """

    def __init__(self, json_file: str | None) -> None:
        self._json = json_file
        self.console = Console(highlight=False, emoji=False, width=_width())
        self.errors = Console(stderr=True, highlight=False, emoji=False)
        if json_file is not None and json_file != STDOUT:
            check_writable(Path(json_file), "JSON")

    @property
    def quiet(self) -> bool:
        """Stdout is for JSON alone."""
        return self._json == STDOUT

    def show(self, *parts: RenderableType) -> None:
        """Print tables and the like for a reader."""
        if not self.quiet:
            self.console.print(*parts)

    def line(self, text: str, style: str = "") -> None:
        """Print one line as it is, however long: paths and commands stay whole."""
        if not self.quiet:
            self.console.print(Text(text, style=style), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line that a reader should not miss."""
        self.line(f"note: {text}", style="yellow")

    def results(self, value: Any) -> None:
        """Write the results as JSON where that was asked for.

        Raises:
            ArtifactError: the file cannot be written.
        """
        if self._json is None:
            return
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
        if self.quiet:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        try:
            _write_whole(Path(self._json), text)
        except OSError as error:
            raise ArtifactError(
                f"cannot write JSON to '{self._json}': {error.strerror}; choose another place"
            ) from error

    @contextlib.contextmanager
    def working(self) -> Iterator[Stage]:
        """Show progress on stderr: a bar in a terminal, else a line a stage once it takes long.

        Whatever a library prints on stdout meanwhile goes to stderr, so that results stay alone.
        """
        with contextlib.redirect_stdout(sys.stderr):
            if self.errors.is_terminal:
                yield from self._bar()
            else:
                yield self._lines()

    def _bar(self) -> Iterator[Stage]:
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.errors, transient=True) as progress:
            task = progress.add_task("starting", total=1.0)

            def show(what: str, share: float) -> None:
                progress.update(task, description=what, completed=min(1.0, share))

            yield show

    def _lines(self) -> Stage:
        start, said = time.monotonic(), ""

        def say(what: str, share: float) -> None:
            nonlocal said
            elapsed = time.monotonic() - start
            if what != said and elapsed > PATIENCE_S:
                self.errors.print(Text(f"{elapsed:6.0f} s  {what}"), soft_wrap=True)
                said = what

        return say
