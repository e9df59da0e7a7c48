"""One part of `python -m benchmarks.gpu`, in a process of its own: prints its rows of the table.

python -m benchmarks.gpu.part NAME [--tiny]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import teacher_features

from . import loader, resumed, training, whole_run
from .common import make_quickstart_trainer, make_trainer, parser, print_rows
from .whole_run import WARM_UP, WATCHED


Rows = Iterator[tuple[str, str]]
ROOT = Path(__file__).parents[2]
STEPS = 100  # under the clock: of ragged batches, so that a graph for each would show
IMAGES = 128  # of a batch; the paper's student takes 32 captions, which keeps no GPU busy


def of_size(tiny: bool) -> tuple[int, int, int]:
    """Images of a batch, steps before the clock and under it."""
    return (4, 1, 4) if tiny else (IMAGES, WARM_UP, STEPS)


def settings_of(tiny: bool) -> dict:
    """Settings of a training that is timed: all that a run does but evaluate and save."""
    images, warm_up, steps = of_size(tiny)
    return {
        "per_device_train_batch_size": images,
        "max_steps": warm_up + steps + WATCHED,
        "dataloader_num_workers": 1 if tiny else loader.default_workers()[-1],
        "dataloader_persistent_workers": True,
        "random_shift": 0.05,
        "random_zoom": 0.1,
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }


def paper(tiny: bool, compiled: bool) -> Rows:
    """The paper's student: a whole training, then the parts of a step without the loader, for growing batches."""
    settings, (_, warm_up, steps) = settings_of(tiny), of_size(tiny)
    if compiled:
        settings |= {"torch_compile": True, **({"torch_compile_backend": "eager"} if tiny else {})}
    mode = "compiled" if compiled else "eager"
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, 64 if tiny else 16384, tiny, **settings)
        yield from whole_run.figures(f"the paper's student, {mode}", trainer, warm_up, steps)
        del trainer
    sizes = {"start": 8, "steps": 2} if tiny else {"start": 32, "steps": 20}
    training.free_memory()
    yield from training.mode_figures(mode, tiny, **sizes)


def quickstart(tiny: bool) -> Rows:
    """The quickstart's student by its recipe."""
    _, warm_up, steps = of_size(tiny)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(tiny) if tiny else {**settings_of(tiny), "per_device_train_batch_size": 128}
        trainer = make_quickstart_trainer(folder, 64 if tiny else 16384, **settings)
        yield from whole_run.figures("the quickstart's student", trainer, warm_up, steps)


def images_of_the_loader(tiny: bool) -> Rows:
    yield from loader.figures(tiny, images=8 if tiny else IMAGES, workers=loader.default_workers())


def teacher(tiny: bool) -> Rows:
    workers = loader.default_workers()[-1]
    if tiny:
        yield from teacher_features.figures("tiny", rows=16, rounds=1, batch_size=8, num_workers=workers)
    else:
        yield from teacher_features.figures("ViT-L/14", rows=4096, rounds=2, batch_size=256, num_workers=workers)


def fsdp2(tiny: bool) -> Rows:
    """Prints its rows by itself, from the process that leads.

    Raises:
        RuntimeError: it failed; what it said is on stderr.
    """
    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml")]
    command += ["--num_processes", str(gpus or 2), "--rdzv_backend", "c10d", "--main_process_port", "0"]
    command += ["-m", "benchmarks.gpu.sharded", *map(str, of_size(tiny)), *(["--tiny"] if tiny else [])]
    sys.stdout.flush()
    if subprocess.run(command, cwd=ROOT).returncode:
        raise RuntimeError(f"`{' '.join(command[1:])}` failed")
    yield from ()


def resume(tiny: bool) -> Rows:
    yield from resumed.figures(tiny, images=4 if tiny else IMAGES, steps=4 if tiny else 20)


PARTS: dict[str, Callable[[bool], Rows]] = {
    "eager": lambda tiny: paper(tiny, compiled=False),
    "compiled": lambda tiny: paper(tiny, compiled=True),
    "quickstart": quickstart,
    "loader": images_of_the_loader,
    "teacher": teacher,
    "fsdp2": fsdp2,
    "resume": resume,
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("name", choices=PARTS)
    options = options.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in train.py
    print_rows(PARTS[options.name](options.tiny))


if __name__ == "__main__":
    main()
