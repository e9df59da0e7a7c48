"""Run by test_interruption: `train.main` twice; in the second run a signal goes to all processes of the group.

It is sent when a step begins, or when so many processes have been started: the last of them is not ready then.
"""

import json
import os
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess

import train
from trainers.base_trainer import RetrievalTrainer
from trainers.run.distributed import run_launched


def to_the_group(number: int) -> None:
    """From another process, as a worker obeys its parent."""
    code = "import os, sys; group, launcher, number = map(int, sys.argv[1:]); os.killpg(group, number)"
    launcher = 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun has a group of its own, and passes on what it gets
        launcher, code = os.getppid(), f"{code}; os.kill(launcher, number)"
    call = [sys.executable, "-c", code, *map(str, (os.getpgrp(), launcher, int(number)))]
    subprocess.run(call, check=True, start_new_session=True)


def send_in_step(number: int, step: int) -> None:
    begin_step = RetrievalTrainer.begin_step

    def interrupted(trainer, batches):
        if trainer.state.global_step == step and trainer.args.process_index == 0:
            to_the_group(number)
        begin_step(trainer, batches)

    RetrievalTrainer.begin_step = interrupted


def send_at_start(number: int, count: int) -> None:
    start, started = BaseProcess.start, []

    def interrupted(process):
        start(process)
        started.append(process)
        if len(started) == count:
            to_the_group(number)

    BaseProcess.start = interrupted


def main(unbroken: list[str], broken: list[str], number: int, moment: str, at: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a script's background
    train.main(unbroken)
    {"step": send_in_step, "start": send_at_start}[moment](number, at)
    train.main(broken)


if __name__ == "__main__":
    run_launched(lambda: main(**json.loads(sys.argv[1])))
