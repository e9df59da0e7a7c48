"""What every training of a dual encoder shares: batches, optimiser, evaluation by recall, exact checkpoints."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import datasets
import torch
from accelerate.utils import send_to_device
from accelerate.utils.constants import FSDP_MODEL_NAME
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, speed_metrics
from transformers.utils import PushInProgress

from model_cards import RunFacts
from rows.checks import check_dataset
from rows.columns import rows_and_captions
from rows.files import write_json
from rows.teacher_columns import TEACHER_COLUMNS, teacher_rows

from .card import write_card
from .distillation_config import DSMDTrainingArguments
from .retrieval import retrieval_metrics
from .retrieval_data import RetrievalCollator, RetrievalDataset
from .retrieval_evaluation import across_figures, encode, recall_figures
from .run import checkpoints, distributed
from .run.callbacks import MarkBeginning, SaveAtEpochEnd, SetEpoch
from .run.hub_push import let_workers_fork, one_line, push_checkpoint, push_run, pushed_place, snapshot
from .run.interruption import StopOnSignal
from .run.loader_workers import name_killed_workers
from .run.nonfinite import SkipNonFiniteSteps
from .run.run_identity import IDENTITY_FILE, check_identity, describe_identity, fingerprint
from .run.sharding import prepare_sharding
from .streaming import SkipTrainedBatches, StreamedRetrievalDataset, stream_head


logger = logging.getLogger(__name__)

LOG_FILE = "_log.json"  # of a checkpoint: what is not logged yet
WRITING = "_writing"  # where files of a folder are written before they are moved there
NOT_THE_DISKS = (torch.OutOfMemoryError, torch.distributed.DistError)  # RuntimeErrors too, but of memory and network
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have their own for the disk's
PUSH_SECONDS = 20  # what an interrupted run gives a push that is on its way


class RetrievalTrainer(Trainer):
    """`Trainer` of a dual encoder, evaluated by recall in both directions.

    Subclasses say what the loss of a micro-batch is: `compute_loss` returns this rank's part of the whole optimiser
    step's mean, so that the micro-batches and ranks of a step add up to its loss.

    Args:
        model: a [`DSMDModel`], or any whose output has `image_embeds` and `text_embeds`, L2-normalised.
        args: the run's settings.
        train_dataset: rows as the contract has them (`image`, `captions`, `image_id`, ...); a streamed dataset
            needs `max_steps`, and its first 1,000 rows are checked beforehand.
        eval_dataset: such rows, not streamed.
        processing_class: processor with `image_processor` and `tokenizer`; saved with the model.
        **kwargs: `callbacks` and `optimizers` as in `Trainer`.

    Every saved student has a card; set `facts` ([`RunFacts`]) for what it shall say of data, teacher and licence.
    """

    # compute_loss divides by the counts of the whole step: nothing is left for Trainer to divide by.
    loss_is_scaled_for_ga = True
    needs_teacher = False
    teacher_projection: torch.Tensor | None = None  # [teacher's width, D] where the student is narrower

    def __init__(
        self,
        model: PreTrainedModel,
        args: DSMDTrainingArguments,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        processing_class=None,
        **kwargs,
    ):
        if processing_class is None:
            raise ValueError("processing_class is missing: give the processor (image_processor and tokenizer).")
        limit = processing_class.tokenizer.model_max_length
        if args.max_caption_length > limit:
            raise ValueError(
                f"max_caption_length={args.max_caption_length}: the text tower takes {limit} tokens at most; lower it."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, and DataParallel would tear images from their captions. "
                f"Type `accelerate launch --num_processes {args.n_gpu} train.py ...`, or set CUDA_VISIBLE_DEVICES=0."
            )
        if train_dataset is not None:
            streamed = isinstance(train_dataset, datasets.IterableDataset)
            teacher_dim = self._teacher_dim(model) if self.needs_teacher else None
            known = stream_head(train_dataset) if streamed else train_dataset
            check_dataset(known, "train", teacher_dim)
            self.data_fingerprint = fingerprint(known)
            step = args.per_device_train_batch_size * args.world_size
            if not streamed and len(train_dataset) < step:
                raise ValueError(
                    f"The training split has {len(train_dataset)} images, fewer than one step's {step}: "
                    "lower per_device_train_batch_size."
                )
            settings = {
                "captions_per_image": args.captions_per_image,
                "random_shift": args.random_shift,
                "random_zoom": args.random_zoom,
                "seed": args.data_seed if args.data_seed is not None else args.seed,
            }
            if streamed:
                share = {"rank": args.process_index, "world_size": args.world_size}
                train_dataset = StreamedRetrievalDataset(
                    train_dataset, args.shuffle_buffer_size, teacher_dim, **share, **settings
                )
            else:
                train_dataset = RetrievalDataset(train_dataset, with_teacher=self.needs_teacher, **settings)
        if eval_dataset is not None:
            check_dataset(eval_dataset, "validation", None)
        self.eval_fingerprint = eval_dataset and fingerprint(eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=RetrievalCollator(processing_class, args.max_caption_length),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # Distillation does not train the temperature: its optimiser would have no state of it to resume from.
        self.model.logit_scale.requires_grad_(not self.needs_teacher)
        self.model_class = type(self.model)
        self.model.to(args.device)  # under FSDP and DeepSpeed Trainer leaves it where it was made
        if self.is_fsdp_enabled:
            prepare_sharding(self.accelerator.state.fsdp_plugin, self.model)
        self.streamed = isinstance(self.train_dataset, StreamedRetrievalDataset)
        if self.streamed:
            self.add_callback(SkipTrainedBatches(self.train_dataset))
        elif self.train_dataset is not None:
            self.add_callback(SetEpoch(self.train_dataset))
        self.add_callback(MarkBeginning(self))
        self.interruption = StopOnSignal()
        self.add_callback(self.interruption)
        self.nonfinite = SkipNonFiniteSteps(self, args.max_skipped_steps)
        self.add_callback(self.nonfinite)
        self.add_callback(SaveAtEpochEnd())
        self.resumed_from: str | None = None
        self.facts = RunFacts()  # for the card
        self.unreadable: dict[str, None] = {}
        self._teacher_metrics: dict[tuple, dict[str, float]] = {}

    def _teacher_dim(self, model: PreTrainedModel) -> int:
        return model.config.projection_dim if self.teacher_projection is None else len(self.teacher_projection)

    # Optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Towers and heads with their own learning rates; no decay on biases, norms and the temperature.

        Trainer knows one learning rate, and decays the temperature.
        """
        if self.optimizer is None:
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    is_tower = "vision_model." in name or "text_model." in name
                    groups.setdefault((is_tower, parameter.ndim > 1), []).append(parameter)
            head_rate = self.args.head_learning_rate
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decayed else 0.0,
                        "lr": self.args.learning_rate if is_tower or head_rate is None else head_rate,
                    }
                    for (is_tower, decayed), parameters in groups.items()
                ],
                **kwargs,
            )
        return self.optimizer

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        """A stream's loader stays as it is: its rows are split among the processes already.

        accelerate would let one process read for all and cut up its batches, captions by the number of images.
        """
        if not self.streamed:
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, counted: losses are means over the whole step.

        Trainer counts labels; a batch here has images and captions.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            for line in batch.pop("unreadable"):
                if line not in self.unreadable:
                    logger.warning(f"Image left out: {line}")
                self.unreadable[line] = None
        # Trainer's own way to the device waits for it.
        batches = [send_to_device(batch, self.args.device, non_blocking=True) for batch in batches]
        if batches:
            self.begin_step(batches)
        return batches, None

    def begin_step(self, batches: list[dict]) -> None:
        """Called with all micro-batches of this rank before the first is trained on."""
        signal = self.interruption.received
        counts = distributed.gather_counts([[len(b["image_groups"]), len(b["input_ids"]), signal] for b in batches])
        self.interruption.agreed = int(counts[..., 2].max())
        counts = counts[..., :2]
        self.num_images, self.num_captions = counts.sum(dim=(0, 1)).tolist()
        self.step_counts = counts  # [W, A, 2]: ranks, micro-batches, images and captions
        for micro_step, batch in enumerate(batches):
            batch["row_counts"] = counts[:, micro_step].T.tolist()

    def embed(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """L2-normalised float32 embeddings `[N, D]`, `[C, D]` of a batch: each image once for all its captions."""
        output = model(
            pixel_values=batch["pixel_values"],
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            # Each bucket is a forward of the text tower, and where it is sharded, one of all ranks.
            text_buckets=None if self.is_fsdp_enabled else batch["text_buckets"],
        )
        image_embeds, text_embeds = output.image_embeds.float(), output.text_embeds.float()
        if torch.is_grad_enabled():
            self.nonfinite.note_rows(batch["image_ids"], image_embeds, text_embeds, batch["caption_to_image"])
        return image_embeds, text_embeds

    def step_losses(self) -> torch.Tensor:
        """This rank's raw losses `[n]`, of the step or its last micro-batch."""
        return self._step_loss[None]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A loss that is not finite, whose step is skipped, must not blot out those that are logged with it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = loss
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _get_grad_norm(self, model, grad_norm=None):
        """Kept for what skips steps: no callback is told of it."""
        self.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.gradient_norm

    def floating_point_ops(self, inputs) -> int:
        """Not counted: the estimate that Trainer makes fits neither tower."""
        return 0

    # Evaluation

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval", fold_size: int | None = None
    ) -> dict[str, float]:
        """Recall in both directions over a whole split, each row once on any number of processes.

        Trainer's loop would compare within batches only. Where the split has teacher features, the teacher's own
        figures stand beside the student's as `teacher_{prefix}_*`, and `{prefix}_share_of_teacher` in percent. With
        `fold_size`, `{prefix}_{1k or number}_*` are means over consecutive folds of that many images. A distilled
        student is also evaluated across: `teacher_index_{prefix}_*` are its queries on the teacher's index,
        `student_index_{prefix}_*` the teacher's queries on the student's.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There is no dataset to evaluate on.")
        started = time.time()
        image_embeds, text_embeds = self.encode(dataset)
        groups, caption_to_image = rows_and_captions(dataset)
        of_student = recall_figures(image_embeds, text_embeds, groups, caption_to_image, fold_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in of_student.items()}
        metrics[f"{metric_key_prefix}_images"] = len(image_embeds)
        metrics[f"{metric_key_prefix}_captions"] = len(text_embeds)
        if set(TEACHER_COLUMNS) <= set(dataset.column_names):
            rows = (image_embeds, text_embeds, groups, caption_to_image)
            metrics.update(self._beside_the_teacher(dataset, of_student["rsum"], *rows, metric_key_prefix, fold_size))
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=len(dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _beside_the_teacher(
        self, dataset, rsum, image_embeds, text_embeds, groups, caption_to_image, prefix: str, fold_size: int | None
    ) -> dict[str, float]:
        """What `evaluate` says of the teacher; across, and at the student's width, only when training is over."""
        key = (prefix, dataset._fingerprint, fold_size)
        only_student = not self.needs_teacher or self.is_in_train
        if key not in self._teacher_metrics or not only_student:
            teacher_image, teacher_text = (rows.to(image_embeds.device) for rows in teacher_rows(dataset))
        if key not in self._teacher_metrics:
            figures = recall_figures(teacher_image, teacher_text, groups, caption_to_image, fold_size)
            self._teacher_metrics[key] = {f"teacher_{prefix}_{name}": value for name, value in figures.items()}
        metrics = dict(self._teacher_metrics[key])
        teacher_rsum = metrics[f"teacher_{prefix}_rsum"]
        metrics[f"{prefix}_share_of_teacher"] = 100 * rsum / teacher_rsum if teacher_rsum else float("nan")
        if only_student:
            return metrics
        if self.teacher_projection is not None:
            teacher_image, teacher_text = (rows @ self.teacher_projection for rows in (teacher_image, teacher_text))
            reduced = retrieval_metrics(teacher_image, teacher_text, groups, groups[caption_to_image])
            metrics[f"teacher_reduced_{prefix}_rsum"] = reduced["rsum"]
        across = across_figures(image_embeds, text_embeds, teacher_image, teacher_text, groups, caption_to_image)
        for index, figures in across.items():
            metrics.update({f"{index}_{prefix}_{name}": value for name, value in figures.items()})
        return metrics

    def encode(self, dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of a split: images `[N, D]` in row order, captions `[M, D]` row by row, on every process."""
        return encode(self, dataset)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As Trainer's, interrupted cleanly by SIGTERM and Ctrl-C: `self.interruption.agreed` is then the signal.

        Args:
            resume_from_checkpoint: a whole checkpoint of the same run; True for the last one in `output_dir`.

        Raises:
            ValueError: the checkpoint is damaged, or of another run (see `allow_changes`); too many steps in a row
                whose gradient is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoints.last_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no whole checkpoint in {self.args.output_dir} to go on from.")
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            wrong = checkpoints.damage(Path(resume_from_checkpoint))
            if wrong is not None:
                raise ValueError(
                    f"{resume_from_checkpoint} is damaged: {wrong}. Resume from the one before it; "
                    "`--resume_from_checkpoint last` finds it."
                )
            for line in check_identity(self, resume_from_checkpoint, self.args.allow_changes):
                logger.warning(f"Resumed with a change, {line}.")
        self.resumed_from = resume_from_checkpoint or None
        if self.is_world_process_zero():
            for left in Path(self.args.output_dir).glob("_push-*"):  # of a run that was killed in a push
                shutil.rmtree(left, ignore_errors=True)
        with self.interruption.listening(), name_killed_workers():
            result = super().train(resume_from_checkpoint=self.resumed_from, **kwargs)
            received = int(distributed.gather_counts([[self.interruption.received]]).max())
            if received and not self.interruption.agreed:  # after the last step
                self.interruption.agreed = received
                if not (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}").is_dir():
                    self._save_checkpoint(self.model_wrapped)
        return result

    def _run_epoch(self, **kwargs):
        """Trainer takes one step more of a run that is resumed at its end, if that is no epoch's; and a stream has no
        last epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def _finalize_training(self, *args):
        """With a limit of 1 Trainer deletes the last checkpoint where another is the best: then nothing goes on."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        result = super()._finalize_training(*args)
        self.args.save_total_limit = limit
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's `train_loss` is a mean over the steps since the run was resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        try:
            super().log(logs, start_time)
        except OSError as error:
            raise self._cannot_write("The log", error) from error

    def _cannot_write(self, what: str, error: Exception) -> OSError:
        before = checkpoints.of_run(self.args.output_dir)
        return OSError(
            f"{what} could not be written: {one_line(error)}. The last checkpoint is "
            f"{before[-1] if before else 'none'}: free the disk, then go on by --resume_from_checkpoint last."
        )

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """Trainer's writes in place, in parts: a run killed meanwhile leaves what looks like a checkpoint. It also
        rotates by the clock."""
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
                write_json(beside / IDENTITY_FILE, describe_identity(self))
                log_state = {
                    "losses": losses.tolist(),  # of each rank since the last log
                    "last_logged": self._globalstep_last_logged,
                    "total": self._total_loss_scalar,
                    "unreadable": list(self.unreadable),
                }
                write_json(beside / LOG_FILE, log_state)
                checkpoints.seal(beside)
                checkpoints.publish(beside, folder)
        except NOT_THE_DISKS:
            raise
        except DISK_ERRORS as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise self._cannot_write(folder.name, error) from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            checkpoints.rotate(
                self.args.output_dir, self.args.save_total_limit, folder, self.state.best_model_checkpoint
            )

    def _find_best(self, written: Path | None = None) -> None:
        """Where the best checkpoint is: in this run's folder, which may have moved. One that is there only because the
        run was interrupted does not count: the unbroken run has it not."""
        step, save_steps = self.state.best_global_step, self.state.save_steps
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        if not step or (by_steps and step % save_steps and step < self.state.max_steps):
            return
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        if best == written or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def go_on(self) -> None:
        """What Trainer forgets of a resumed run: the losses that are not logged yet, where the best checkpoint is, and
        an evaluation that was due when the run was interrupted."""
        state = json.loads((Path(self.resumed_from) / LOG_FILE).read_text())
        if self.args.process_index < len(state["losses"]):
            self._tr_loss += state["losses"][self.args.process_index]
        self._globalstep_last_logged, self._total_loss_scalar = state["last_logged"], state["total"]
        self.unreadable = dict.fromkeys(state["unreadable"])
        self._find_best()
        step, epoch = self.state.global_step, self.state.epoch
        if self.args.eval_strategy == IntervalStrategy.STEPS:
            since_last, passed = step % self.state.eval_steps, step
        else:
            since_last, passed = epoch % 1, epoch
        due = since_last == 0 or step >= self.state.max_steps
        is_made = any("eval_rsum" in entry for entry in self.state.log_history if entry["step"] == step)
        if self.args.eval_strategy != IntervalStrategy.NO and self.args.eval_delay <= passed and due and not is_made:
            self._load_rng_state(self.resumed_from)  # for the checkpoint, which is written again
            self.control.should_evaluate = self.control.should_save = True
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, 0.0)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Trainer loads by the names in the file, and loses towers that are saved under others (ViT, DINOv2, Swin)."""
        saved = self.model_class.from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        # Into a sharded model too.
        set_model_state_dict(self.model, saved.state_dict(), options=StateDictOptions(full_state_dict=True))

    def _load_best_model(self) -> None:
        """The same fault as in `_load_from_checkpoint`."""
        wrong = checkpoints.damage(Path(self.state.best_model_checkpoint))
        if wrong is not None:
            logger.warning(
                f"{self.state.best_model_checkpoint}, the best, is damaged: {wrong}. The last step's counts."
            )
            self.state.best_model_checkpoint = None
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP Trainer leaves the weights a second time, as a pickle."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled and self.args.should_save:
            os.remove(os.path.join(output_dir, f"{FSDP_MODEL_NAME}.bin"))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer leaves its arguments as a pickle, with a token in clear; here they are JSON, and a card is there.
        Each file is whole or absent: written in a folder beside, then moved."""
        folder = Path(output_dir or self.args.output_dir)
        beside = folder / WRITING
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
            write_card(self, folder)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Names the repository; each push makes it where it is missing. Trainer's would stop a run the Hub refuses."""
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
            logger.warning(f"Step {step} is not pushed: {one_line(error)}.")
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
        )
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])

    def _finish_current_push(self) -> None:
        """A machine that is taken away waits for no slow Hub: `push_is_unfinished` is then set."""
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
        )
