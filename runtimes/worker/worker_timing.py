"""Timed windows: inference alone, or raw input to class, measured with the nanosecond clock.

end to end = pre-processing + inference + post-processing, all inside the window
pre-processing: y = (x * scale - mean) / std      post-processing: softmax, then argmax
"""

from __future__ import annotations

import gc
import time
from typing import Any, Callable, Dict, List, Optional

import numpy as np

PROGRESS_SECONDS = 2.0
"""Least time between two notes to the session that samples are still being taken."""

Feed = Dict[str, "np.ndarray[Any, Any]"]
Outputs = List["np.ndarray[Any, Any]"]


def preprocess(raw: "np.ndarray[Any, Any]", how: Dict[str, Any]) -> "np.ndarray[Any, Any]":
    """Raw (n, channels, ...) to float32 input; no mean and deviation where those are empty."""
    values = raw.astype(np.float32)
    if how["scale"] != 1.0:
        values *= np.float32(how["scale"])
    if how["mean"]:
        per_channel = (1, -1) + (1,) * (values.ndim - 2)
        values -= np.asarray(how["mean"], dtype=np.float32).reshape(per_channel)
        values /= np.asarray(how["std"], dtype=np.float32).reshape(per_channel)
    return np.ascontiguousarray(values)


def postprocess(outputs: Outputs) -> "np.ndarray[Any, Any]":
    """(n,) class of each row of the first output, by softmax and argmax."""
    logits = np.asarray(outputs[0])
    logits = logits.reshape(logits.shape[0] if logits.ndim else 1, -1)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    return probabilities.argmax(axis=1)


def _window(
    infer: Callable[[Feed], Outputs], feed: Feed, how: Optional[Dict[str, Any]]
) -> Callable[[], Any]:
    if how is None:
        return lambda: infer(feed)
    first = next(iter(feed))

    def end_to_end() -> "np.ndarray[Any, Any]":
        prepared = dict(feed)
        prepared[first] = preprocess(feed[first], how)
        return postprocess(infer(prepared))

    return end_to_end


def take_samples(
    infer: Callable[[Feed], Outputs],
    feed: Feed,
    how: Optional[Dict[str, Any]],
    warmup: int,
    samples: int,
    progress: Callable[[int], None],
) -> "np.ndarray[Any, Any]":
    """(warmup + samples,) milliseconds, in the order taken; garbage collection waits outside."""
    window = _window(infer, feed, how)
    taken = np.empty(warmup + samples, dtype=np.float64)
    clock = time.perf_counter_ns
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        told = time.monotonic()
        for index in range(warmup + samples):
            start = clock()
            window()
            taken[index] = (clock() - start) / 1e6
            now = time.monotonic()
            if now - told >= PROGRESS_SECONDS:
                told = now
                progress(index + 1)
    finally:
        if collecting:
            gc.enable()
    return taken
