"""SIGTERM (a preempted machine) and Ctrl-C: the run ends after the current step, with a whole checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


def epoch_ends(state: TrainerState) -> bool:
    """Whether the last step was an epoch's last, or the run's."""
    return state.epoch % 1 == 0 or state.global_step >= state.max_steps


def evaluation_is_due(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether an evaluation belongs to the last step and was not made: the run was interrupted there."""
    step = state.global_step
    if args.eval_strategy == IntervalStrategy.STEPS:
        since_last, passed = step % state.eval_steps, step
    else:
        since_last, passed = state.epoch % 1, state.epoch
    due = since_last == 0 or step >= state.max_steps
    entries = [entry for entry in state.log_history if entry["step"] == step]
    is_made = any(name.startswith("eval_") and name.endswith("_runtime") for entry in entries for name in entry)
    return args.eval_strategy != IntervalStrategy.NO and args.eval_delay <= passed and due and not is_made


class StopOnSignal(TrainerCallback):
    """Saves and stops once `agreed` is set; evaluates nothing more.

    Attributes:
        received: the signal that this process got, 0 where none.
        agreed: the signal that any process got, known to all of them in the same step; see
            `ResumableTrainer.gather_step`.
    """

    def __init__(self):
        self.received = 0
        self.agreed = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles both signals within the block. A second Ctrl-C does what it always does; a second SIGTERM does
        nothing, since a scheduler sends one to the whole process group and a launcher another."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        process = os.getpid()

        def handle(number: int, frame) -> None:
            if os.getpid() == process:
                self.received = self.received or number
                if number == signal.SIGINT:
                    signal.signal(number, previous[number])
            elif number == signal.SIGTERM:  # a process that was forked with this handler
                os._exit(143)

        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, before in previous.items():
                signal.signal(number, before)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_evaluate = control.should_save = False
            control.should_log = control.should_log and epoch_ends(state)
