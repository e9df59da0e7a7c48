"""What a run does at its beginning and at an epoch's."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from trainers.run.callbacks import MarkBeginning, SaveAtEpochEnd, SetEpoch


def state(**values) -> SimpleNamespace:
    return SimpleNamespace(**{"epoch": 0.5, "global_step": 2, "max_steps": 8, "log_history": [], **values})


@pytest.mark.parametrize("epoch, at_step", [(0.5, True), (1.0, False)])
def test_a_save_that_is_due_at_an_epochs_last_step_waits_for_its_end(epoch, at_step):
    callback, control = SaveAtEpochEnd(), TrainerControl(should_save=True)
    callback.on_step_end(None, state(epoch=epoch), control)
    assert control.should_save == at_step
    control.should_save = False  # as Trainer does after a step
    callback.on_epoch_end(None, state(epoch=epoch), control)
    assert control.should_save == (not at_step)
    control.should_save = False
    callback.on_epoch_end(None, state(epoch=epoch), control)
    assert not control.should_save


def test_only_a_resumed_run_is_marked():
    calls = []
    trainer = SimpleNamespace(
        resumed_from=None, begin_training=lambda: calls.append("begin"), go_on=lambda: calls.append("go on")
    )
    fresh = state()
    MarkBeginning(trainer).on_train_begin(None, fresh, None)
    assert calls == ["begin"] and fresh.log_history == []
    trainer.resumed_from, resumed = "checkpoint-2", state()
    MarkBeginning(trainer).on_train_begin(None, resumed, None)
    assert calls == ["begin", "begin", "go on"]
    assert resumed.log_history == [{"resumed": True, "epoch": 0.5, "step": 2}]


def test_the_dataset_is_told_the_epoch_of_a_run_resumed_within_it():
    epochs = []
    callback = SetEpoch(SimpleNamespace(set_epoch=epochs.append))
    for epoch in (None, 0.0, 1.5):
        callback.on_epoch_begin(None, state(epoch=epoch), None)
    assert epochs == [0, 0, 1]
