"""Our sparse CPU kernels as a library of ONNX Runtime operators; OPERATORS.md says what they do.

The library is built with the package where there is a C++ compiler; `why_missing` says what is
wrong where there is none. Any host of ONNX Runtime 1.17 or later can load it, in Python so:

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from obc_deploy.compiled_library import (
    CompiledLibrary,
    Signatures,
    find_library,
    missing,
)
from obc_deploy.whole_files import whole_file

DOMAIN = "obc_deploy.sparse"
DOMAIN_VERSION = 3
"""Of what OPERATORS.md says: that of files that are written now."""
OLDEST_DOMAIN_VERSION = 2
"""The library runs files that were written for this one, and for all up to the present one."""
DISABLE_VARIABLE = "OBC_DEPLOY_SPARSE"
"""Set to 0 to do without the sparse kernels."""
LIBRARY_VARIABLE = "OBC_DEPLOY_SPARSE_LIBRARY"
"""Path of another build of the library to use, say one with sanitizers."""
INSTRUCTIONS_VARIABLE = "OBC_DEPLOY_SPARSE_INSTRUCTIONS"
"""Names the instruction set to use, in any host; the library reads it when it is loaded."""
COPY_NAME = "libobc_sparse"
"""What the library is called beside the files that need it, but for its ending."""
INSTRUCTION_SETS = ("portable", "avx2", "avx2_vnni", "avx512_vnni")
"""From the slowest to the fastest; all give the same integer results."""


_SIGNATURES: Signatures = {
    "obc_sparse_instruction_set": (ctypes.c_char_p, ()),
    "obc_sparse_use_instruction_set": (ctypes.c_int64, (ctypes.c_char_p,)),
    "obc_sparse_products_alone": (ctypes.c_int64, (ctypes.c_int64,)),
}


@cache
def _find() -> CompiledLibrary:
    found = find_library(
        Path(__file__).parent, "_kernels", _SIGNATURES,
        disable=DISABLE_VARIABLE, other=LIBRARY_VARIABLE,
    )  # fmt: skip
    wanted = os.environ.get(INSTRUCTIONS_VARIABLE, "")
    if wanted and found.library and found.library.obc_sparse_instruction_set().decode() != wanted:
        return missing(
            f"{INSTRUCTIONS_VARIABLE}={wanted} does not work on this processor: unset it, or set "
            f"it to one of {', '.join(INSTRUCTION_SETS)} that does"
        )
    return found


def _library() -> ctypes.CDLL:
    found = _find()
    if found.library is None:
        raise OSError(f"the sparse kernels are missing: {found.why_missing}")
    return found.library


def is_available() -> bool:
    """Whether the sparse kernels were built and load here."""
    return _find().library is not None


def why_missing() -> str:
    """What keeps the sparse kernels from working, with the fix; empty where they work."""
    return _find().why_missing


def library_path() -> Path:
    """The library that ONNX Runtime is to register.

    Raises:
        OSError: there is none; the message says why.
    """
    found = _find()
    if found.path is None:
        raise OSError(f"the sparse kernels are missing: {found.why_missing}")
    return found.path


def copy_library(folder: Path) -> Path:
    """Put the library beside a file that needs it, for hosts that do not have this package.

    It is the same for all processors of this kind: the instruction set is chosen when it is loaded.

    Args:
        folder: where the file lies.

    Returns:
        The copy; one that was there is replaced.

    Raises:
        OSError: the library is missing, or the folder cannot be written to.
    """
    library = library_path()
    copy = folder / f"{COPY_NAME}{library.suffix}"
    with whole_file(copy) as partial:
        shutil.copyfile(library, partial)
    return copy


def instruction_set() -> str:
    """The instruction set that new sessions use: one of `INSTRUCTION_SETS`.

    Raises:
        OSError: the library is missing.
    """
    name: bytes = _library().obc_sparse_instruction_set()
    return name.decode()


def products_alone(rounds: int) -> int:
    """Multiply blocks of four weights with pixels in registers alone, on the calling thread.

    The time it takes is the limit of the kernels that `instruction_set` names: a kernel does the
    same, and must fetch pixels, weights and indices too, and round and store sums.

    Args:
        rounds: of the loop; 10,000 take about a millisecond.

    Returns:
        How many pairs of a block and a pixel were multiplied, four multiply-accumulates each; 0
        for instruction sets without VNNI, whose limit this is not.

    Raises:
        OSError: the library is missing.
    """
    return int(_library().obc_sparse_products_alone(rounds))


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Let sessions that are made meanwhile use one instruction set, for tests and comparisons.

    Raises:
        ValueError: this processor or this build lacks it.
        OSError: the library is missing.
    """
    library = _library()
    before = instruction_set()
    if not library.obc_sparse_use_instruction_set(name.encode()):
        raise ValueError(f"instruction set '{name}' does not work here")
    try:
        yield
    finally:
        library.obc_sparse_use_instruction_set(before.encode())
