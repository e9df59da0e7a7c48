"""Callbacks: what a run does when it begins, and when an epoch begins or ends."""

from __future__ import annotations

from transformers import TrainerCallback

from .interruption import epoch_ends


class MarkBeginning(TrainerCallback):
    """Tells the trainer that training begins. Of a resumed run it also notes that in the log, which the card reads."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_training()
        if self.trainer.resumed_from is not None:
            state.log_history.append({"resumed": True, "epoch": state.epoch, "step": state.global_step})
            self.trainer.go_on()


class SaveAtEpochEnd(TrainerCallback):
    """Postpones a save that is due at an epoch's last step until the epoch's end has logged and evaluated: a run that
    is resumed from it does neither again."""

    postponed = False

    def on_step_end(self, args, state, control, **kwargs):
        self.postponed = control.should_save and epoch_ends(state)
        control.should_save = control.should_save and not self.postponed

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.postponed
        self.postponed = False


class SetEpoch(TrainerCallback):
    """Tells the dataset which epoch begins: in an epoch that is resumed midway, accelerate's loader does not."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))
