"""The trainer that keeps a run whole, and what it knows of Trainer's inside."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_trainer import make_trainer
from transformers import Trainer

from trainers.distillation_trainer import STATE_FILE
from trainers.run.resumable_trainer import ResumableTrainer


ROOT = Path(__file__).parents[3]


def test_trainers_own_resume_still_loses_vit_towers(tmp_path, rows):
    """Fails when upstream mends what `_load_from_checkpoint` and `_load_best_model` are overridden for."""
    trainer = make_trainer(tmp_path, rows)
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    Trainer._load_from_checkpoint(trainer, str(tmp_path / "saved"))
    vision = sum(parameter.abs().sum() for parameter in trainer.model.vision_model.layers.parameters())
    assert vision == 0
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert sum(parameter.abs().sum() for parameter in trainer.model.vision_model.layers.parameters()) > 0


def test_best_model_is_loaded_at_the_end(tmp_path, rows, validation_rows):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        tmp_path, rows, eval_dataset=validation_rows, load_best_model_at_end=True, learning_rate=3e-2, **settings
    )
    trainer.train()
    scores = {entry["step"]: entry["eval_rsum"] for entry in trainer.state.log_history if "eval_rsum" in entry}
    assert trainer.state.best_metric == max(scores.values())
    assert trainer.evaluate()["eval_rsum"] == pytest.approx(max(scores.values()))


def test_no_pickle_but_what_resuming_needs(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    pickles = {path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    arguments = json.loads((tmp_path / "training_args.json").read_text())
    assert arguments["queue_size"] == 24
    for path in tmp_path.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    assert set(load_file(tmp_path / "checkpoint-1" / STATE_FILE)) == set(trainer.distillation_state())


# Trainer's private methods that are overridden, and its private members that are used, each with the reason.
OVERRIDDEN = {
    "_run_epoch": "a run resumed at its end would take one step more; a stream has no last epoch",
    "_finalize_training": "with a limit of 1 the last checkpoint is deleted where another is the best",
    "_save_checkpoint": "it is written in place, in parts, and rotated by the clock",
    "_load_from_checkpoint": "towers that are saved under other names are lost (transformers 43701, 48805)",
    "_load_best_model": "the same; and a damaged checkpoint is loaded",
    "_save_optimizer_and_scheduler": "FSDP leaves a pickle of the weights; a subclass's state is not known",
    "_load_optimizer_and_scheduler": "a subclass's state is not known",
    "_save": "the arguments are a pickle with the token in clear; no card; files are written in place",
    "_push_from_checkpoint": "a revision on the way has no code and no card; a failure goes unseen",
    "_finish_current_push": "a machine that is taken away would wait for a slow Hub",
    "_get_grad_norm": "no callback is told the norm, from which a step that is not finite is known",
}
USED = {
    "_save_scaler": "part of what `_save_checkpoint` does",
    "_save_rng_state": "part of what `_save_checkpoint` does",
    "_load_rng_state": "for the checkpoint that is written again at a resumed run's beginning",
    "_tr_loss": "the loss since the last log, which a checkpoint has not",
    "_globalstep_last_logged": "as `_tr_loss`",
    "_total_loss_scalar": "as `_tr_loss`",
    "_maybe_log_save_evaluate": "an evaluation that was due when the run was interrupted",
    "_train_batch_size": "what `auto_find_batch_size` settled on",
}


def private_names_of_trainer() -> set[str]:
    names = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    return names | set(re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(Trainer)))


def private_names_in(path: Path) -> set[str]:
    """Private names that a file defines as methods, or reads or sets as attributes."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            names.update(child.name for child in node.body if isinstance(child, ast.FunctionDef))
    return names & private_names_of_trainer()


def test_each_private_member_is_listed_with_its_reason_and_still_there():
    overridden = {name for name in vars(ResumableTrainer) if name in private_names_of_trainer()}
    assert overridden == set(OVERRIDDEN)
    assert private_names_in(ROOT / "trainers/run/resumable_trainer.py") == OVERRIDDEN.keys() | USED.keys()
    assert OVERRIDDEN.keys() | USED.keys() <= private_names_of_trainer()


def test_no_other_file_touches_one():
    rooms = ("trainers", "datasets_scripts", "inference", "benchmarks", "model_cards", "teachers", "rows")
    for path in [ROOT / "train.py", *(path for room in rooms for path in sorted((ROOT / room).rglob("*.py")))]:
        if path.name != "resumable_trainer.py":
            assert not private_names_in(path), path
