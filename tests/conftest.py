"""Shared by all tests: one thread for torch, and a seed of its own for every test."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported: its kernels then run on CPU tensors, in NumPy.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
