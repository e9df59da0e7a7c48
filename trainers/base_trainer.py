"""What every training of a dual encoder shares: batches, optimiser groups and evaluation by recall."""

from __future__ import annotations

import inspect
import logging
import os
import time
from pathlib import Path

import datasets
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import speed_metrics

from model_cards import RunFacts, RunRecord
from model_cards.pictures import PICTURES_OF_DATA
from rows.columns import pairs_alone, rows_and_captions, text_ids
from rows.teacher_columns import TEACHER_COLUMNS, teacher_rows

from .agreement import TeachersFirst, agreement_with_teacher
from .argument_checks import check_evaluated, check_student, fit_batch_size, taken_arguments
from .batches import NO_TEXT, RetrievalCollator, RetrievalDataset, most_buckets, views_of
from .card import describe_run, write_readme
from .collapse import constant_sides
from .dry_run import check_embeds, check_text_pooling, leave_out_unused, tiny_batch
from .equal_texts import SharedTexts, find_shared_texts
from .frozen_vision import keep_frozen_outputs
from .idle_towers import idle_towers, inputs_of, one_row
from .parameter_groups import parameter_groups
from .pixel_bytes import table_on, with_pixel_numbers
from .retrieval_evaluation import encode, recall_figures, teachers_first_of
from .row_checks import check_together
from .run.callbacks import SetEpoch
from .run.loader_workers import shielded
from .run.resumable_trainer import ResumableTrainer
from .run.run_identity import rows_fingerprint
from .streaming import SkipTrainedBatches, StreamedRetrievalDataset, stream_head
from .student import as_student, set_caption_length
from .teacher_pca import PCA_FILE
from .training_args import RetrievalTrainingArguments


logger = logging.getLogger(__name__)


class RetrievalTrainer(ResumableTrainer):
    """`Trainer` of a dual encoder: its batches, optimiser groups and evaluation by recall in both directions.

    Subclasses say what the loss of a micro-batch is: `compute_loss` returns this rank's part of the whole optimiser
    step's mean, so that the micro-batches and ranks of a step add up to its loss.

    Args:
        model: a [`DSMDModel`], or one with its interface: for `pixel_values` alone its output has `image_embeds`, for
            `input_ids` and `attention_mask` alone `text_embeds`, L2-normalised. Or the folder or Hub id of a saved
            student, which is loaded with its processor.
        args: [`RetrievalTrainingArguments`], or a subclass's own.
        train_dataset: rows as the contract has them (`image`, `captions`, `image_id`, ...); a streamed dataset
            needs `max_steps`, and its first 1,000 rows are checked beforehand.
        eval_dataset: such rows, not streamed; or several such datasets by name, as in `Trainer`.
        processing_class: processor with `image_processor` and `tokenizer`; saved with the model.
        teacher_dim: width D that the teacher's features in `train_dataset` must have; None where they are not read.
        **kwargs: `callbacks` and `optimizers` as in `Trainer`; what has no effect here is refused by name.

    A model is tried on two images and captions before it is trained: it is refused where the words of a caption do not
    change its embedding, and parameters that no embedding depends on are named and get no gradient.

    Every saved student has a card; set `facts` ([`RunFacts`]) for what it shall say of data, teacher and licence.
    """

    # compute_loss divides by the counts of the whole step: nothing is left for Trainer to divide by.
    loss_is_scaled_for_ga = True
    arguments_class = RetrievalTrainingArguments
    method: str  # its name on the card and in the identity of a run
    optional_files = (PCA_FILE, *PICTURES_OF_DATA)

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike,
        args: RetrievalTrainingArguments,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        processing_class=None,
        teacher_dim: int | None = None,
        **kwargs,
    ):
        kwargs = taken_arguments(kwargs, type(self).__name__)
        model, processing_class = as_student(model, processing_class)
        check_student(model)
        if processing_class is None:
            raise ValueError("processing_class is missing: give the processor (image_processor and tokenizer).")
        set_caption_length(model, processing_class.tokenizer, args, trains=train_dataset is not None)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, and DataParallel would tear images from their captions. "
                f"Type `accelerate launch --num_processes {args.n_gpu} train.py ...`, or set CUDA_VISIBLE_DEVICES=0."
            )
        streamed = isinstance(train_dataset, datasets.IterableDataset)
        if train_dataset is not None:
            known = stream_head(train_dataset) if streamed else train_dataset
            self.check_rows(known)
            check_together(known, "train", teacher_dim, remember=not streamed)
            self.data_fingerprint = rows_fingerprint(known)
            if not streamed:
                fit_batch_size(len(train_dataset), args)
            where = "the first rows of train" if streamed else "train"
            shared = find_shared_texts(known, where, "none of these is a negative for another")
            views = views_of(args, processing_class.image_processor)
            if streamed:
                share = (args.process_index, args.world_size)
                train_dataset = StreamedRetrievalDataset(
                    train_dataset, args.shuffle_buffer_size, teacher_dim, *share, views
                )
            else:
                train_dataset = RetrievalDataset(train_dataset, teacher_dim is not None, views, shared.ids)
        several = isinstance(eval_dataset, dict)
        evaluated = eval_dataset if several else {"validation": eval_dataset}
        if eval_dataset is not None:
            check_evaluated(evaluated, several, args, remember=not streamed)
        fingerprints = {name: rows and rows_fingerprint(rows) for name, rows in evaluated.items()}
        self.eval_fingerprint = fingerprints if several else fingerprints["validation"]
        if args.freeze is not None:
            # Without gradients no activation of the tower is kept for the backward pass.
            getattr(model, f"{args.freeze}_model").requires_grad_(False)
        self.pixel_table = table_on(args.device, processing_class.image_processor)
        of_texts = (args.max_caption_length, most_buckets(args.device))
        super().__init__(
            model=model,
            args=args,
            data_collator=RetrievalCollator(processing_class, *of_texts, as_bytes=self.pixel_table is not None),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.streamed = isinstance(self.train_dataset, StreamedRetrievalDataset)
        if self.streamed:
            self.add_callback(SkipTrainedBatches(self.train_dataset))
        elif self.train_dataset is not None:
            self.add_callback(SetEpoch(self.train_dataset))
        self.facts = RunFacts()  # for the card
        self.command: str | None = None  # of train.py: a digest of all that the run follows from
        self.last_embeds: tuple[torch.Tensor, torch.Tensor] | None = None  # of the last evaluation outside a training
        self._teacher_figures: dict[tuple, dict[str, float]] = {}
        self._teachers_first: dict[str, TeachersFirst] = {}  # on the splits that were evaluated, by fingerprint
        self._shared_texts: dict[str, SharedTexts] = {}  # of the splits that were evaluated, by fingerprint
        self._signs: set[str] = set()  # of collapse, those that were warned of
        self._in_buckets = "text_buckets" in inspect.signature(self.model.forward).parameters
        self.unused: list[str] = []
        batch = tiny_batch(RetrievalCollator(processing_class, *of_texts), args.device)
        self._one_row = one_row(batch)
        check_embeds(self.model, batch, self.compute_loss_context_manager)
        if self.train_dataset is not None:
            check_text_pooling(self.model, batch, self.compute_loss_context_manager)
            self.unused = leave_out_unused(self.model, batch, self.compute_loss_context_manager)
            if self.unused and self.is_world_process_zero():
                names = ", ".join(self.unused)
                logger.warning(f"No embedding depends on these parameters, which stay as they are: {names}.")

    def check_rows(self, rows: datasets.Dataset) -> None:
        """Refuses training rows, of a stream its first ones, that the method learns nothing from."""

    # What the base asks for

    def identity_facts(self) -> dict[str, object]:
        return {
            "method": self.method,
            "fingerprint of the training split": self.data_fingerprint,
            "fingerprint of the validation split": self.eval_fingerprint,
            "teacher": self.facts.teacher,
        }

    def begin_training(self) -> None:
        """Forgets the figures of earlier weights, which the card would show."""
        self.facts.metrics, self.facts.usage = {}, None
        if not self.is_fsdp_enabled:  # whose tower runs as a part of the whole model alone
            of_run = (self.processing_class.image_processor, self.args, self.compute_loss_context_manager)
            keep_frozen_outputs(self.model, self.train_dataset, *of_run)

    def write_card(self, folder: Path) -> RunRecord:
        """Writes the card of the student in `folder`; returns what it was made of."""
        of_run = (self.args, self.settings(), self.state, self.model, self.facts, self.method)
        record = describe_run(*of_run, folder, in_training=self.is_in_train)
        return write_readme(record, folder)

    # Optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Towers and heads with their own learning rates; no decay on biases, norms and the temperature.

        Trainer knows one learning rate, and decays the temperature.
        """
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            groups = parameter_groups(model or self.model, self.args, set(self.unused))
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        """A stream's loader stays as it is: its rows are split among the processes already.

        accelerate would let one process read for all, and slice captions by the number of images.
        """
        if not self.streamed:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        return shielded(loader)

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
        # Trainer's own transfer waits for the device.
        batches = [send_to_device(batch, self.args.device, non_blocking=True) for batch in batches]
        if batches:
            self.begin_step(batches)
        return batches, None

    def begin_step(self, batches: list[dict]) -> None:
        """Called with all micro-batches of this rank before the first is trained on."""
        of_batches = []
        for batch in batches:
            width = batch["image_texts"].shape[1] if "image_texts" in batch else 0
            rows = [len(batch[name]) for name in ("image_groups", "text_groups", "paired_captions", "lonely_images")]
            of_batches.append([*rows, width])
        counts = self.gather_step(of_batches)
        counts, widest = counts[..., :4], int(counts[..., 4].max())
        for batch, (*_, width) in zip(batches, of_batches):
            if widest > width:  # only where batches have texts
                batch["image_texts"] = nn.functional.pad(batch["image_texts"], (0, widest - width), value=NO_TEXT)
        self.num_images, self.num_captions, self.num_pairs, self.num_lonely_images = counts.sum(dim=(0, 1)).tolist()
        self.step_counts = counts[..., :2]  # [W, A, 2]: ranks, micro-batches, images and captions
        for micro_step, batch in enumerate(batches):
            batch["row_counts"] = counts[:, micro_step].T.tolist()

    def embed(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """L2-normalised float32 embeddings `[N, D]`, `[C, D]` of a batch: each image once for all its captions.

        Where there is no image or no caption, that tower runs one row that counts for nothing: DDP and FSDP wait for
        the gradients of every parameter on every rank.
        """
        if self.args.freeze is not None:  # after Trainer's `model.train()`: no dropout, no other BatchNorm statistics
            getattr(self.accelerator.unwrap_model(model), f"{self.args.freeze}_model").eval()
        # Each bucket is a forward pass, which of a sharded tower all ranks make together: they may differ in buckets.
        in_buckets = self._in_buckets and not self.is_fsdp_enabled
        in_buckets = in_buckets and "text_buckets" in batch
        batch = with_pixel_numbers(batch, self.pixel_table)
        with idle_towers(self.accelerator.unwrap_model(model), batch):
            buckets = {"text_buckets": batch["text_buckets"]} if in_buckets else {}
            output = model(**inputs_of(batch, self._one_row), **buckets)
        image_embeds, text_embeds = output.image_embeds.float(), output.text_embeds.float()
        if "pixel_values" not in batch:
            image_embeds = image_embeds[:0]
        if "input_ids" not in batch:
            text_embeds = text_embeds[:0]
        if torch.is_grad_enabled():
            # Of each row: its image, its captions.
            broken = torch.zeros(len(batch["image_ids"]), device=image_embeds.device)
            for rows, to_row in ((image_embeds, "image_to_row"), (text_embeds, "caption_to_row")):
                broken = broken.index_add(0, batch[to_row], (~torch.isfinite(rows)).any(dim=1).float())
            self.nonfinite.note_rows(batch["image_ids"], broken.detach() > 0)
        return image_embeds, text_embeds

    # Evaluation

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval", fold_size: int | None = None
    ) -> dict[str, float]:
        """Recall in both directions over the pairs of a split, each row once on any number of processes.

        Trainer's loop would compare within batches only. Where the split has teacher features, the teacher's own
        figures stand beside the student's as `teacher_{prefix}_*`, `{prefix}_share_of_teacher` in percent, and the
        agreement of all rows, with a partner or without, as `{prefix}_agreement`: [`agreement_with_teacher`]. With
        `fold_size`, `{prefix}_{1k or number}_*` are means over consecutive folds of that many images. With
        several datasets each one's name follows the prefix, as in Trainer. A caption that is equal to a right one is
        right too, unless the arguments say `recall_by_index`; see [`by_the_other_rule`].
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There is no dataset to evaluate on.")
        if isinstance(dataset, dict):
            parts = (self.evaluate(of, None, f"{metric_key_prefix}_{name}", fold_size) for name, of in dataset.items())
            return {name: value for metrics in parts for name, value in metrics.items()}
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"A {type(dataset).__name__} cannot be evaluated on: give a datasets.Dataset.")
        started = time.time()
        image_embeds, text_embeds = self.encode(dataset)
        self.last_embeds = None if self.is_in_train else (image_embeds, text_embeds)
        metrics = {f"{metric_key_prefix}_images": len(image_embeds), f"{metric_key_prefix}_captions": len(text_embeds)}
        has_teacher = set(TEACHER_COLUMNS) <= set(dataset.column_names)
        pairs, *of_pairs = pairs_alone(dataset, image_embeds, text_embeds)
        if len(pairs):
            groups, caption_to_image = rows_and_captions(pairs)
            whose = (groups, caption_to_image, None if self.args.recall_by_index else text_ids(pairs))
            of_student = recall_figures(*of_pairs, *whose, fold_size)
            metrics = {**{f"{metric_key_prefix}_{name}": value for name, value in of_student.items()}, **metrics}
            metrics.update(self.by_the_other_rule(pairs, *of_pairs, metric_key_prefix))
        if 0 < len(pairs) < len(dataset):
            metrics[f"{metric_key_prefix}_pairs"] = len(pairs)  # recall is of these alone
        if len(pairs) and has_teacher:
            metrics.update(self.beside_the_teacher(pairs, *of_pairs, *whose, metric_key_prefix, fold_size))
            teacher_rsum = metrics[f"teacher_{metric_key_prefix}_rsum"]
            share = 100 * of_student["rsum"] / teacher_rsum if teacher_rsum else float("nan")
            metrics[f"{metric_key_prefix}_share_of_teacher"] = share
        if has_teacher:
            if (split := dataset._fingerprint) not in self._teachers_first:
                by_index = self.args.recall_by_index
                self._teachers_first[split] = teachers_first_of(dataset, image_embeds.device, by_index)
            figures = agreement_with_teacher(image_embeds, text_embeds, self._teachers_first[split])
            metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=len(dataset)))
        self.log(metrics)
        for sign in self.signs_of_collapse(image_embeds, text_embeds):
            if sign not in self._signs and self.is_world_process_zero():
                logger.warning(f"The student may have collapsed: {sign}.")
            self._signs.add(sign)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset, **kwargs):
        """Refused: Trainer's would run batches one by one, and a split's rows are compared with each other."""
        raise NotImplementedError("predict compares no rows: use `evaluate` for figures, `encode` for embeddings.")

    def signs_of_collapse(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> list[str]:
        """Signs, after an evaluation, that the student learns nothing, each with what to do; each is warned of once.

        Args:
            image_embeds, text_embeds: of the evaluated split, `[N, D]` and `[M, D]`.
        """
        return [
            f"all {side} have nearly the same embedding. Lower learning_rate (or set warmup_steps), start from "
            "pre-trained towers, and look whether the images and captions of the data differ"
            for side in constant_sides(image_embeds, text_embeds)
        ]

    def by_the_other_rule(self, dataset, image_embeds, text_embeds, prefix: str) -> dict[str, float]:
        """Where captions stand for several images, their share in percent, `{prefix}_shared_captions`, and once
        training is over the RSUM by the rule that does not hold, `{prefix}_rsum_by_index` or `{prefix}_rsum_by_text`.
        """
        if dataset._fingerprint not in self._shared_texts:
            rule = "only its own image is a right answer" if self.args.recall_by_index else "each is a right answer"
            self._shared_texts[dataset._fingerprint] = find_shared_texts(dataset, prefix, rule)
        shared = self._shared_texts[dataset._fingerprint]
        if not shared.ids:
            return {}
        metrics = {f"{prefix}_shared_captions": shared.share}
        if not self.is_in_train:
            texts = text_ids(dataset) if self.args.recall_by_index else None
            other = recall_figures(image_embeds, text_embeds, *rows_and_captions(dataset), texts, None)
            metrics[f"{prefix}_rsum_by_{'text' if self.args.recall_by_index else 'index'}"] = other["rsum"]
        return metrics

    def beside_the_teacher(
        self, dataset, image_embeds, text_embeds, groups, caption_to_image, texts, prefix: str, fold_size: int | None
    ) -> dict[str, float]:
        """The teacher's own figures on a split, as `teacher_{prefix}_*`; made once for each split.

        Args:
            dataset: the split, with the teacher's features.
            image_embeds, text_embeds: the student's, `[N, D]` and `[M, D]`.
            groups, caption_to_image: `[N]`, `[M]`, see [`rows_and_captions`].
            texts: `[M]`, as `text_ids` of [`retrieval_metrics`].
            prefix, fold_size: see `evaluate`.
        """
        key = (prefix, dataset._fingerprint, fold_size)
        if key not in self._teacher_figures:
            teacher = (features.to(image_embeds.device) for features in teacher_rows(dataset))
            self._teacher_figures[key] = recall_figures(*teacher, groups, caption_to_image, texts, fold_size)
        return {f"teacher_{prefix}_{name}": value for name, value in self._teacher_figures[key].items()}

    def encode(self, dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of a split: images `[N, D]` in row order, captions `[M, D]` row by row, on every process."""
        return encode(
            dataset,
            self.model,
            self.processing_class,
            self.args,
            self.compute_loss_context_manager,
            is_sharded=self.is_fsdp_enabled,
        )
