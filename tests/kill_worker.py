"""Run by test_kill: `train.main` twice, counting what happens in the first run, and killed in the second.

The moment is a kind of event and a place in [0, 1) among those that the first run had. Of the kind "clock" the parent
kills, which finds in `notes` when the second run began and how long the first took.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import HfApi

import train
from trainers import base_trainer, report, retrieval_evaluation
from trainers.base_trainer import RetrievalTrainer
from trainers.run import checkpoints, distributed, resumable_trainer


counts: Counter[str] = Counter()
fatal: tuple[str, int] | None = None


def happens(kind: str) -> None:
    counts[kind] += 1
    if fatal == (kind, counts[kind]):
        os.kill(os.getpid(), signal.SIGKILL)


def count(place, name: str, kind: str) -> None:
    """Something happens before the work of a function, and after it."""
    function = getattr(place, name)

    def call(*args, **kwargs):
        happens(kind)
        result = function(*args, **kwargs)
        happens(kind)
        return result

    setattr(place, name, call)


def count_events() -> None:
    for place, name, kind in (
        (RetrievalTrainer, "begin_step", "step"),
        (RetrievalTrainer, "embed", "step"),
        (RetrievalTrainer, "_get_grad_norm", "step"),
        (retrieval_evaluation, "_in_memory", "evaluation"),
        (retrieval_evaluation, "retrieval_metrics", "evaluation"),
        (RetrievalTrainer, "_save_rng_state", "save"),
        (checkpoints, "_flush", "save"),
        (checkpoints, "publish", "save"),
        (checkpoints, "rotate", "save"),
        (Path, "rename", "save"),
        (base_trainer, "write_readme", "save"),
        (resumable_trainer, "snapshot", "push"),
        (HfApi, "create_repo", "push"),
        (HfApi, "create_commit", "push"),
        (report, "plot_curves", "end"),
        (report, "write_json", "end"),
        (report, "run_code", "end"),
    ):
        count(place, name, kind)
    save = torch.save

    def half_written(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        if fatal == ("save", counts["save"] + 1):
            os.truncate(path, os.path.getsize(path) // 2)
        happens("save")

    torch.save = half_written


def main(unbroken: list[str], broken: list[str], kind: str, place: float, rank: int, notes: str) -> None:
    global fatal
    count_events()
    began = time.time()
    train.main(unbroken)
    if distributed.rank() == rank:
        fatal = (kind, 1 + int(place * counts[kind]))
        note = {"process": os.getpid(), "seconds": time.time() - began, "counts": counts}
        Path(f"{notes}.part").write_text(json.dumps(note))
        os.replace(f"{notes}.part", notes)
    counts.clear()
    train.main(broken)


if __name__ == "__main__":
    distributed.run_launched(lambda: main(**json.loads(sys.argv[1])))
