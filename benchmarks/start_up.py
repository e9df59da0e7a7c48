"""Seconds from the start of `train.py` to the end of its first step; the icons' data set is made before.

python -m benchmarks.start_up
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

from datasets_scripts.icons import load_icons

from .common import Row, print_table


def seconds_until(command: list[str], sign: str) -> float:
    """Seconds from a program's start until it prints a line that contains `sign`; it is then terminated.

    Raises:
        RuntimeError: the program ended without such a line.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if sign in line:
                seconds = time.perf_counter() - started
                process.terminate()
                return seconds
    raise RuntimeError(f"{' '.join(command)} ended without printing {sign}:\n{''.join(printed[-20:])}")


def measure(rounds: int = 3) -> list[Row]:
    load_icons()
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", "--config", "recipes/icons.yaml", "--output_dir", folder]
            seconds.append(seconds_until([*command, "--logging_steps", "1"], "'loss'"))
    taken = f"{statistics.median(seconds):.1f} s"
    return [Row("`train.py` from its start to the end of its first step", taken, "-", "-", "under 15 s")]


if __name__ == "__main__":
    print_table(measure())
