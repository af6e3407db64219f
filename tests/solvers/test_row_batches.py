"""Rows in batches: together they are all rows, and a batch that does not fit is halved."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from obc_deploy.solvers import SolverSettings
from obc_deploy.solvers.settings import ieee_products, torch_threads

ELSEWHERE = torch.device("meta")
"""Any device that is not the CPU: batches run one after the other there."""


def rows_of(batch):
    return list(range(batch.start, batch.stop))


@pytest.mark.parametrize("fits", [1, 2, 3, 7, 100])
def test_a_batch_that_runs_out_of_memory_is_halved(fits):
    tried = []

    def work(batch, progress):
        tried.append(batch.stop - batch.start)
        if tried[-1] > fits:
            raise torch.OutOfMemoryError
        progress(1.0)
        return rows_of(batch)

    shares = []
    settings = SolverSettings(memory=50 * 4 * 8 * 8)
    done = settings.over_rows(23, 8, ELSEWHERE, work, shares.append)
    assert list(chain.from_iterable(done)) == list(range(23))
    assert tried[0] == 23
    assert all(len(rows) <= fits for rows in done)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_cuda_multiplies_in_whole_precision_only_while_it_solves():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        with ieee_products(torch.device("cuda")):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
        with ieee_products(ELSEWHERE):
            assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


def test_a_single_row_that_does_not_fit_is_an_error():
    def work(batch, progress):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        SolverSettings().over_rows(4, 8, ELSEWHERE, work, lambda _: None)


@pytest.mark.parametrize("rows", [1, 5, 64, 1000])
@pytest.mark.parametrize("memory", [1, 1 << 12, 1 << 20])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_are_all_rows_in_order(rows, memory, workers):
    batches = SolverSettings(memory=memory).row_batches(rows, 16, workers)
    assert list(chain.from_iterable(map(rows_of, batches))) == list(range(rows))
    largest = max(batch.stop - batch.start for batch in batches)
    assert largest == 1 or largest * workers * 4 * 16 * 16 <= memory


def test_threads_are_as_before_even_after_an_error():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(KeyError), torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
