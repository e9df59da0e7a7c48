"""A step whose gradient is not finite changes nothing, is named, and too many in a row stop the run."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from tiny_trainer import largest_difference, make_trainer
from transformers import TrainerCallback

from trainers.run.checkpoints import last_whole


SETTINGS = {"max_steps": 5, "balancer": "fixed", "max_grad_norm": 1.0, "weight_decay": 0.1}


def poison(trainer, steps, value=float("nan")):
    """Breaks the embeddings of a batch's image 2 in some steps (counted from 0), as a model that overflows does."""

    def break_rows(module, args, kwargs, output):
        if torch.is_grad_enabled() and trainer.state.global_step in steps:
            factor = torch.ones(len(output.image_embeds), 1)
            factor[2] = value
            output.image_embeds = output.image_embeds * factor
        return output

    trainer.model.register_forward_hook(break_rows, with_kwargs=True)
    return trainer


class LeaveOut(TrainerCallback):
    """The reference: a step of the optimiser without gradients does nothing."""

    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step in self.steps:
            optimizer.zero_grad(set_to_none=True)


def state_of(trainer) -> dict[str, torch.Tensor]:
    optimizer = trainer.optimizer.state_dict()["state"]
    state = {f"{name}.{key}": value for name, part in optimizer.items() for key, value in part.items()}
    return {**trainer.model.state_dict(), **state}


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, float("nan")),
        ({}, float("inf")),
        ({"optim": "adamw_torch"}, float("nan")),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}, float("nan")),
        ({"max_grad_norm": 0.0}, float("inf")),
    ],
    ids=["fused", "infinite", "not fused", "accumulated", "not clipped"],
)
def test_the_run_is_the_one_in_which_the_step_did_not_happen(tmp_path, rows, settings, value):
    settings = {**SETTINGS, **settings}
    skipped = poison(make_trainer(tmp_path / "skipped", rows, **settings), {0, 2}, value)
    skipped.train()
    reference = make_trainer(tmp_path / "reference", rows, callbacks=[LeaveOut({0, 2})], **settings)
    reference.train()
    a, b = state_of(skipped), state_of(reference)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    assert {float(part["step"]) for part in skipped.optimizer.state_dict()["state"].values()} == {3.0}
    assert skipped.lr_scheduler.get_last_lr() == reference.lr_scheduler.get_last_lr()
    moved = make_trainer(tmp_path / "all", rows, **settings)
    moved.train()
    assert largest_difference(moved.model.state_dict(), skipped.model.state_dict()) > 1e-3  # or it would not tell


def test_losses_and_rows_are_named_and_the_log_stays_finite(tmp_path, rows, caplog):
    trainer = make_trainer(tmp_path, rows, **{**SETTINGS, "logging_steps": 2})
    batches = []
    begin_step = trainer.begin_step
    trainer.begin_step = lambda step: [batches.append(step[0]["image_ids"]), begin_step(step)]
    poison(trainer, {2}).train()
    (record,) = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert record.startswith("Step 3 is skipped, its gradient is not finite (losses nan, nan, nan, nan; ")
    assert f"embeddings that are not finite: {batches[2][2]!r})" in record
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert all(torch.isfinite(torch.tensor(value)) for name, value in entry.items() if name != "grad_norm"), entry
    json.dumps(trainer.state.log_history, allow_nan=True)


def test_rows_are_named_where_no_embedding_is_broken(tmp_path, rows, caplog):
    trainer = make_trainer(tmp_path, rows, **SETTINGS)
    compute_loss = trainer.compute_loss

    def overflow(*args, **kwargs):
        return compute_loss(*args, **kwargs) * (float("inf") if trainer.state.global_step == 1 else 1.0)

    trainer.compute_loss = overflow
    trainer.train()
    (record,) = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert record.startswith("Step 2 is skipped") and "all embeddings are finite; its rows: '0/" in record
    assert "nan" not in record and record.endswith(", ...).")


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_too_many_in_a_row_stop_the_run_and_its_checkpoints_stay(tmp_path, rows, logging_steps):
    settings = {**SETTINGS, "max_steps": 12, "max_skipped_steps": 3, "logging_steps": logging_steps}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    # Two in a row, twice, are not three.
    trainer = poison(make_trainer(tmp_path, rows, **settings), {0, 1, 3, 4, 6, 7, 8, 9})
    stops = "Step 9 is skipped.*That makes 3 in a row: the run stops.*--bf16 False.*--allow_changes"
    with pytest.raises(ValueError, match=stops):
        trainer.train()
    checkpoint = last_whole(tmp_path)
    assert checkpoint.name == "checkpoint-8"
    for tensor in load_file(checkpoint / "model.safetensors").values():
        assert torch.isfinite(tensor).all()
    calm = {**settings, "learning_rate": 1e-5, "allow_changes": True}
    resumed = make_trainer(tmp_path, rows, **calm)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12


def test_a_run_without_logs_still_says_what_it_skipped(tmp_path, rows, caplog):
    poison(make_trainer(tmp_path, rows, **{**SETTINGS, "logging_steps": 100}), {4}).train()
    assert "Step 5 is skipped" in caplog.text


def test_the_baseline_skips_too(tmp_path, rows, caplog):
    from conftest import make_student

    from trainers import ContrastiveTrainer

    args = make_trainer(tmp_path, rows, **SETTINGS).args
    model, processor = make_student()
    trainer = poison(ContrastiveTrainer(model, args, train_dataset=rows, processing_class=processor), {1})
    trainer.train()
    assert "Step 2 is skipped, its gradient is not finite (losses nan; " in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_both_of_two_processes_skip(tmp_path):
    result = launch(2, Path(__file__).with_name("nonfinite_worker.py"), tmp_path)
    states = [
        load_file(tmp_path / f"{name}-{rank}.safetensors") for name in ("skipped", "reference") for rank in (0, 1)
    ]
    for other in states[1:]:
        assert largest_difference(states[0], other) == 0.0
    assert "Step 3 is skipped" in result.stderr
