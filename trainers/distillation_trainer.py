"""Distillation from stored teacher features under four losses whose weights balance themselves."""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict

import datasets
import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_callback import TrainerCallback

from .balancers import make_balancer
from .distillation_config import DSMDTrainingArguments
from .feature_queue import FeatureQueue
from .losses import (
    OtherStudents,
    contrastive_distillation,
    feature_distillation,
    hard_negative_distillation,
    similarity_distillation,
)
from .retrieval_trainer import RetrievalTrainer
from .run import distributed
from .teacher_pca import load_pca, save_pca


logger = logging.getLogger(__name__)

STATE_FILE = "_distillation_state.safetensors"  # the underscore keeps it out of the model repository's root


def normalize(features: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    """Stored teacher features `[N, D]` as unit rows in float32, of the projection's width where there is one."""
    features = features.float() if projection is None else features.float() @ projection
    return torch.nn.functional.normalize(features, dim=-1)


def _of_the_step(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """All ranks' rows of a step; `counts` `[W, A]` are those of their micro-batches."""
    gathered = distributed.gather_rows(rows, counts.sum(dim=1).tolist())
    return distributed.in_order_of_batches(gathered, counts)


class DSMDTrainer(RetrievalTrainer):
    """`Trainer` that distils stored teacher features into a dual encoder (DSMD, arXiv 2404.10838).

    Before the first micro-batch of an optimiser step the teacher rows of the whole step, of all ranks, enter the
    queues. The weights of the losses are constant within a step and set by the balancer after it.

    Args:
        model: a [`DSMDModel`] whose `projection_dim` is the width of the teacher's features, projected or not.
        args: [`DSMDTrainingArguments`].
        teacher_projection: `[D, projection_dim]`, where the student is narrower than the teacher's D; see [`fit_pca`].
        train_dataset: rows with `teacher_image_embeds` and `teacher_text_embeds`.
        eval_dataset, processing_class, **kwargs: see [`RetrievalTrainer`].
    """

    needs_teacher = True

    def __init__(
        self,
        model,
        args: DSMDTrainingArguments,
        train_dataset=None,
        teacher_projection: torch.Tensor | None = None,
        **kwargs,
    ):
        if teacher_projection is not None:
            if teacher_projection.shape[1] != model.config.projection_dim:
                raise ValueError(
                    f"teacher_projection is {list(teacher_projection.shape)}; expected [teacher's width, "
                    f"{model.config.projection_dim}], the student's."
                )
            # Each process may have fitted its own; on unlike machines they differ in the last digits.
            self.teacher_projection = distributed.from_first_rank(teacher_projection.to(args.device))
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.balancer = make_balancer(args.balancer, args.losses, **self._balancer_settings(train_dataset))
        self.balancer.to(args.device)
        self.balancer_is_set = False
        sizes = (0, 0)
        if isinstance(train_dataset, datasets.IterableDataset):
            sizes = (args.queue_size, args.queue_size)  # nobody knows how long a stream is
        elif train_dataset is not None and len(train_dataset) >= args.queue_size:
            # Each row has a caption or more: nothing is clamped, and captions need not be counted.
            sizes = (args.queue_size, args.queue_size)
        elif train_dataset is not None:
            sizes = len(train_dataset), sum(len(captions) for captions in train_dataset["captions"])
        self.image_queue, self.text_queue = (
            FeatureQueue(min(args.queue_size, size), model.config.projection_dim, device=args.device) for size in sizes
        )
        if args.queue_size > min(sizes) and train_dataset is not None:
            # The four losses need no more: a queue of all the data is already every negative there is.
            logger.warning(
                f"queue_size {args.queue_size} is clamped to the data: {sizes[0]} images, {sizes[1]} captions."
            )
        # Raw losses of this step so far [n], and (losses, weights) of each step since the last log [2, n].
        self._step_losses = torch.zeros(len(args.losses), device=args.device)
        self._history: list[torch.Tensor] = []
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
            for name in ("teacher_image", "teacher_text"):
                batch[name] = normalize(batch[name], self.teacher_projection)
        groups = torch.cat([batch["image_groups"] for batch in batches])
        teacher_image = torch.cat([batch["teacher_image"] for batch in batches])
        # Image by image, not by length as in the batches: a queue that is smaller than the step keeps the last.
        orders = [batch["caption_to_image"].argsort(stable=True) for batch in batches]
        teacher_text = torch.cat([batch["teacher_text"][order] for batch, order in zip(batches, orders)])
        text_groups = torch.cat(
            [batch["image_groups"][batch["caption_to_image"][order]] for batch, order in zip(batches, orders)]
        )
        images, captions = self.step_counts.unbind(dim=-1)
        self.step_rows = {
            "step_teacher_image": _of_the_step(teacher_image, images),
            "step_image_groups": _of_the_step(groups, images),
            "step_teacher_text": _of_the_step(teacher_text, captions),
            "step_text_groups": _of_the_step(text_groups, captions),
        }
        self.step_is_one_batch = len(batches) == 1 and distributed.world_size() == 1
        self.image_queue.push(self.step_rows["step_teacher_image"], self.step_rows["step_image_groups"])
        self.text_queue.push(self.step_rows["step_teacher_text"], self.step_rows["step_text_groups"])
        if not self.balancer_is_set:
            with torch.no_grad(), self.compute_loss_context_manager():
                self.model.train()
                losses = sum(self.losses(*self.embed(self.model, batch), batch) for batch in batches)
            self.balancer.initialise(distributed.sum_over_ranks(losses))
            self.balancer_is_set = True

    def losses(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, batch: dict) -> torch.Tensor:
        """This rank's part of the step's raw losses `[n]`, in the order of `args.losses`.

        Args:
            image_embeds: student images, L2-normalised, `[N, D]`.
            text_embeds: student captions, L2-normalised, `[C, D]`.
            batch: the micro-batch, its teacher rows normalised.
        """
        args = self.args
        rows = (image_embeds, text_embeds, batch["teacher_image"], batch["teacher_text"])
        whose = (batch["image_groups"], batch["caption_to_image"])
        counts = {"num_images": self.num_images, "num_captions": self.num_captions}
        terms = {}
        for name in args.losses:
            if name == "feature":
                terms[name] = feature_distillation(*rows, **counts)
            elif name == "similarity":
                terms[name] = similarity_distillation(*rows, **counts)
            elif name == "contrastive":
                own = self.step_rows  # a queue of size 0 contrasts with this step's rows alone
                terms[name] = contrastive_distillation(
                    *rows,
                    *whose,
                    dictionary_image=self.image_queue.features if args.queue_size else own["step_teacher_image"],
                    dictionary_image_groups=self.image_queue.groups if args.queue_size else own["step_image_groups"],
                    dictionary_text=self.text_queue.features if args.queue_size else own["step_teacher_text"],
                    dictionary_text_groups=self.text_queue.groups if args.queue_size else own["step_text_groups"],
                    pairs=args.contrastive_pairs,
                    temperature=args.contrastive_temperature,
                    **counts,
                )
            else:
                terms[name] = hard_negative_distillation(
                    *rows,
                    *whose,
                    **({} if self.step_is_one_batch else self.step_rows),
                    others=self._other_students(*rows, *whose, batch["row_counts"]),
                    pairs=args.hard_negative_pairs,
                    margin=args.hard_negative_margin,
                    margin_kind=args.hard_negative_margin_kind,
                    hardest=args.hardest_negative,
                    **counts,
                )
        return torch.stack([sum(terms[name].values()) for name in args.losses])

    def _other_students(
        self, image, text, teacher_image, teacher_text, groups, caption_to_image, row_counts
    ) -> OtherStudents | None:
        """All ranks' rows of this micro-batch, this rank's own still live among the others' constants."""
        world = distributed.world_size()
        if world == 1:
            return None
        images, captions = row_counts
        offset, text_offset = sum(images[: distributed.rank()]), sum(captions[: distributed.rank()])

        def splice(rows, counts, start):
            gathered = distributed.gather_rows(rows, counts)
            return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])

        return OtherStudents(
            student_image=splice(image, images, offset),
            student_text=splice(text, captions, text_offset),
            teacher_image=distributed.gather_rows(teacher_image, images),
            teacher_text=distributed.gather_rows(teacher_text, captions),
            image_groups=distributed.gather_rows(groups, images),
            caption_to_image=distributed.gather_rows(caption_to_image + offset, captions),
            world_size=world,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = self.losses(*self.embed(model, inputs), inputs)
        self._step_losses += losses.detach()
        # DDP averages the ranks' gradients; each rank holds a part of one sum.
        loss = (self.balancer.weights() * losses).sum() * distributed.world_size()
        return (loss, None) if return_outputs else loss

    def step_losses(self) -> torch.Tensor:
        return self._step_losses

    def end_step(self) -> None:
        """After the optimiser's step: the balancer sees the step's raw losses, of all micro-batches and ranks."""
        losses = distributed.sum_over_ranks(self._step_losses)
        self._history.append(torch.stack([losses, self.balancer.weights()]))
        self.balancer.update(losses)
        self._step_losses.zero_()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each loss, its weight and its share of the weighted sum, as means over the steps since the last log."""
        if "loss" in logs and self._history:
            history = torch.stack(self._history)  # [steps, 2, n]
            weighted = history.prod(dim=1)
            shares = weighted / weighted.sum(dim=1, keepdim=True).clamp(min=1e-12)
            rows = torch.cat([history, shares[:, None]], dim=1)
            # A skipped step's losses may not be finite.
            means = torch.where(torch.isfinite(rows), rows, torch.nan).nanmean(dim=0).tolist()  # one sync
            for kind, values in zip(("loss", "weight", "share"), means):
                logs.update({f"{kind}_{name}": value for name, value in zip(self.args.losses, values)})
            self._history.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """With the student travels the projection that brings the teacher's features into its space."""
        super()._save(output_dir, state_dict)
        if self.teacher_projection is not None and self.args.should_save:
            save_pca(self.teacher_projection, output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer saves neither balancer nor queues; a run resumed without them is another run."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            path = os.path.join(output_dir, STATE_FILE)
            save_file(self._distillation_state(), path + ".part")
            os.replace(path + ".part", path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The counterpart of `_save_optimizer_and_scheduler`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"{checkpoint} has no {STATE_FILE}: it is no checkpoint of a distillation to resume from."
            )
        projection = load_pca(checkpoint)
        own = self.teacher_projection
        if (projection is None) != (own is None) or (
            projection is not None and not torch.allclose(projection, own.cpu(), atol=1e-4)
        ):
            raise ValueError(
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
        self.balancer_is_set = True

    def _distillation_state(self) -> dict[str, torch.Tensor]:
        return {
            f"{part}.{key}": tensor.contiguous()
            for part in ("balancer", "image_queue", "text_queue")
            for key, tensor in getattr(self, part).state_dict().items()
        } | ({"log.history": torch.stack(self._history)} if self._history else {})


class _UpdateBalancer(TrainerCallback):
    """Tells the trainer that an optimiser step has been taken: Trainer has no method for it."""

    def __init__(self, trainer: DSMDTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.end_step()
