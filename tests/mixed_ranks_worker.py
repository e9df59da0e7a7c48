"""Run by `accelerate launch` in trainers/test_ranks_without_partners, and by the test itself on one process."""

import os
import sys
from pathlib import Path

import datasets
import torch
from conftest import make_rows
from launched_worker import shard_on_cpu
from mixed_rows import without_partners
from safetensors.torch import save_file
from tiny_trainer import make_trainer

from trainers.run import distributed
from trainers.run.distributed import run_launched


# What the rows are, in the order in which they are drawn, eight a step: the first four are the first rank's.
PAIR, IMAGE, TEXT = 0, 1, 2
STEPS = [
    [IMAGE] * 4 + [TEXT] * 4,  # nobody has a partner, and each rank lacks a modality
    [IMAGE] * 4 + [PAIR, IMAGE, TEXT, PAIR],
    [PAIR, PAIR, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT],
]


def rows_in_order(folder: Path) -> datasets.Dataset:
    """Rows of these kinds, whatever the order in which the sampler draws them."""
    rows = make_rows(8 * len(STEPS))
    trainer = make_trainer(folder, rows, per_device_train_batch_size=8)
    drawn = [name for batch in trainer.get_train_dataloader() for name in batch["image_ids"]]
    kinds = dict(zip((int(name.split("/")[1]) for name in drawn), (kind for step in STEPS for kind in step)))
    return without_partners(rows, lambda i: kinds[i] == IMAGE, lambda i: kinds[i] == TEXT)


def train(folder: Path, rows: datasets.Dataset) -> None:
    """Three steps of plain gradient descent for each kind of targets: what is left are sums of gradients."""
    for targets in ("pairs", "teacher"):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        trainer = make_trainer(
            folder / targets,
            rows,
            per_device_train_batch_size=8 // world,
            max_steps=len(STEPS),
            learning_rate=0.3,
            lr_scheduler_type="constant",
            optim="sgd",
            balancer="dynamic",
            queue_size=40,
            contrastive_targets=targets,
            ddp_backend="gloo" if world > 1 else None,
        )
        trainer.train()
        trainer.save_model(str(folder / targets))
        if distributed.rank() == 0:
            losses = [entry for entry in trainer.state.log_history if "loss" in entry]
            names = sorted({name for entry in losses for name in entry if name.startswith("loss")})
            logged = torch.tensor([[entry.get(name, torch.nan) for name in names] for entry in losses])
            save_file({"logged": logged, **trainer.distillation_state()}, folder / f"{targets}.safetensors")


def main(folder: Path) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    train(folder, datasets.load_from_disk(folder / "rows"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_launched(lambda: main(Path(sys.argv[1])))
