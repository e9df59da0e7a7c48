"""How long a call takes, and on which machine."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .run.distributed import usable_cores


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


def machine() -> str:
    """The day, the processor with the cores that this process may use, and torch's version."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{datetime.date.today()}, {usable_cores()} cores of {name}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
