"""Python programs that tests start as processes of their own, alone or under torchrun."""

import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent


def environment(threads: int = 1, **variables: str) -> dict[str, str]:
    """The variables of such a process: it imports what the test can import."""
    path = os.pathsep.join([*sys.path, str(TESTS)])
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, **variables}


def command_line(processes: int, *command) -> list[str]:
    """A Python program's command line, under torchrun where there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", "localhost:0"]
    return [*launcher, *map(str, command)]


def launch(processes: int, *command, **variables: str) -> subprocess.CompletedProcess:
    """Runs a program to its end, which must be a good one; `variables` are added to its environment."""
    line = command_line(processes, *command)
    result = subprocess.run(line, env=environment(**variables), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
    return result
