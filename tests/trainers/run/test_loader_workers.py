"""Loader workers that die, and errors that are not their death."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from tiny_runs import start
from tiny_trainer import make_trainer
from torch.utils.data import DataLoader

from trainers.run.loader_workers import name_killed_workers, shielded


class Unreachable(torch.utils.data.Dataset):
    """A row of it is on a machine that hangs up."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ConnectionResetError("of a row")


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(error):
    """torch looks whether it lives at once, and where it still does passes on what the broken connection says."""
    batches = iter(torch.utils.data.DataLoader(range(4), num_workers=1))
    batches._data_queue.get = Mock(side_effect=error)
    with pytest.raises(RuntimeError, match="A worker of the data loader was killed"), name_killed_workers():
        next(batches)


def test_a_connection_that_breaks_elsewhere_is_no_worker():
    with pytest.raises(ConnectionResetError), name_killed_workers():
        raise ConnectionResetError
    with pytest.raises(ConnectionResetError, match="of a row"), name_killed_workers():
        next(iter(torch.utils.data.DataLoader(Unreachable(), num_workers=1)))


def test_an_error_in_a_loader_worker_is_not_taken_for_its_death(tmp_path, rows):
    def fail(examples):
        raise RuntimeError("of its own")

    trainer = make_trainer(tmp_path, rows, dataloader_num_workers=1)
    trainer.data_collator = fail
    with pytest.raises(RuntimeError, match="of its own"):
        trainer.train()


class Slow(torch.utils.data.Dataset):
    """Its second row is hours away."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(10_000 * index)
        return os.getpid()


def stuck_worker() -> tuple[multiprocessing.Process, object]:
    """A worker in the midst of a row, and the iterator that holds it."""
    loader = DataLoader(Slow(), num_workers=1, batch_size=None, multiprocessing_context="fork")
    batches = iter(shielded(loader))
    number = next(batches)
    return next(child for child in multiprocessing.active_children() if child.pid == number), batches


def test_a_worker_obeys_its_parents_sigterm_and_nobody_elses():
    """Its parent's: as torch and Python end those that are stuck."""
    process, batches = stuck_worker()
    code = "import os, sys; [os.kill(int(sys.argv[1]), number) for number in (15, 2, 15)]"
    subprocess.run([sys.executable, "-c", code, str(process.pid)], check=True)
    process.join(2.5)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0


def test_signals_are_as_before_once_the_workers_are_started():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert list(shielded(DataLoader(range(4), num_workers=2)))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_what_a_worker_does_first_is_still_done():
    numbers = multiprocessing.Queue()
    list(shielded(DataLoader(range(2), num_workers=2, worker_init_fn=numbers.put)))
    assert sorted(numbers.get(timeout=20) for _ in range(2)) == [0, 1]
    assert shielded(DataLoader(range(2))).worker_init_fn is None


OTHERS = [pytest.param(context, marks=pytest.mark.soak) for context in ("spawn", "forkserver")]


@pytest.mark.parametrize("context", ["fork", *OTHERS])
def test_a_stuck_worker_leaves_when_its_parent_is_killed(context):
    process = start(1, Path(__file__).with_name("orphans_worker.py"), context)
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]
