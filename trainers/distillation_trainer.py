"""Distillation from stored teacher features under four losses whose weights balance themselves."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_callback import TrainerCallback

from rows.columns import partners
from rows.files import write_whole
from rows.teacher_columns import teacher_rows

from .argument_checks import check_student
from .balancers import make_balancer
from .base_trainer import RetrievalTrainer
from .collapse import pairs_at_the_margin
from .feature_queue import FeatureQueue
from .loss_inputs import TeacherRows
from .losses import (
    contrastive_distillation,
    feature_distillation,
    hard_negative_distillation,
    similarity_distillation,
)
from .metrics import retrieval_metrics
from .retrieval_evaluation import across_figures
from .run import distributed
from .run.checkpoints import NotResumable
from .step_rows import other_students, partners_of, rows_of_the_step, teacher_rows_of
from .student import as_student
from .teacher_pca import load_pca, projection_of_student, save_pca, width_in_hand
from .training_args import DSMDTrainingArguments
from .widths import figures_by_width


logger = logging.getLogger(__name__)

STATE_FILE = "_distillation_state.safetensors"  # the underscore keeps it out of the model repository's root


class DSMDTrainer(RetrievalTrainer):
    """`Trainer` that distils stored teacher features into a dual encoder (DSMD, arXiv 2404.10838).

    Before the first micro-batch of an optimiser step the teacher rows of the whole step, of all ranks, enter the
    queues. The weights of the losses are constant within a step and set by the balancer after it.

    Args:
        model: a [`DSMDModel`], or a saved one's folder or Hub id; its `projection_dim` is the width of the
            teacher's features after `teacher_projection`.
        args: [`DSMDTrainingArguments`].
        teacher_projection: `[D, projection_dim]`, where the student is narrower than the teacher's D, or was rotated;
            see [`fit_pca`]. Default: what a student that is given by its name brings, see [`projection_of_student`].
        train_dataset: rows with `teacher_image_embeds` and `teacher_text_embeds`.
        eval_dataset, processing_class, **kwargs: see [`RetrievalTrainer`].
    """

    arguments_class = DSMDTrainingArguments
    method = "distillation"

    def __init__(
        self,
        model,
        args: DSMDTrainingArguments,
        train_dataset=None,
        teacher_projection: torch.Tensor | None = None,
        processing_class=None,
        **kwargs,
    ):
        name = model
        model, processing_class = as_student(model, processing_class)
        check_student(model)
        dim = teacher_dim = model.config.projection_dim
        if teacher_projection is None and name is not model:
            width = width_in_hand(train_dataset, kwargs.get("eval_dataset"))
            teacher_projection = distributed.decided_by_first_rank(lambda: projection_of_student(name, dim, width))
        if teacher_projection is not None:
            if teacher_projection.shape[1] != dim:
                raise ValueError(
                    f"teacher_projection is {list(teacher_projection.shape)}; expected [teacher's width, {dim}], the "
                    "student's."
                )
            teacher_dim = len(teacher_projection)
            # Each process may have fitted its own; on unlike machines they differ in the last digits.
            teacher_projection = distributed.from_first_rank(teacher_projection.to(args.device))
        self.teacher_projection = teacher_projection
        more = {"processing_class": processing_class, "teacher_dim": teacher_dim, **kwargs}
        super().__init__(model, args, train_dataset=train_dataset, **more)
        # The four losses do not use the temperature: the optimiser would have no state of it to resume from.
        self.model.logit_scale.requires_grad_(False)
        self.balancer = make_balancer(args.balancer, args.losses, **self._balancer_settings(train_dataset))
        self.balancer.to(args.device)
        self.balancer_is_set = False
        sizes = (0, 0)
        if isinstance(train_dataset, datasets.IterableDataset):
            sizes = (args.queue_size, args.queue_size)  # nobody knows how long a stream is
        elif train_dataset is not None:
            has_image, counts = partners(train_dataset)
            sizes = int(has_image.sum()), int(counts.sum())
        self.image_queue, self.text_queue = (
            FeatureQueue(min(args.queue_size, size), dim, device=args.device) for size in sizes
        )
        if args.queue_size > min(sizes) and train_dataset is not None:
            # Nothing is lost: a queue of all the data holds every negative there is.
            logger.warning(
                f"queue_size {args.queue_size} is clamped to the data: {sizes[0]} images, {sizes[1]} captions."
            )
        # Raw losses of this step so far [n], and of their pairs [m]; None before a step's first micro-batch.
        self.step_so_far: tuple[torch.Tensor, torch.Tensor] | None = None
        # Of each step since the last log: losses and weights [2, n], and the losses of each pair [m].
        self._history: list[torch.Tensor] = []
        self._pair_history: list[torch.Tensor] = []
        self.pair_names: list[str] = []  # names of the m pairs, such as "contrastive_IT"
        self.add_callback(_UpdateBalancer(self))

    def _balancer_settings(self, train_dataset) -> dict:
        args = self.args
        settings = {}
        if args.balancer in ("dynamic", "published", "dwa") and args.balancer_temperature is not None:
            settings["temperature"] = args.balancer_temperature
        if args.balancer == "dynamic":
            settings["smoothing"] = args.balancer_smoothing
        elif args.balancer == "fixed" and args.loss_weights is not None:
            settings["weights"] = dict(zip(args.losses, args.loss_weights))
        elif args.balancer == "dwa":
            if isinstance(train_dataset, datasets.IterableDataset):
                raise ValueError(
                    "balancer=dwa compares epochs, and a stream's are not known: choose another balancer."
                )
            batches = len(train_dataset or ()) / (args.train_batch_size * distributed.world_size())
            batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
            settings["steps_per_epoch"] = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        elif args.balancer == "random":
            settings["seed"] = args.seed
        return settings

    def begin_step(self, batches: list[dict]) -> None:
        super().begin_step(batches)
        for batch in batches:
            batch["teacher_rows"] = teacher_rows_of(batch, self.teacher_projection)
        self.step_rows = step = rows_of_the_step(batches, self.step_counts)
        self.step_is_one_batch = len(batches) == 1 and distributed.world_size() == 1
        self.image_queue.push(step.image, step.image_groups, step.image_texts)
        self.text_queue.push(step.text, step.text_groups, None if step.text_ids is None else step.text_ids[:, None])
        if not self.balancer_is_set:
            with torch.no_grad(), self.compute_loss_context_manager():
                self.model.train()
                terms = [self.loss_terms(*self.embed(self.model, batch), batch) for batch in batches]
            losses = distributed.sum_over_ranks(sum(map(summed, terms)))
            self.balancer.initialise(torch.where(self._has_queries(terms[0])[0], losses, torch.nan))
            self.balancer_is_set = True
        self.step_weights = self.balancer.weights()  # [n], until `end_step`

    def _has_queries(self, terms: dict[str, dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which losses `[n]`, and which of their pairs `[m]`, have a query in this step, on any rank."""
        by_pair = {"II": self.num_images > 0, "TT": self.num_captions > 0}
        by_pair |= dict.fromkeys(("IT", "TI"), self.num_pairs > 0)
        columns = self.dictionary()
        contrastive = dict(by_pair)
        contrastive["IT"] |= self.num_images > 0 and len(columns.text) > 0
        contrastive["TI"] |= self.num_captions > 0 and len(columns.image) > 0
        of_terms = [
            [(contrastive if name == "contrastive" else by_pair)[pair] for pair in of_pairs]
            for name, of_pairs in terms.items()
        ]
        of_losses, of_all = [any(own) for own in of_terms], [has for own in of_terms for has in own]
        # Made on the device where nothing is missing: a copy from the host would wait for it.
        device = columns.image.device
        return tuple(
            torch.ones(len(has), dtype=torch.bool, device=device) if all(has) else torch.tensor(has, device=device)
            for has in (of_losses, of_all)
        )

    def loss_terms(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, batch: dict
    ) -> dict[str, dict[str, torch.Tensor]]:
        """This rank's part of the step's raw losses, of each loss and pair: `{"feature": {"II": scalar, ...}, ...}`.

        Args:
            image_embeds: student images, L2-normalised, `[N, D]`.
            text_embeds: student captions, L2-normalised, `[C, D]`.
            batch: a micro-batch of `begin_step`.
        """
        args = self.args
        own: TeacherRows = batch["teacher_rows"]
        rows = (image_embeds, text_embeds, own.image, own.text)
        whose = (batch["image_groups"], batch["caption_to_image"])
        texts = {"image_texts": own.image_texts, "text_ids": own.text_ids, "text_groups": own.text_groups}
        texts["partners"] = partners_of(batch)
        counts = {"num_images": self.num_images, "num_captions": self.num_captions}
        of_pairs = {**counts, "num_pairs": self.num_pairs}
        compute = {
            "contrastive": lambda: contrastive_distillation(
                *rows,
                *whose,
                dictionary=self.dictionary(),
                **texts,
                pairs=args.contrastive_pairs,
                temperature=args.contrastive_temperature,
                targets=args.contrastive_targets,
                num_lonely_images=self.num_lonely_images,
                **of_pairs,
            ),
            "feature": lambda: feature_distillation(*rows, **counts),
            "similarity": lambda: similarity_distillation(*rows, **counts),
            "hard_negative": lambda: hard_negative_distillation(
                *rows,
                *whose,
                step=None if self.step_is_one_batch else self.step_rows,
                others=other_students(image_embeds, text_embeds, batch),
                **texts,
                pairs=args.hard_negative_pairs,
                margin=args.hard_negative_margin,
                margin_kind=args.hard_negative_margin_kind,
                hardest=args.hardest_negative,
                **of_pairs,
            ),
        }
        return {name: compute[name]() for name in args.losses}

    def dictionary(self) -> TeacherRows:
        """What the contrastive loss contrasts with: the step's rows and, up to `queue_size` altogether, older ones.

        A queue holds both where the whole step fits into it; a larger step is taken alone.
        """
        step, images, captions = self.step_rows, self.image_queue, self.text_queue
        whole_image = len(step.image) > images.size
        whole_text = len(step.text) > captions.size
        return TeacherRows(
            image=step.image if whole_image else images.features,
            image_groups=step.image_groups if whole_image else images.groups,
            text=step.text if whole_text else captions.features,
            text_groups=step.text_groups if whole_text else captions.groups,
            image_texts=step.image_texts if whole_image else images.texts,
            text_ids=step.text_ids if whole_text or captions.texts is None else captions.texts.squeeze(1),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms = self.loss_terms(*self.embed(model, inputs), inputs)
        losses = summed(terms)
        self._with_queries = self._has_queries(terms)
        self.pair_names = [f"{name}_{pair}" for name, of_pairs in terms.items() for pair in of_pairs]
        pairs = torch.stack([term.detach() for of_pairs in terms.values() for term in of_pairs.values()])
        before = self.step_so_far or (torch.zeros_like(losses.detach()), torch.zeros_like(pairs))
        self.step_so_far = before[0] + losses.detach(), before[1] + pairs
        # DDP averages the ranks' gradients; each rank holds a part of one sum.
        loss = (self.step_weights * losses).sum() * distributed.world_size()
        return (loss, None) if return_outputs else loss

    def latest_losses(self) -> torch.Tensor:
        return self.step_so_far[0]

    def end_step(self) -> None:
        """After the optimiser's step: the balancer sees the step's raw losses, of all micro-batches and ranks."""
        losses, pairs = self.step_so_far
        losses, pairs = distributed.sum_over_ranks(torch.cat([losses, pairs])).split([len(losses), len(pairs)])
        # A loss without a query has no value: NaN leaves the balancer's state of it as it is, and the logged means.
        losses, pairs = (torch.where(has, of, torch.nan) for has, of in zip(self._with_queries, (losses, pairs)))
        self._history.append(torch.stack([losses, self.step_weights]))
        self._pair_history.append(pairs)
        self.balancer.update(losses)
        self.step_so_far = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each loss, its weight and its share of the weighted sum, and the loss of each of its pairs, as means
        over the steps since the last log."""
        if "loss" in logs and self._history:
            history = torch.stack(self._history)  # [steps, 2, n]
            weighted = history.prod(dim=1)
            weighted = torch.where(torch.isnan(weighted), 0.0, weighted)
            shares = weighted / weighted.sum(dim=1, keepdim=True).clamp(min=1e-12)
            rows = torch.cat([history, shares[:, None]], dim=1)
            for kind, values in zip(("loss", "weight", "share"), mean_of_finite(rows)):
                of_losses = zip(self.args.losses, values)
                logs.update({f"{kind}_{name}": value for name, value in of_losses if not math.isnan(value)})
            self._history.clear()
        if "loss" in logs and self._pair_history:
            means = mean_of_finite(torch.stack(self._pair_history))
            # A pair without a query in any of the steps has no loss.
            logs.update(
                {f"loss_{name}": value for name, value in zip(self.pair_names, means) if not math.isnan(value)}
            )
            self._pair_history.clear()
        super().log(logs, start_time)

    def beside_the_teacher(
        self, dataset, image_embeds, text_embeds, groups, caption_to_image, texts, prefix: str, fold_size: int | None
    ) -> dict[str, float]:
        """Once training is over, adds `teacher_index_{prefix}_*` (the student's queries on the teacher's index) and
        `student_index_{prefix}_*` (the reverse); under a projection, which sorts the numbers of an embedding, also the
        teacher's RSUM at the student's width, and both's at smaller ones, see [`figures_by_width`]."""
        whose = (groups, caption_to_image, texts)
        metrics = super().beside_the_teacher(dataset, image_embeds, text_embeds, *whose, prefix, fold_size)
        if self.is_in_train:
            return metrics
        teacher_image, teacher_text = (features.to(image_embeds.device) for features in teacher_rows(dataset))
        if self.teacher_projection is not None:
            teacher_image, teacher_text = (rows @ self.teacher_projection for rows in (teacher_image, teacher_text))
            of_captions = groups[caption_to_image]
            if len(self.teacher_projection) > self.teacher_projection.shape[1]:
                reduced = retrieval_metrics(teacher_image, teacher_text, groups, of_captions, text_ids=texts)
                metrics[f"teacher_reduced_{prefix}_rsum"] = reduced["rsum"]
            for whose_prefix, *embeds in (("", image_embeds, text_embeds), ("teacher_", teacher_image, teacher_text)):
                by_width = figures_by_width(*embeds, *whose)
                metrics |= {f"{whose_prefix}{prefix}_{name}": value for name, value in by_width.items()}
        across = across_figures(image_embeds, text_embeds, teacher_image, teacher_text, *whose)
        for index, figures in across.items():
            metrics.update({f"{index}_{prefix}_{name}": value for name, value in figures.items()})
        return metrics

    def signs_of_collapse(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> list[str]:
        """Adds a hard-negative loss that stays at twice its margin."""
        signs, args = super().signs_of_collapse(image_embeds, text_embeds), self.args
        if args.hard_negative_margin_kind == "fixed" and args.hardest_negative and args.hard_negative_margin > 0:
            for pair in pairs_at_the_margin(self.state.log_history, args.hard_negative_margin):
                signs.append(
                    f"the hard-negative loss of {pair} stays at twice its margin, {args.hard_negative_margin}. Set "
                    "hard_negative_margin_kind to teacher, lower learning_rate, or leave feature in losses"
                )
        return signs

    def save_extra_files(self, folder: Path) -> None:
        """The projection that brings the teacher's features into the student's space."""
        if self.teacher_projection is not None:
            save_pca(self.teacher_projection, folder)

    def save_extra_state(self, folder: Path) -> None:
        """Balancer, queues and what is not logged yet: a run resumed without them would be another run."""
        with write_whole(folder / STATE_FILE) as beside:
            save_file(self.distillation_state(), beside)

    def distillation_state(self) -> dict[str, torch.Tensor]:
        """What `save_extra_state` writes."""
        tensors = {
            f"{part}.{key}": tensor.contiguous()
            for part in ("balancer", "image_queue", "text_queue")
            for key, tensor in getattr(self, part).state_dict().items()
        }
        for name, history in (("history", self._history), ("pairs", self._pair_history)):
            if history:
                tensors[f"log.{name}"] = torch.stack(history)
        return tensors

    def load_extra_state(self, checkpoint: Path) -> None:
        path = checkpoint / STATE_FILE
        if not path.is_file():
            raise NotResumable(
                f"{checkpoint} has no {STATE_FILE}: it is no checkpoint of a distillation to resume from."
            )
        projection = load_pca(checkpoint)
        own = self.teacher_projection
        if (projection is None) != (own is None) or (
            projection is not None and not torch.allclose(projection, own.cpu(), atol=1e-4)
        ):
            raise NotResumable(
                f"{checkpoint} was trained on teacher features with another projection: resume with its dataset."
            )
        if projection is not None:  # fitted anew it may differ in the last digits
            self.teacher_projection = projection.to(self.args.device)
        parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in load_file(path).items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor.to(self.args.device)
        self.balancer.load_state_dict(parts["balancer"])
        self.image_queue.load_state_dict(parts["image_queue"])
        self.text_queue.load_state_dict(parts["text_queue"])
        self._history = list(parts["log"].get("history", ()))
        self._pair_history = list(parts["log"].get("pairs", ()))  # a checkpoint of an earlier release has none
        self.balancer_is_set = True


def summed(terms: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
    """Each loss as the sum of its pairs, `[n]`."""
    return torch.stack([sum(of_pairs.values()) for of_pairs in terms.values()])


def mean_of_finite(values: torch.Tensor) -> list:
    """Means over the steps of `[steps, ...]`, in one sync: a skipped step's losses may not be finite."""
    return torch.where(torch.isfinite(values), values, torch.nan).nanmean(dim=0).tolist()


class _UpdateBalancer(TrainerCallback):
    """Tells the trainer that an optimiser step has been taken: Trainer has no method for it."""

    def __init__(self, trainer: DSMDTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.end_step()
