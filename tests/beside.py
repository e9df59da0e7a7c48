"""Tests in a process of their own, which sees timm, torchvision and open_clip: with torchvision in sight transformers
takes other image processors, so they stand beside the environment and not in it."""

import os
import re
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent


def packages() -> Path:
    """The folder that `make install` fills."""
    folder = Path(sys.prefix) / "beside"
    assert (folder / "open_clip").is_dir(), f"{folder} lacks open_clip: run `make install`"
    return folder


def run_checks(name: str) -> None:
    """Runs a file of `tests/` whose tests need those packages; `name` is its path in there."""
    path = os.pathsep.join(map(str, [packages(), TESTS, (TESTS / name).parent]))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "torchvision_beside", str(TESTS / name)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in", result.stdout, re.MULTILINE), result.stdout[-2000:]
