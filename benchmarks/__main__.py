"""Runs the programs, each in a process of its own, and prints all claims as one Markdown table.

python -m benchmarks
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from . import (
    cached_teacher,
    captions_per_second,
    loader,
    retrieval_speed,
    start_up,
    step_cost,
    teacher_features,
    training_views,
)
from .common import Row, measured, print_table


PROGRAMS = (
    captions_per_second,
    step_cost,
    cached_teacher,
    teacher_features,
    training_views,
    loader,
    retrieval_speed,
    start_up,
)


def rows() -> Iterator[Row]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for program in PROGRAMS:
            yield from processes.submit(measured, program.measure).result()


if __name__ == "__main__":
    print_table(rows())
