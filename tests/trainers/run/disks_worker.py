"""Run by torchrun in test_output_dir: two processes with an output folder each, as machines without a shared disk."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from conftest import make_rows
from safetensors.torch import save_file
from tiny_trainer import make_trainer
from transformers import TrainerCallback

import train
from trainers.run import distributed


RUN = Path("run")
FIGURES = [5.0, 9.0, 1.0]  # of three evaluations: the second is the best
SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "ddp_backend": "gloo",
}


class Interrupted(TrainerCallback):
    """After the last step, on the second process."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        if args.process_index == 1:
            self.trainer.interruption.received = 15


def trainer_of(folder: Path):
    trainer = make_trainer(folder, make_rows(16), eval_dataset=make_rows(8, seed=1), **SETTINGS)
    evaluate, figures = trainer.evaluate, iter(FIGURES)
    trainer.evaluate = lambda **kwargs: evaluate(**kwargs) | {"eval_rsum": next(figures)}
    return trainer


def refusal(call, *args, **kwargs) -> str | None:
    try:
        call(*args, **kwargs)
    except (ValueError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path, arguments: list[str]) -> None:
    rank = int(os.environ["RANK"])
    own = folder / f"rank-{rank}"
    own.mkdir()
    os.chdir(own)  # one name, another folder
    weights, said = {}, {}

    def note(name: str, trainer) -> None:
        weights.update({f"{name}/{key}": tensor.clone() for key, tensor in trainer.model.state_dict().items()})

    trainer = trainer_of(RUN)
    trainer.add_callback(Interrupted(trainer))
    trainer.train()
    note("best", trainer)
    said["interrupted"] = str(trainer.interruption.agreed)
    best = RUN / "checkpoint-2"
    if rank == 0:
        with open(best / "model.safetensors", "r+b") as file:
            file.truncate(100)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(1.0)
    trainer._load_best_model()
    note("damaged", trainer)
    said["resumed"] = refusal(trainer_of(RUN).train, resume_from_checkpoint=True)
    said["named"] = refusal(trainer_of(RUN).train, resume_from_checkpoint=str(RUN / "checkpoint-3"))
    said["no checkpoint"] = refusal(trainer_of(Path("empty")).train, resume_from_checkpoint=True)
    # train.py: the second process finds a whole checkpoint on its disk, of an earlier run.
    if rank == 1:
        shutil.copytree(folder / "rank-0" / "run" / "checkpoint-3", Path("command/checkpoint-3"))
    distributed.decided_by_first_rank(lambda: None)  # all wait
    said["not empty"] = refusal(train.main, [*arguments, "--output_dir", str(RUN)])
    last = ["--resume_from_checkpoint", "last"]
    said["command"] = refusal(train.main, [*arguments, "--output_dir", str(RUN), *last])
    said["fresh"] = refusal(train.main, [*arguments, "--output_dir", "command", *last])
    # A disk for all.
    trainer = trainer_of(folder / "shared")
    trainer.train()
    trainer = trainer_of(folder / "shared")
    trainer.train(resume_from_checkpoint=True)
    note("shared", trainer)
    save_file(weights, folder / f"weights-{rank}.safetensors")
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.run_launched(lambda: main(Path(sys.argv[1]), json.loads(sys.argv[2])))
