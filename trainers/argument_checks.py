"""What a trainer cannot take: refused when it is made, by name, with what to do instead."""

from __future__ import annotations

import logging

import datasets
from torch import nn
from transformers.trainer_utils import IntervalStrategy

from rows.columns import pairs_of, partners
from rows.files import counted
from rows.teacher_columns import TEACHER_COLUMNS

from .agreement import FEWEST
from .row_checks import check_together
from .training_args import RetrievalTrainingArguments


logger = logging.getLogger(__name__)

NO_FIGURE = "No row of the {} split is a pair, and {} Hold more back, or give pairs."
# Arguments of Trainer that would have no effect here, and what to do instead.
REFUSED = {
    "data_collator": "batches are RetrievalCollator's, made with processing_class",
    "compute_metrics": "the figures are recalls over a whole split; override `evaluate` for others",
    "preprocess_logits_for_metrics": "a split is compared as a whole; override `evaluate` for other figures",
    "compute_loss_func": "override `compute_loss` in a subclass",
    "model_init": "give the model itself",
    "optimizer_cls_and_kwargs": "give `optimizers`, or set `optim` in the arguments",
}


def taken_arguments(given: dict[str, object], trainer: str) -> dict[str, object]:
    """The arguments for `Trainer`, without those that a trainer here would pass over.

    Args:
        given: keyword arguments of the trainer, by name; None is as good as left out.
        trainer: its class's name, for the message.

    Raises:
        ValueError: one of them is given; the message says which, and what to do instead.
    """
    for name, instead in REFUSED.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} has no effect in {trainer}: {instead}.")
    return {name: value for name, value in given.items() if name not in REFUSED}


def check_student(model: nn.Module) -> None:
    """Refuses a model that cannot be trained and saved as a student.

    Raises:
        ValueError: it has an adapter of PEFT, whose checkpoints are no students, or lacks what the trainer reads.
    """
    for module in model.modules():
        if hasattr(module, "peft_config") or getattr(module, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{type(module).__name__} has an adapter of PEFT, and a checkpoint of it would be no student that "
                "loads: call merge_and_unload() and train the model it returns; freeze='vision' or 'text' in the "
                "arguments spares a tower its training."
            )
    missing = [name for name in ("vision_config", "text_config", "projection_dim") if not hasattr(model.config, name)]
    if missing or not hasattr(model, "logit_scale"):
        lacks = ", ".join([f"config.{name}" for name in missing] or ["logit_scale"])
        raise ValueError(f"{type(model).__name__} has no {lacks}: give a DSMDModel, or a model with its interface.")


def check_processes(images: int, args: RetrievalTrainingArguments) -> None:
    """Refuses more processes than there are images to train on.

    Raises:
        ValueError: there are fewer images than processes.
    """
    if images < args.world_size:
        raise ValueError(
            f"The training split has {images} images for {args.world_size} processes: start fewer processes."
        )


def fit_batch_size(images: int, args: RetrievalTrainingArguments) -> None:
    """Lowers `per_device_train_batch_size` where one step would take more images than there are.

    Each epoch is then one step, of all images or, on several processes, nearly all.

    Args:
        images: of the training split.

    Raises:
        ValueError: see [`check_processes`].
    """
    step = args.per_device_train_batch_size * args.world_size
    if images >= step:
        return
    check_processes(images, args)
    args.per_device_train_batch_size = images // args.world_size
    logger.warning(
        f"The training split has {images} images, fewer than one step's {step}: each epoch is one step, with "
        f"per_device_train_batch_size={args.per_device_train_batch_size}."
    )


def check_evaluated(
    evaluated: dict[str, datasets.Dataset], several: bool, args: RetrievalTrainingArguments, remember: bool
) -> None:
    """Refuses datasets that cannot be evaluated on, by name, and a metric_for_best_model that none of them has.

    Where the only one has no pairs, or fewer than `FEWEST` among rows without a partner, `metric_for_best_model`
    becomes the agreement with the teacher instead of rsum.

    Args:
        remember: see [`check_together`].

    Raises:
        ValueError: which, and what to do.
    """
    if not evaluated:
        raise ValueError("eval_dataset is an empty dict: give a dataset for each name, or None.")
    for name, rows in evaluated.items():
        if not isinstance(rows, datasets.Dataset):
            raise ValueError(
                f"eval_dataset ({name}) is a {type(rows).__name__}: give a datasets.Dataset, not streamed."
            )
        check_together(rows, name, None, remember)
        pairs = len(pairs_of(rows))
        has = counted(pairs, "pair", "pairs")
        if pairs >= FEWEST or pairs == len(rows) > 0:
            continue
        lacks = why_no_agreement(name, rows)
        if lacks and not pairs:
            raise ValueError(NO_FIGURE.format(name, lacks))
        if lacks:
            logger.warning(f"Recall over the {has} of the {name} split says little, and {lacks} Hold more back.")
        elif not several and args.metric_for_best_model in ("rsum", "eval_rsum"):
            args.metric_for_best_model = "agreement"
            if pairs:
                logger.warning(
                    f"The {name} split has {has} of an image and a caption, fewer than {FEWEST}: the best "
                    "checkpoint is chosen by the agreement with the teacher, over all its rows."
                )
    chosen = (args.metric_for_best_model or "").removeprefix("eval_")
    if several and args.eval_strategy != IntervalStrategy.NO and chosen:
        if not any(chosen.startswith(f"{name}_") for name in evaluated):
            examples = " or ".join(f"{name}_rsum" for name in evaluated)
            raise ValueError(f"metric_for_best_model={chosen!r} names none of the eval datasets: say {examples}.")


def why_no_agreement(name: str, rows: datasets.Dataset) -> str | None:
    """Why a split has no agreement with a teacher, as the end of a sentence; None where it has one."""
    if not set(TEACHER_COLUMNS) <= set(rows.column_names):
        return (
            "there are no teacher features to compare with: add the teacher's features "
            "(datasets_scripts.add_teacher_features)."
        )
    return too_few_rows(rows)


def check_held_out(rows: datasets.DatasetDict) -> None:
    """Refuses the split that a run is evaluated on where no teacher could give it a figure: [`check_evaluated`] later
    would, after the teacher has run."""
    name = "validation" if "validation" in rows else "test"
    few = too_few_rows(rows[name]) if name in rows and not len(pairs_of(rows[name])) else None
    if few:
        raise ValueError(NO_FIGURE.format(name, few))


def too_few_rows(rows: datasets.Dataset) -> str | None:
    """Why rows are too few for an agreement with a teacher, as the end of a sentence; None where they are enough."""
    has_image, _ = partners(rows)
    images, texts = int(has_image.sum()), len({text for own in rows["captions"] for text in own})
    if images and texts and max(images, texts) >= FEWEST:
        return None
    return (
        f"it has {images:,} images and {texts:,} different texts: the agreement with the teacher needs both, and "
        f"{FEWEST} of one side."
    )
