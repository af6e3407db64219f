"""A library that the package's build makes where there is a C++ compiler, or why it is missing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

Signatures = Mapping[str, tuple[Any, Sequence[Any]]]
"""Result and arguments of C functions by name."""


@dataclass(frozen=True)
class CompiledLibrary:
    """What was found.

    Attributes:
        path: its file; None where it is missing.
        library: loaded, the functions' types set; None where it is missing.
        why_missing: with the fix; empty where it is there.
    """

    path: Path | None
    library: ctypes.CDLL | None
    why_missing: str


def missing(reason: str) -> CompiledLibrary:
    """None, for a reason."""
    return CompiledLibrary(None, None, reason)


def find_library(
    folder: Path, stem: str, signatures: Signatures, *, disable: str, other: str
) -> CompiledLibrary:
    """Load the library `stem` of a folder.

    Args:
        folder: of the package that it belongs to.
        stem: its name without the suffix that Python gives extensions.
        signatures: the functions to look up.
        disable: variable of the environment that does without it where it is 0.
        other: variable of the environment that names another build's file.
    """
    if os.environ.get(disable) == "0":
        return missing(f"{disable}=0 switches them off")
    files = [folder / f"{stem}{suffix}" for suffix in EXTENSION_SUFFIXES]
    named = os.environ.get(other)
    file = Path(named) if named else next((each for each in files if each.is_file()), None)
    if file is None:
        return missing(
            "not built: install a C++17 compiler (g++ or clang++), then the package again"
        )
    try:
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
    except (OSError, AttributeError) as error:
        fix = f"unset {other}" if named else "install the package again"
        return missing(f"'{file.name}' does not load ({error}): {fix}")
    return CompiledLibrary(file, library, "")
