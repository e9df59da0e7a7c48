"""How long a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes, and the device with what it was given to do."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_seconds(call: Callable[[], object], runs: int = 10) -> float:
    """Median of some runs after two that warm up."""
    return statistics.median([seconds_of(call) for _ in range(runs + 2)][2:])
