"""What a run does at its beginning and at an epoch's: Trainer calls these."""

from __future__ import annotations

from transformers import TrainerCallback

from .interruption import epoch_ends


class MarkBeginning(TrainerCallback):
    """Tells the trainer that training begins, and leaves in the log, for the card, that a run was resumed."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_training()
        if self.trainer.resumed_from is not None:
            state.log_history.append({"resumed": True, "epoch": state.epoch, "step": state.global_step})
            self.trainer.go_on()


class SaveAtEpochEnd(TrainerCallback):
    """At an epoch's last step saves after what the epoch's end logs and evaluates: a resumed run does not come back
    to it."""

    postponed = False

    def on_step_end(self, args, state, control, **kwargs):
        self.postponed = control.should_save and epoch_ends(state)
        control.should_save = control.should_save and not self.postponed

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.postponed
        self.postponed = False


class SetEpoch(TrainerCallback):
    """Tells the dataset the epoch: a run resumed in mid-epoch does not (accelerate's skipping loader forgets to)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))
