"""How a solver works, apart from what it solves: precision, batch memory, lazy update length."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import torch

from obc_deploy.device_memory import available_memory
from obc_deploy.errors import ProblemError
from obc_deploy.schemes import BLOCK_SIZE, Quantization
from obc_deploy.solvers.contract import Progress

Batch = TypeVar("Batch")
Result = TypeVar("Result")

FINE_BITS = 8
"""Bits of weights from which layers are quantized by shortcuts as a rule."""
_WORTH_THREADS = 1 << 22
"""Entries of all inverses together from which threads of their own pay."""
_NARROW = 640
"""Columns up to which torch's own part of a layer is over sooner than its threads are at rest."""
_LAZY = 32
_PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class SolverSettings:
    """Precision and memory of the batched row solvers.

    Attributes:
        dtype: precision in which inverses are down-dated (they are made in float64).
        memory: bytes that the inverses of one batch of rows may take on the CPU. On a GPU they
            take a third of what this process may still allocate there. A batch that runs out of
            memory is halved, on either.
        lazy: eliminations whose rank-one updates are kept before the inverse itself is updated; a
            multiple of the block size. None: what was found fastest.
        native: whether the compiled row solvers work on the CPU; None: where they were built.
        triton: whether Triton kernels take the steps between two updates of the inverses; None: on
            CUDA devices, where Triton works.
        threads: CPU threads that rows are spread over; None: as many as torch uses.
        shortcuts: whether codes are found in shorter ways than OBQ where they lose next to nothing:
            one order for all rows of a dense layer of FINE_BITS or more (`ordered_obq`), and
            rounding of pruned rows (`rounding`).
    """

    dtype: torch.dtype = torch.float32
    memory: int = 1 << 29
    lazy: int | None = None
    native: bool | None = None
    triton: bool | None = None
    threads: int | None = None
    shortcuts: bool = False

    def __post_init__(self) -> None:
        if self.lazy is not None and (self.lazy < BLOCK_SIZE or self.lazy % BLOCK_SIZE):
            raise ProblemError(
                f"lazy={self.lazy} update vectors do not hold whole blocks; use a multiple of "
                f"{BLOCK_SIZE}, such as 32"
            )
        if self.threads is not None and self.threads < 1:
            raise ProblemError(f"threads={self.threads} solve nothing; give 1 or more, or None")

    def update_length(self, *, wide: bool = False) -> int:
        """`lazy`, or what was found fastest: twice as many for inverses beyond the cache."""
        return self.lazy or (2 * _LAZY if wide else _LAZY)

    def takes_shortcut(self, quantization: Quantization) -> bool:
        """Whether a dense layer takes one order for all rows; pruned ones are rounded as a rule."""
        return self.shortcuts and quantization.weight_bits >= FINE_BITS

    def workers(self, rows: int, cols: int) -> int:
        """CPU threads that a layer's rows are worth."""
        if rows * cols * cols < _WORTH_THREADS:
            return 1
        return self.threads or torch.get_num_threads()

    def on(self, device: torch.device) -> SolverSettings:
        """These settings with the memory that a device has for the inverses now."""
        if device.type != "cuda":
            return self
        return replace(self, memory=max(1, available_memory(device) // 3))

    def row_batches(self, rows: int, cols: int, workers: int = 1) -> list[slice]:
        """Slices of rows, near equal, of which `workers` have inverses that fit the memory."""
        return self.row_batches_of(rows, cols * cols * self.dtype.itemsize, workers)

    def row_batches_of(self, rows: int, row_bytes: int, workers: int = 1) -> list[slice]:
        """The same for rows that take so many bytes each."""
        batches = -(-rows // max(1, self.memory // workers // row_bytes))
        size = -(-rows // min(rows, -(-batches // workers) * workers))
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def over_rows(
        self,
        rows: int,
        cols: int,
        device: torch.device,
        work: Callable[[slice, Progress], Result],
        progress: Progress,
    ) -> list[Result]:
        """`work` on batches of rows, in order of the rows.

        Rows are independent, so on the CPU each thread takes batches of its own and computes them
        alone: threads that split every small operation would wait for each other thousands of times
        a layer, and for whoever else uses the machine.
        """
        if device.type != "cpu":
            with ieee_products(device):
                return _fitting(self.on(device).row_batches(rows, cols), work, progress)
        threads, before = self.workers(rows, cols), torch.get_num_threads()
        batches = self.row_batches(rows, cols, threads)
        shared = _SharedProgress(progress, [batch.stop - batch.start for batch in batches])
        if threads == 1 or len(batches) == 1:
            parts = [_fitting([batch], work, shared.of(i)) for i, batch in enumerate(batches)]
            return list(chain.from_iterable(parts))
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            futures = [
                pool.submit(_fitting, [batch], work, shared.of(i))
                for i, batch in enumerate(batches)
            ]
            return list(chain.from_iterable(future.result() for future in futures))
        finally:
            # After an interrupt the workers stop at their next report.
            shared.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)


def until_it_fits(
    batches: Iterable[Batch],
    work: Callable[[Batch], Result],
    *,
    size: Callable[[Batch], int],
    halves: Callable[[Batch], Sequence[Batch]],
) -> Iterator[Result]:
    """`work` on batches in order; one that runs out of memory is done in halves.

    Once a size was too large, batches of that size are halved without being tried.

    Args:
        batches: what is to be done.
        work: does one; may be called again for parts of a batch that ran out of memory.
        size: what its memory grows with.
        halves: two parts of a batch, in order; one part where it cannot be divided.

    Raises:
        torch.OutOfMemoryError: what cannot be divided does not fit.
    """
    too_large: int | None = None
    for given in batches:
        waiting = [given]
        while waiting:
            batch = waiting.pop()
            parts = halves(batch)
            if too_large is None or size(batch) < too_large or len(parts) == 1:
                try:
                    result = work(batch)
                except torch.OutOfMemoryError:
                    if len(parts) == 1:
                        raise
                    too_large = size(batch)
                else:
                    yield result
                    continue
                # Here, since the exception holds on to what the batch had allocated.
                torch.cuda.empty_cache()
            waiting += reversed(parts)


def _fitting(
    batches: Sequence[slice], work: Callable[[slice, Progress], Result], progress: Progress
) -> list[Result]:
    """`work` on neighbouring batches of rows, whose progress this is."""
    start, stop = batches[0].start, batches[-1].stop

    def run(batch: slice) -> Result:
        begin, end = ((row - start) / (stop - start) for row in (batch.start, batch.stop))
        return work(batch, part_of(progress, begin, end))

    return list(until_it_fits(batches, run, size=_rows_in, halves=_half_rows))


def _rows_in(batch: slice) -> int:
    return int(batch.stop - batch.start)


def _half_rows(batch: slice) -> list[slice]:
    middle = (batch.start + batch.stop) // 2
    if middle == batch.start:
        return [batch]
    return [slice(batch.start, middle), slice(middle, batch.stop)]


@contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """Let CUDA multiply float32 matrices in float32, whatever the program allows elsewhere.

    Down-dating subtracts nearly equal numbers: the ten bits of TF32 would be nothing but noise.
    """
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch, and the solvers with it, use `count` CPU threads; then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def torch_beside_rows(settings: SolverSettings, cols: int) -> Iterator[SolverSettings]:
    """Let torch work alone on a layer of few columns whose rows are compiled; their settings.

    For milliseconds after each operation torch's threads ask for the next one without rest, on the
    cores that the rows are given by then: more than those operations gain by their threads.
    """
    threads = settings.threads or torch.get_num_threads()
    if cols > _NARROW or threads == 1:
        yield settings
        return
    with torch_threads(1):
        yield replace(settings, threads=threads)


class _StoppedError(Exception):
    """The work was given up."""


class _SharedProgress:
    """One progress that several threads move, each for its share of the rows."""

    def __init__(self, progress: Progress, sizes: list[int]) -> None:
        self._progress = progress
        self._sizes = sizes
        self._parts = [0.0] * len(sizes)
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Make every further report raise."""
        self._stopped = True

    def of(self, index: int) -> Progress:
        """The progress of one batch."""

        def report(share: float) -> None:
            if self._stopped:
                raise _StoppedError
            with self._lock:
                self._parts[index] = share
                done = sum(p * s for p, s in zip(self._parts, self._sizes, strict=True))
                self._progress(done / sum(self._sizes))

        return report


def precision(name: str) -> torch.dtype:
    """The torch dtype of "float32" or "float64".

    Raises:
        ProblemError: any other name.
    """
    if name not in _PRECISIONS:
        raise ProblemError(f"dtype '{name}' is no solver precision; use 'float32' or 'float64'")
    return _PRECISIONS[name]


def compression_settings(dtype: str) -> SolverSettings:
    """How layers of networks are solved, by `compress` and for databases: with shortcuts.

    Raises:
        ProblemError: as in `precision`.
    """
    return SolverSettings(dtype=precision(dtype), shortcuts=True)


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """A progress whose 0 to 1 is `start` to `end` of another's."""

    def report(share: float) -> None:
        progress(start + share * (end - start))

    return report
