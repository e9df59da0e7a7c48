"""A `Trainer` that keeps a run whole. All overrides of transformers' private methods are in this file.

tests/trainers/run/test_resumable_trainer.py lists them with the reason for each.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from huggingface_hub import HfApi
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from rows.files import write_json

from . import checkpoints, distributed
from .callbacks import MarkBeginning, SaveAtEpochEnd
from .hub_push import let_workers_fork, push_checkpoint, push_run, pushed_place, snapshot
from .interruption import StopOnSignal, evaluation_is_due
from .loader_workers import name_killed_workers, shielded
from .nonfinite import SkipNonFiniteSteps
from .output_dir import seen_by_all
from .run_identity import IDENTITY_FILE, check_identity, describe_identity, warn_of_untried_transformers
from .sharding import prepare_sharding


logger = logging.getLogger(__name__)

LOG_FILE = "_log.json"  # of a checkpoint: what is not logged yet
PUSH_SECONDS = 20  # how long an interrupted run waits for a push that is on its way


class ResumableTrainer(Trainer):
    """`Trainer` of a run that may be stopped at any moment and goes on as if it had not been.

    A checkpoint is whole or absent, a resumed run is the unbroken one bit for bit, SIGTERM and Ctrl-C end it after a
    saved step, steps whose gradient is not finite are skipped and named, and every pushed revision loads. What is
    trained it does not know: a subclass overrides what stands under "What a subclass knows".

    Args:
        args: `TrainingArguments` with `allow_changes` and `max_skipped_steps` besides.
        *more, **kwargs: as in `Trainer`.

    Attributes:
        resumed_from: the checkpoint that the run went on from; None where it began at its beginning.
        interruption: its `agreed` is the signal that ended the training, 0 where none did.
        unreadable: lines about inputs that were left out, kept over resumes; a subclass adds to them.
        arguments_class: its fields are the method's settings; other fields of `args` are not published or compared.
        optional_files: names of files that not every student has: a push deletes those of an earlier one.
    """

    arguments_class: type[TrainingArguments] = TrainingArguments
    optional_files: tuple[str, ...] = ()

    def __init__(self, model, args, *more, **kwargs):
        super().__init__(model, args, *more, **kwargs)
        self.model_class = type(self.model)
        self.model.to(args.device)  # under FSDP Trainer leaves it where it was made
        if self.is_fsdp_enabled:
            prepare_sharding(self.accelerator.state.fsdp_plugin, self.model)
        self.resumed_from: str | None = None
        self.unreadable: dict[str, None] = {}
        self.interruption, self.nonfinite = StopOnSignal(), SkipNonFiniteSteps(self, args.max_skipped_steps)
        for callback in (MarkBeginning(self), self.interruption, self.nonfinite, SaveAtEpochEnd()):
            self.add_callback(callback)

    # What a subclass knows

    def write_card(self, folder: Path) -> None:
        """Writes the card of the student that is saved in `folder`. Called on the process that saves."""

    def save_extra_files(self, folder: Path) -> None:
        """Writes what else belongs to a saved student. Called on the process that saves."""

    def save_extra_state(self, folder: Path) -> None:
        """Writes into a checkpoint what the subclass must find there to go on. Called on the process that saves."""

    def load_extra_state(self, checkpoint: Path) -> None:
        """The counterpart of `save_extra_state`, on every process."""

    def identity_facts(self) -> dict[str, object]:
        """Names and JSON-able values of what the run's result follows from, besides settings, model and versions."""
        return {}

    def begin_training(self) -> None:
        """Called before the first step, of a resumed run too."""

    def latest_losses(self) -> torch.Tensor:
        """This rank's raw losses `[n]`, of the step or its last micro-batch: named where a step is skipped."""
        return self._latest_loss[None]

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As Trainer's, interrupted cleanly by SIGTERM and Ctrl-C: `self.interruption.agreed` is then the signal.

        Args:
            resume_from_checkpoint: a whole checkpoint of the same run; True for the last one in `output_dir`.

        Raises:
            ValueError: the checkpoint is damaged, or of another run (see `allow_changes`); too many steps in a row
                whose gradient is not finite.
        """
        output_dir = self.args.output_dir
        self.resumed_from = seen_by_all(lambda: checkpoints.to_go_on_from(resume_from_checkpoint, output_dir))
        if self.resumed_from is not None:
            changes = (self.identity(), self.arguments_class, self.resumed_from, self.args.allow_changes)
            for line in check_identity(*changes):
                logger.warning(f"Resumed with a change, {line}.")
        if self.is_world_process_zero():
            warn_of_untried_transformers()
            for left in Path(output_dir).glob("_push-*"):  # of a run that was killed in a push
                shutil.rmtree(left, ignore_errors=True)
        with self.interruption.listening(), name_killed_workers():
            result = super().train(resume_from_checkpoint=self.resumed_from, **kwargs)
            received = int(distributed.gather_counts([[self.interruption.received]]).max())
            if received and not self.interruption.agreed:  # after the last step
                self.interruption.agreed = received
                last = Path(output_dir) / f"checkpoint-{self.state.global_step}"
                if not distributed.decided_by_first_rank(last.is_dir):
                    self._save_checkpoint(self.model_wrapped)
        return result

    def get_train_dataloader(self) -> DataLoader:
        return shielded(super().get_train_dataloader())

    def _run_epoch(self, **kwargs):
        """Takes no step after the last. Resumed there, Trainer takes one more where no epoch ends, and a stream has no
        last epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def _finalize_training(self, *args):
        """Trainer, limited to 1 checkpoint, deletes the last where another is the best: nothing could be resumed."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        result = super()._finalize_training(*args)
        self.args.save_total_limit = limit
        return result

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Logs a loss that is not finite as 0: its step is skipped, and it must not spoil the mean that is logged."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._latest_loss = loss
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _get_grad_norm(self, model, grad_norm=None):
        """Keeps the norm for [`SkipNonFiniteSteps`]: Trainer tells it to no callback."""
        self.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.gradient_norm

    def floating_point_ops(self, inputs) -> int:
        """Not counted: the estimate that Trainer makes fits neither tower."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Makes `train_loss` the mean over all steps; Trainer's is over those since the run was resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        try:
            super().log(logs, start_time)
        except OSError as error:
            raise checkpoints.cannot_write("The log", error, self.args.output_dir) from error

    def gather_step(self, counts: list[list[int]]) -> torch.Tensor:
        """Counts of every rank's micro-batches of one step, `[W ranks, A, n]` on the CPU, from this rank's `[A, n]`.

        To be called once a step: with the counts the ranks tell each other whether any of them was told to stop.
        """
        received = self.interruption.received
        gathered = distributed.gather_counts([[*row, received] for row in counts])
        self.interruption.agreed = int(gathered[..., -1].max())
        return gathered[..., :-1]

    @property
    def train_batch_size(self) -> int:
        """Rows in a batch of this process."""
        return self._train_batch_size

    def settings(self) -> dict[str, object]:
        """The settings of the method, as they may be published."""
        names = {setting.name for setting in fields(self.arguments_class)}
        return {name: value for name, value in self.args.to_dict().items() if name in names}

    def identity(self) -> dict[str, object]:
        """All that the run's result follows from; a checkpoint with another identity is refused."""
        streamed = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        return describe_identity(self.settings(), self.args, self.model.config, streamed, self.identity_facts())

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """Trainer writes in place, file by file: a killed run leaves what looks like a checkpoint. It also rotates by
        the clock."""
        self.store_flos()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        beside = folder.with_name(checkpoints.BESIDE)
        try:
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
                beside.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.save_model(str(beside), _internal_call=True)
            self._find_best(folder)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(beside))
                self._save_scaler(str(beside))
                self._save_rng_state(str(beside))
            losses = distributed.gather_rows(self._tr_loss[None], [1] * distributed.world_size())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        self.state.stateful_callbacks[type(callback).__name__] = callback.state()
                self.state.save_to_json(str(beside / "trainer_state.json"))
                write_json(beside / IDENTITY_FILE, self.identity())
                log_state = {
                    "losses": losses.tolist(),  # of each rank since the last log
                    "last_logged": self._globalstep_last_logged,
                    "total": self._total_loss_scalar,
                    "unreadable": list(self.unreadable),
                }
                write_json(beside / LOG_FILE, log_state)
                checkpoints.seal(beside)
                checkpoints.publish(beside, folder)
        except checkpoints.NOT_THE_DISKS:
            raise
        except checkpoints.DISK_ERRORS as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise checkpoints.cannot_write(folder.name, error, self.args.output_dir) from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            checkpoints.rotate(
                self.args.output_dir, self.args.save_total_limit, folder, self.state.best_model_checkpoint
            )

    def _find_best(self, written: Path | None = None) -> None:
        """Sets the best checkpoint's path: in this run's folder, which may have moved. One that was saved only because
        the run was interrupted does not count: the unbroken run does not have it."""
        step, save_steps = self.state.best_global_step, self.state.save_steps
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        if not step or (by_steps and step % save_steps and step < self.state.max_steps):
            return
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        if best == written or distributed.decided_by_first_rank(best.is_dir):
            self.state.best_model_checkpoint = str(best)

    def go_on(self) -> None:
        """Restores what Trainer forgets of a resumed run: losses that are not logged yet, the best checkpoint's path,
        and makes an evaluation that was due when the run was interrupted."""
        state = json.loads((Path(self.resumed_from) / LOG_FILE).read_text())
        if self.args.process_index < len(state["losses"]):
            self._tr_loss += state["losses"][self.args.process_index]
        self._globalstep_last_logged, self._total_loss_scalar = state["last_logged"], state["total"]
        self.unreadable = dict.fromkeys(state["unreadable"])
        self._find_best()
        if evaluation_is_due(self.args, self.state):
            self._load_rng_state(self.resumed_from)  # for the checkpoint, which is written again
            self.control.should_evaluate = self.control.should_save = True
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, 0.0)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Trainer loads by the names in the file, which loses renamed towers, and from each process's own disk."""
        weights = {}
        if self.is_world_process_zero():
            weights = self.model_class.from_pretrained(resume_from_checkpoint, dtype=self.model.dtype).state_dict()
        # Into a sharded model too.
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed.world_size() > 1)
        set_model_state_dict(self.model, weights, options=options)

    def _load_best_model(self) -> None:
        """Trainer's has the faults that `_load_from_checkpoint` mends. A damaged best is passed over."""
        best = Path(self.state.best_model_checkpoint)
        wrong = distributed.decided_by_first_rank(lambda: checkpoints.damage(best))
        if wrong is not None:
            logger.warning(f"{best}, the best, is damaged: {wrong}. The last step's weights stay.")
            self.state.best_model_checkpoint = None
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP Trainer leaves the weights a second time, as a pickle; of a subclass's state it knows nothing."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled and self.args.should_save:
            os.remove(os.path.join(output_dir, f"{FSDP_MODEL_NAME}.bin"))
        if self.args.should_save:
            self.save_extra_state(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The counterpart of `_save_optimizer_and_scheduler`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_extra_state(Path(checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer leaves its arguments as a pickle, with a token in clear; here they are JSON, and a card is there.
        Each file is whole or absent: written in a folder beside, then moved."""
        folder = Path(output_dir or self.args.output_dir)
        beside = folder / checkpoints.WRITING
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        sharded_class = type(self.model)
        self.model.__class__ = self.model_class  # or the code of FSDP's own class would go with it
        try:
            super()._save(str(beside), state_dict)
        finally:
            self.model.__class__ = sharded_class
        if self.args.should_save:
            (beside / "training_args.bin").unlink()
            checkpoints.move_files(beside, folder, last=("model.safetensors", "config.json"))
            write_json(folder / "training_args.json", self.args.to_dict())
            self.save_extra_files(folder)
            self.write_card(folder)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Names the repository, which a push makes where it is missing. Trainer stops the run if the Hub refuses."""
        if not self.is_world_process_zero():
            return
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.push_in_progress = None
        self.hub_pushes = HfApi()  # one for all: its pushes are in order
        let_workers_fork()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's pushes a revision without code and card, and its arguments as a pickle; a failure goes unseen."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"_push-{step}"
        try:
            snapshot(Path(checkpoint_folder), folder)
        except OSError as error:
            logger.warning(f"Step {step} is not pushed: {checkpoints.error_line(error)}.")
            shutil.rmtree(folder, ignore_errors=True)
            return
        job = self.hub_pushes.run_as_future(
            push_checkpoint,
            folder,
            self.hub_model_id,
            pushed_place(self.args.hub_strategy, checkpoint_folder),
            f"Training in progress, step {step}",
            self.args.hub_revision,
            self.args.hub_private_repo,
            self.optional_files,
        )
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])

    def _finish_current_push(self) -> None:
        """Waits for the push; on an interrupted run not for long, which then sets `push_is_unfinished`."""
        self.push_is_unfinished = False
        push, until = getattr(self, "push_in_progress", None), None
        while push is not None and not push.is_done() and not self.push_is_unfinished:
            if until is None and (self.interruption.received or self.interruption.agreed):
                until = time.monotonic() + PUSH_SECONDS
            self.push_is_unfinished = until is not None and time.monotonic() > until
            time.sleep(0.1)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs):
        """Pushes the run's folder as it is, with the card that was written for it; Trainer's writes another.

        Returns:
            The commit; None where the push failed (the command that completes it is printed), and on other processes.
        """
        if not os.path.isfile(os.path.join(self.args.output_dir, "config.json")):
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo()
        self._finish_current_push()
        return push_run(
            self.args.output_dir,
            self.hub_model_id,
            commit_message,
            self.args.hub_revision,
            self.args.hub_private_repo,
            self.optional_files,
        )
