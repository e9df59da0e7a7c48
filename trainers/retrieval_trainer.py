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
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy, speed_metrics
from transformers.utils import PushInProgress

from model_cards import RunFacts

from . import distributed
from .card import write_card
from .dataset_checks import check_dataset
from .distillation_config import DSMDTrainingArguments
from .hub_push import one_line, push_checkpoint, push_run, pushed_place, snapshot
from .images import load_rgb
from .retrieval import fold_metrics, retrieval_metrics
from .retrieval_data import (
    TEACHER_COLUMNS,
    RetrievalCollator,
    RetrievalDataset,
    id_hash,
    teacher_columns,
    teacher_tensors,
)
from .sharding import prepare_sharding
from .streaming import SkipTrainedBatches, StreamedRetrievalDataset, stream_head


logger = logging.getLogger(__name__)


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
            check_dataset(stream_head(train_dataset) if streamed else train_dataset, "train", teacher_dim)
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
        if isinstance(self.train_dataset, StreamedRetrievalDataset):
            self.add_callback(SkipTrainedBatches(self.train_dataset))
        elif self.train_dataset is not None:
            self.add_callback(_SetEpoch(self.train_dataset))
        self.add_callback(_MarkBeginning(self))
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
        if not isinstance(self.train_dataset, StreamedRetrievalDataset):
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
        counts = distributed.gather_counts([[len(b["image_groups"]), len(b["input_ids"])] for b in batches])
        self.num_images, self.num_captions = counts.sum(dim=(0, 1)).tolist()
        self.step_row_counts = counts.sum(dim=1).T.tolist()  # images of each rank, captions of each rank
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
        return output.image_embeds.float(), output.text_embeds.float()

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
        of_student = _figures(image_embeds, text_embeds, groups, caption_to_image, fold_size)
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
        teacher_image, teacher_text = (rows.to(image_embeds.device) for rows in teacher_rows(dataset))
        key = (prefix, dataset._fingerprint, fold_size)
        if key not in self._teacher_metrics:
            figures = _figures(teacher_image, teacher_text, groups, caption_to_image, fold_size)
            self._teacher_metrics[key] = {f"teacher_{prefix}_{name}": value for name, value in figures.items()}
        metrics = dict(self._teacher_metrics[key])
        teacher_rsum = metrics[f"teacher_{prefix}_rsum"]
        metrics[f"{prefix}_share_of_teacher"] = 100 * rsum / teacher_rsum if teacher_rsum else float("nan")
        if not self.needs_teacher or self.is_in_train:
            return metrics
        if self.teacher_projection is not None:
            teacher_image, teacher_text = (rows @ self.teacher_projection for rows in (teacher_image, teacher_text))
            reduced = retrieval_metrics(teacher_image, teacher_text, groups, groups[caption_to_image])
            metrics[f"teacher_reduced_{prefix}_rsum"] = reduced["rsum"]
        across = _across(image_embeds, text_embeds, teacher_image, teacher_text, groups, caption_to_image)
        for index, figures in across.items():
            metrics.update({f"{index}_{prefix}_{name}": value for name, value in figures.items()})
        return metrics

    @torch.no_grad()
    def encode(self, dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of a split: images `[N, D]` in row order, captions `[M, D]` row by row, on every process."""
        was_training = self.model.training
        self.model.eval()
        for buffer in self.model.buffers():  # BatchNorm's are each rank's own since its last batch
            distributed.from_first_rank(buffer)
        images = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        captions = [caption for row in dataset["captions"] for caption in row]
        loader = DataLoader(
            images.with_format(None).select(self._own_rows(len(images))),
            batch_size=self.args.eval_batch_size,
            collate_fn=_ImageCollator(self.processing_class.image_processor),
            num_workers=self.args.dataloader_num_workers,
        )
        tokenizer = self.processing_class.tokenizer
        own = self._own_rows(len(captions))
        # Captions of like length go together: padding costs as much as words.
        by_length = sorted(range(len(own)), key=lambda i: len(captions[own[i]]))
        bar = tqdm(
            total=len(images) + len(captions),
            desc="encode",
            leave=False,
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        with self.compute_loss_context_manager():
            image_embeds = []
            for pixel_values in loader:
                embeds = self.model(pixel_values=pixel_values.to(self.args.device)).image_embeds.float()
                image_embeds.append(embeds)
                bar.update(len(embeds) * distributed.world_size())
            text_embeds = torch.empty((len(own), self.model.config.projection_dim), device=self.args.device)
            for start in range(0, len(own), self.args.eval_batch_size):
                rows = by_length[start : start + self.args.eval_batch_size]
                text = tokenizer(
                    [captions[own[i]] for i in rows],
                    padding=True,
                    truncation=True,
                    max_length=self.args.max_caption_length,
                    return_tensors="pt",
                ).to(self.args.device)
                output = self.model(input_ids=text["input_ids"], attention_mask=text["attention_mask"])
                text_embeds[rows] = output.text_embeds.float()
                bar.update(len(rows) * distributed.world_size())
        bar.close()
        self.model.train(was_training)
        return self._in_row_order(torch.cat(image_embeds), len(images)), self._in_row_order(text_embeds, len(captions))

    @staticmethod
    def _own_rows(rows: int) -> list[int]:
        """As many on every rank, first rows again at the end: a sharded model's forward is a step of all ranks."""
        world = distributed.world_size()
        return [(start + distributed.rank()) % rows for start in range(0, rows, world)]

    @staticmethod
    def _in_row_order(own: torch.Tensor, rows: int) -> torch.Tensor:
        """All ranks' rows, of which rank r holds rows r, r + W, r + 2W, ..."""
        world = distributed.world_size()
        by_rank = distributed.gather_rows(own, [len(own)] * world).unflatten(0, (world, len(own)))
        return by_rank.transpose(0, 1).flatten(0, 1)[:rows]

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Trainer loads by the names in the file, and loses towers that are saved under others (ViT, DINOv2, Swin)."""
        saved = self.model_class.from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        # Into a sharded model too.
        set_model_state_dict(self.model, saved.state_dict(), options=StateDictOptions(full_state_dict=True))

    def _load_best_model(self) -> None:
        """The same fault as in `_load_from_checkpoint`."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP Trainer leaves the weights a second time, as a pickle."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled and self.args.should_save:
            os.remove(os.path.join(output_dir, f"{FSDP_MODEL_NAME}.bin"))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer leaves its arguments as a pickle, with a token in clear; here they are JSON, and a card is there."""
        output_dir = output_dir or self.args.output_dir
        sharded_class = type(self.model)
        self.model.__class__ = self.model_class  # or the code of FSDP's own class would go with it
        super()._save(output_dir, state_dict)
        self.model.__class__ = sharded_class
        if self.args.should_save:
            os.remove(os.path.join(output_dir, "training_args.bin"))
            write_json(os.path.join(output_dir, "training_args.json"), self.args.to_dict())
            write_card(self, output_dir)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Names the repository; each push makes it where it is missing. Trainer's would stop a run the Hub refuses."""
        if not self.is_world_process_zero():
            return
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.push_in_progress = None

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
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        try:
            snapshot(Path(checkpoint_folder), folder)
        except OSError as error:
            logger.warning(f"Step {step} is not pushed: {one_line(error)}.")
            shutil.rmtree(folder, ignore_errors=True)
            return
        job = HfApi().run_as_future(
            push_checkpoint,
            folder,
            self.hub_model_id,
            pushed_place(self.args.hub_strategy, checkpoint_folder),
            f"Training in progress, step {step}",
            self.args.hub_revision,
            self.args.hub_private_repo,
        )
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])

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


class _MarkBeginning(TrainerCallback):
    """Leaves in the log that a run was resumed, for its card, and takes from the card what earlier weights scored."""

    def __init__(self, trainer: RetrievalTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.facts.metrics, self.trainer.facts.usage = {}, None
        if state.global_step:
            state.log_history.append({"resumed": True, "epoch": state.epoch, "step": state.global_step})


class _SetEpoch(TrainerCallback):
    """Tells the dataset the epoch: a run resumed in mid-epoch does not (accelerate's skipping loader forgets to)."""

    def __init__(self, dataset: RetrievalDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class _ImageCollator:
    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, rows: list[dict]) -> torch.Tensor:
        images = [load_rgb(row["image"]) for row in rows]
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]


def rows_and_captions(dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups `[N]` of the images, and the row `[M]` of each caption's image."""
    column = "group_id" if "group_id" in dataset.column_names else "image_id"
    groups = torch.tensor([id_hash(group) for group in dataset[column]])
    counts = torch.tensor([len(captions) for captions in dataset["captions"]])
    return groups, torch.repeat_interleave(torch.arange(len(groups)), counts)


def teacher_rows(dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's features of a split's images `[N, D]` and captions `[C, D]`, as stored, in float32."""
    return teacher_tensors(dataset.select_columns(teacher_columns(dataset.column_names)).with_format("arrow")[:])


def _figures(image, text, groups, caption_to_image, fold_size: int | None) -> dict[str, float]:
    """Recall over all rows, and as `{1k}_*` the means over folds."""
    figures = retrieval_metrics(image, text, groups, groups[caption_to_image])
    if fold_size is not None:
        folds = fold_metrics(image, text, groups, caption_to_image, fold_size)
        label = f"{fold_size // 1000}k" if fold_size % 1000 == 0 else str(fold_size)
        figures |= {f"{label}_{name}": value for name, value in folds.items()}
    return figures


def _across(image, text, teacher_image, teacher_text, groups, caption_to_image) -> dict[str, dict[str, float]]:
    """Recall of one model's queries on the other's index: {"teacher_index": figures, "student_index": figures}."""
    text_groups = groups[caption_to_image]
    on_images = retrieval_metrics(teacher_image, text, groups, text_groups)  # student's captions, teacher's images
    on_texts = retrieval_metrics(image, teacher_text, groups, text_groups)  # student's images, teacher's captions
    ways = {"teacher_index": (on_texts, on_images), "student_index": (on_images, on_texts)}
    across = {}
    for index, (image_queries, text_queries) in ways.items():
        recalls = {name: value for name, value in image_queries.items() if name.startswith("image_to_text_r")}
        recalls |= {name: value for name, value in text_queries.items() if name.startswith("text_to_image_r")}
        across[index] = {**recalls, "rsum": sum(recalls.values())}
    return across


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Written beside, then renamed: the file is whole or absent."""
    with open(f"{path}.part", "w") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
    os.replace(f"{path}.part", path)
