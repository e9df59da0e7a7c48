"""How a launched program ends: see tests/processes_worker.py for what its processes share."""

import subprocess
import sys

import torch
from launching import environment

from trainers.run.distributed import run_launched


def test_a_launched_program_leaves_no_process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    run_launched(lambda: torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1))
    assert not torch.distributed.is_initialized()


PROGRAM = """
import atexit, sys, threading, time
import torch
from torch.nn.parallel import DistributedDataParallel
from trainers.run.distributed import run_launched


class Kept:
    def __del__(self):
        print("dismantled", flush=True)


kept = Kept()


def main():
    store = torch.distributed.FileStore(sys.argv[1], 2)
    torch.distributed.init_process_group("gloo", store=store, rank=int(sys.argv[2]), world_size=2)
    DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
    atexit.register(print, "registered")
    threading.Timer(0.2, print, ["of a thread"]).start()
    print("main", end=" ")
    if len(sys.argv) > 3:
        raise SystemExit(sys.argv[3])


run_launched(main)
"""


def ends(tmp_path, *more: str) -> list[tuple[int, str]]:
    commands = [[sys.executable, "-c", PROGRAM, str(tmp_path / "store"), rank, *more] for rank in "01"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "env": environment()}
    processes = [subprocess.Popen(command, **streams) for command in commands]
    return [(said, process.returncode) for process in processes for said in [process.communicate()[0]]]


def test_processes_on_gloo_end_with_all_that_is_registered_but_are_not_dismantled(tmp_path):
    """Gloo's threads outlive the process group where there was DDP, and would now and then abort the process."""
    assert ends(tmp_path) == [("main of a thread\nregistered\n", 0)] * 2


def test_an_error_keeps_its_status(tmp_path):
    assert [status for _, status in ends(tmp_path, "wrong")] == [1, 1]
