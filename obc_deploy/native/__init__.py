"""The compiled row solvers: C++ for the steps that a greedy run over a row's columns takes.

The library is built with the package where there is a C++ compiler. Without it everything works on
the torch solver, several times slower; `why_missing` says what is wrong.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from obc_deploy.compiled_library import CompiledLibrary, Signatures, find_library

if TYPE_CHECKING:
    import torch

DISABLE_VARIABLE = "OBC_DEPLOY_NATIVE"
"""Set to 0 to do without the compiled solvers."""
LIBRARY_VARIABLE = "OBC_DEPLOY_NATIVE_LIBRARY"
"""Path of another build of the library to use, say one with sanitizers."""

_POLL_SECONDS = 0.1
_INT64 = ctypes.c_int64
_POINTER = ctypes.c_void_p
_SIGNATURES: Signatures = {
    "obc_instruction_set": (ctypes.c_char_p, ()),
    "obc_use_instruction_set": (_INT64, (ctypes.c_char_p,)),
    "obc_prune_columns": (_INT64, (_POINTER, _INT64, _INT64, _INT64, _POINTER, _POINTER)),
    "obc_prune_and_weigh": (
        _INT64,
        (_POINTER, *(_INT64,) * 4, _POINTER, _POINTER, _INT64, _POINTER, _POINTER),
    ),
    "obc_prune_blocks": (_INT64, (_POINTER, _INT64, _INT64, _INT64, _POINTER, _POINTER)),
    "obc_quantize": (
        _INT64,
        (
            *(_POINTER, _INT64, _POINTER, _POINTER, _INT64, _INT64),
            *(_POINTER, _INT64, _POINTER, _POINTER, _POINTER),
        ),
    ),
    "obc_best_weights": (
        _INT64,
        (_POINTER, _INT64, _POINTER, _POINTER, _INT64, _POINTER, _POINTER),
    ),
    "obc_find_grid": (_INT64, (_POINTER, _INT64, _POINTER)),
    "obc_invert_hessians": (_INT64, (_POINTER, _POINTER, _POINTER)),
    "obc_output_energy": (_INT64, (_POINTER, _POINTER, _INT64, _POINTER)),
    "obc_update_rate": (ctypes.c_double, (_INT64, _INT64, _INT64, _INT64)),
}


class Control(ctypes.Structure):
    """Work done so far and whether to stop, shared with running native code."""

    _fields_ = (("done", _INT64), ("stop", _INT64))


class Layer(ctypes.Structure):
    """The C++ side's view of a layer problem; pointers are into tensors the caller keeps."""

    _fields_ = (
        ("rows", _INT64),
        ("cols", _INT64),
        ("groups", _INT64),
        ("inverse", _POINTER),
        ("hessian", _POINTER),
        ("group_of_row", _POINTER),
        ("weight", _POINTER),
        ("lazy", _INT64),
        ("threads", _INT64),
        ("control", _POINTER),
    )


class GridSearch(ctypes.Structure):
    """The C++ side's view of a search for grids, one a row."""

    _fields_ = (
        ("weight", _POINTER),
        ("rows", _INT64),
        ("cols", _INT64),
        ("code_min", _INT64),
        ("code_max", _INT64),
        ("asymmetric", _INT64),
        ("steps", _INT64),
        ("shrink", ctypes.c_double),
        ("least_scale", ctypes.c_double),
        ("scale", _POINTER),
        ("zero_point", _POINTER),
    )


class Hessians(ctypes.Structure):
    """The C++ side's view of one symmetric matrix a group."""

    _fields_ = (
        ("matrices", _POINTER),
        ("groups", _INT64),
        ("cols", _INT64),
        ("threads", _INT64),
        ("control", _POINTER),
    )


class InterruptedSolveError(Exception):
    """The native code stopped because it was told to."""


@cache
def _find() -> CompiledLibrary:
    return find_library(
        Path(__file__).parent, "_rows", _SIGNATURES,
        disable=DISABLE_VARIABLE, other=LIBRARY_VARIABLE,
    )  # fmt: skip


def is_available() -> bool:
    """Whether the compiled solvers were built and load here."""
    return _find().library is not None


def why_missing() -> str:
    """What keeps the compiled solvers from working, with the fix; empty where they work."""
    return _find().why_missing


def library() -> ctypes.CDLL:
    """The loaded library, its functions' types set.

    Raises:
        OSError: there is none; the message says why.
    """
    found = _find()
    if found.library is None:
        raise OSError(f"the compiled solvers are missing: {found.why_missing}")
    return found.library


def instruction_set() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"."""
    name: bytes = library().obc_instruction_set()
    return name.decode()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Use one instruction set instead of the best, for tests and comparisons.

    Raises:
        ValueError: this processor or this build lacks it.
    """
    if not library().obc_use_instruction_set(name.encode()):
        raise ValueError(f"instruction set '{name}' does not work here")
    try:
        yield
    finally:
        library().obc_use_instruction_set(b"")


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a contiguous CPU tensor's numbers lie."""
    return None if tensor is None else tensor.data_ptr()


def run(
    call: Callable[[], int], control: Control, work: float, progress: Callable[[float], None]
) -> None:
    """Run native code beside this thread, which reports progress and passes interrupts on.

    Args:
        call: the native function with its arguments; returns its outcome. It must hold the memory
            that native code works on: a second interrupt may end this function first.
        control: the control it was given.
        work: what `control.done` ends at.
        progress: told the share of the work done; may raise, which stops the native code.

    Raises:
        InterruptedSolveError: it was stopped by someone else through `control`.
        MemoryError: the native code could not get its memory.
    """
    outcome: list[int] = []
    # An event: `Thread.join` of older Pythons takes a thread for ended once a signal interrupts it.
    ended = threading.Event()

    def work_beside() -> None:
        try:
            outcome.append(call())
        finally:
            ended.set()

    thread = threading.Thread(target=work_beside, name="native solver")
    try:
        thread.start()
        ended.wait(_POLL_SECONDS / 10)
        while not ended.is_set():
            progress(min(1.0, control.done / work))
            ended.wait(_POLL_SECONDS)
    except BaseException:
        control.stop = 1
        if thread.ident is not None:
            ended.wait()
            thread.join()
        raise
    thread.join()
    check(outcome[0] if outcome else None)


def check(outcome: int | None) -> None:
    """Nothing, where native code says that it did its work.

    Raises:
        InterruptedSolveError: it was told to stop.
        MemoryError: it could not get its memory.
        ValueError: it did not know what was asked for, or did not end.
    """
    if outcome == 1:
        raise InterruptedSolveError
    if outcome == 2:
        raise MemoryError("the native solver could not get its memory; use fewer threads")
    if outcome != 0:
        raise ValueError(f"the native solver ended with outcome {outcome}")
