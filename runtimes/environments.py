"""Python environments of their own for runtimes whose packages do not live with ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from obc_deploy.errors import RuntimeMissingError

MARKER = "obc-deploy.json"
"""Written last: an environment without it was never finished."""

FOLDER_VARIABLE = "OBC_DEPLOY_RUNTIMES"


@dataclass(frozen=True)
class Environment:
    """What goes into an environment.

    Attributes:
        name: the runtime.
        version: its version.
        requirement: what pip installs.
        module: what must be importable afterwards.
        pythons: minor versions of Python 3 it has builds for, the preferred first.
        variables: set whenever its interpreter runs.
    """

    name: str
    version: str
    requirement: str
    module: str
    pythons: tuple[int, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.version}"

    @property
    def python_range(self) -> str:
        """The versions it runs on, in words."""
        return f"Python 3.{min(self.pythons)} to 3.{max(self.pythons)}"


DEEPSPARSE = Environment(
    name="deepsparse",
    version="1.8.0",
    requirement="deepsparse==1.8.0",
    module="deepsparse",
    pythons=(11, 10, 9, 8),
    variables=(("NM_DISABLE_ANALYTICS", "True"),),
)

ENVIRONMENTS = {DEEPSPARSE.name: DEEPSPARSE}


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "obc-deploy" / "runtimes"


def search_folders() -> tuple[Path, ...]:
    """Where environments are looked for, the first one first."""
    folders = [Path(sys.prefix) / "share" / "obc-deploy" / "runtimes", _cache_folder()]
    if chosen := os.environ.get(FOLDER_VARIABLE):
        folders.insert(0, Path(chosen).expanduser().absolute())
    return tuple(folders)


def install_folder() -> Path:
    """Where environments are made: the named folder, our virtual environment, or the cache."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen).expanduser().absolute()
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "share" / "obc-deploy" / "runtimes"
    return _cache_folder()


def _finished(folder: Path, environment: Environment) -> Path | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    python = folder / "bin" / "python"
    current = marker.get("requirement") == environment.requirement
    # The interpreter is a link into another installation, which may have gone.
    return python if current and python.exists() else None


def find_environment(environment: Environment) -> Path | None:
    """The interpreter of a finished environment, or None."""
    for folder in search_folders():
        if python := _finished(folder / environment.folder, environment):
            return python
    return None


def interpreter_variables(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Our variables without those that steer our own interpreter, plus the given ones."""
    steering = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONWARNINGS", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    return {**kept, "PYTHONNOUSERSITE": "1", **(environment or {})}


def _interpreters(environment: Environment) -> Iterator[Path]:
    """Interpreters that may fit; a name on PATH promises nothing (pyenv has shims for all)."""
    yield Path(sys.executable)
    folders = [Path(part) for part in os.environ.get("PATH", "").split(os.pathsep) if part]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    uv = Path.home() / ".local" / "share" / "uv" / "python"
    for minor in environment.pythons:
        for folder in folders:
            yield folder / f"python3.{minor}"
        for versions, prefix in ((pyenv, ""), (uv, "cpython-")):
            for version in sorted(versions.glob(f"{prefix}3.{minor}.*")):
                yield version / "bin" / f"python3.{minor}"


def _refusal(python: Path, environment: Environment) -> str | None:
    """Why an interpreter does not fit, or None."""
    question = (
        "import ensurepip, json, sys, venv; "
        "print(json.dumps([sys.version_info[0], sys.version_info[1], sys.maxsize > 2**32]))"
    )
    try:
        answer = subprocess.run(
            [python, "-c", question],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=interpreter_variables(),
        )
        major, minor, wide = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return "does not run, or lacks the venv module"
    if major != 3 or minor not in environment.pythons or not wide:
        return f"is Python {major}.{minor}"
    return None


def find_python(environment: Environment, python: Path | None = None) -> Path:
    """An interpreter that the environment can be built on.

    Raises:
        RuntimeMissingError: none fits, or the given one does not.
    """
    if python is not None:
        if refusal := _refusal(python, environment):
            raise RuntimeMissingError(
                f"'{python}' {refusal}; {environment.name} {environment.version} needs "
                f"{environment.python_range} with venv"
            )
        return python
    tried = set()
    for candidate in _interpreters(environment):
        if candidate in tried or not candidate.is_file():
            continue
        tried.add(candidate)
        if _refusal(candidate, environment) is None:
            return candidate
    raise RuntimeMissingError(
        f"{environment.name} {environment.version} needs {environment.python_range} and none was "
        "found; install one (apt install python3.11-venv, uv python install 3.11, or "
        "pyenv install 3.11), or name it with --python PATH"
    )


_TELLING = ("Collecting", "Installing", "Successfully", "ERROR")


def _run(command: list[str | Path], what: str, say: Callable[[str], None]) -> None:
    """Run a step, passing its output on line by line.

    Raises:
        RuntimeMissingError: the step failed; the message has its last lines.
    """
    tail: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=interpreter_variables(),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if text := line.strip():
                    tail.append(text)
                    # Of an installer's chatter, what shows that it gets on.
                    if text.startswith(_TELLING):
                        say(text)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = " | ".join(tail)[-400:] or f"exit code {process.returncode}"
        raise RuntimeMissingError(
            f"{what} failed: {said}; check the network and the package index, then repeat"
        )


def _remove_abandoned(folder: Path, environment: Environment) -> None:
    for partial in folder.glob(f"{environment.folder}.partial-*"):
        owner = partial.name.rpartition("-")[2]
        if not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
            shutil.rmtree(partial, ignore_errors=True)


def _verify(python: Path, environment: Environment) -> None:
    check = subprocess.run(
        [python, "-c", f"import {environment.module}; print({environment.module}.__version__)"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=interpreter_variables(dict(environment.variables)),
    )
    if check.returncode:
        lines = check.stderr.strip().splitlines() or [f"exit code {check.returncode}"]
        raise RuntimeMissingError(
            f"{environment.requirement} was installed but cannot be imported ({lines[-1][:300]}); "
            "this machine may lack what it needs (a CPU with AVX2), see `obc-deploy doctor`"
        )


def install(
    name: str, python: Path | None = None, *, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Make the environment of a runtime, or find it made, and return its interpreter.

    It appears under its final name only when it works: an interrupted installation leaves nothing
    that a later one would trust.

    Args:
        name: the runtime ("deepsparse").
        python: the interpreter to build on; found where None.
        say: called with each line of progress.

    Raises:
        RuntimeMissingError: no environment of that name, no fitting Python, a folder that cannot be
            written, or pip failed; one line with the fix.
    """
    if name not in ENVIRONMENTS:
        known = ", ".join(sorted(ENVIRONMENTS))
        raise RuntimeMissingError(
            f"'{name}' has no environment to install; those with one: {known}"
        )
    environment = ENVIRONMENTS[name]
    if found := find_environment(environment):
        return found
    base = find_python(environment, python)
    folder = install_folder()
    final = folder / environment.folder
    partial = folder / f"{environment.folder}.partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder, environment)
        shutil.rmtree(partial, ignore_errors=True)
        say(f"making {final} on {base}")
        _run([base, "-m", "venv", partial], f"'{base} -m venv'", say)
        built = partial / "bin" / "python"
        pip: list[str | Path] = [built, "-m", "pip", "install", "--no-input"]
        _run(
            [*pip, "--disable-pip-version-check", environment.requirement],
            f"pip install {environment.requirement}",
            say,
        )
        say(f"checking that {environment.module} works")
        _verify(built, environment)
        marker = {"requirement": environment.requirement, "python": str(base)}
        (partial / MARKER).write_text(json.dumps(marker), encoding="utf-8")
        if _finished(final, environment) is None:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    except OSError as error:
        raise RuntimeMissingError(
            f"cannot make '{final}' ({error.strerror or error}); free the space or name another "
            f"folder in {FOLDER_VARIABLE}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final / "bin" / "python"
