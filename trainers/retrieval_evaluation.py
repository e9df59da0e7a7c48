"""A split's embeddings on any number of processes, and the figures that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import datasets
import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rows.columns import text_ids
from rows.teacher_columns import teacher_rows

from .agreement import TeachersFirst, teachers_first
from .evaluation_batches import PreparedBatches, in_row_order, prepared_loader
from .metrics import fold_metrics, retrieval_metrics
from .run import distributed
from .run.loader_workers import name_killed_workers
from .training_args import RetrievalTrainingArguments


@torch.no_grad()
def encode(
    dataset: datasets.Dataset,
    model: PreTrainedModel,
    processor,
    args: RetrievalTrainingArguments,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    is_sharded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of a split: images `[N, D]` in row order, captions `[M, D]` row by row, on every process.

    Args:
        dataset: rows of the contract, with a partner or without.
        model: the student, on `args.device`.
        processor: its `image_processor` and `tokenizer`.
        args: batch size, loader workers, longest caption.
        autocast: gives the context that the model runs in.
        is_sharded: the model is FSDP's, whose forward all ranks make together.
    """
    was_training = model.training
    model.eval()
    for buffer in model.buffers():  # BatchNorm's are each rank's own since its last batch
        distributed.from_first_rank(buffer)
    batches = PreparedBatches(dataset, processor, args)
    bar = tqdm(
        total=batches.images + batches.captions,
        desc="encode",
        leave=False,
        disable=args.disable_tqdm or args.process_index != 0,
    )

    def embed(output: str, **inputs: torch.Tensor) -> torch.Tensor:
        return getattr(model(**inputs), output).float()

    embeds = {"image_embeds": [], "text_embeds": []}
    with autocast(), name_killed_workers():
        for inputs in prepared_loader(batches, args):
            inputs = send_to_device(inputs, args.device, non_blocking=True)
            output = "image_embeds" if "pixel_values" in inputs else "text_embeds"
            embeds[output].append(_in_memory(partial(embed, output), is_sharded, **inputs))
            bar.update(len(embeds[output][-1]) * distributed.world_size())
    bar.close()
    model.train(was_training)
    none = torch.empty((0, model.config.projection_dim), device=args.device)
    image_embeds, by_length = (torch.cat([none, *parts]) for parts in embeds.values())
    text_embeds = torch.empty_like(by_length)
    text_embeds[batches.order] = by_length
    return in_row_order(image_embeds, batches.images), in_row_order(text_embeds, batches.captions)


def _in_memory(embed: Callable[..., torch.Tensor], is_sharded: bool, **inputs: torch.Tensor) -> torch.Tensor:
    """Embeddings `[N, D]` of a batch, in halves where the device's memory is not enough for it."""
    try:
        return embed(**inputs)
    except torch.OutOfMemoryError as error:
        rows = len(next(iter(inputs.values())))
        if rows == 1 or is_sharded:  # all ranks make a sharded model's forward together: one cannot halve alone
            raise RuntimeError(
                f"The memory does not hold the evaluation of {rows} rows: lower --per_device_eval_batch_size or "
                "--max_caption_length, or free the device, and go on by --resume_from_checkpoint last."
            ) from error
    halves = zip(*(tensor.chunk(2) for tensor in inputs.values()))
    return torch.cat([_in_memory(embed, is_sharded, **dict(zip(inputs, half))) for half in halves])


def recall_figures(
    image, text, groups, caption_to_image, text_ids: torch.Tensor | None, fold_size: int | None
) -> dict[str, float]:
    """Recall over all rows, and as `{1k}_*` the means over folds; `text_ids` `[M]` as in [`retrieval_metrics`]."""
    figures = retrieval_metrics(image, text, groups, groups[caption_to_image], text_ids=text_ids)
    if fold_size is not None:
        folds = fold_metrics(image, text, groups, caption_to_image, fold_size, text_ids)
        label = f"{fold_size // 1000}k" if fold_size % 1000 == 0 else str(fold_size)
        figures |= {f"{label}_{name}": value for name, value in folds.items()}
    return figures


def teachers_first_of(dataset: datasets.Dataset, device: torch.device, by_index: bool) -> TeachersFirst:
    """What the teacher finds first on a split, for [`agreement_with_teacher`].

    Args:
        device: of the student's embeddings.
        by_index: equal texts are different candidates.
    """
    teacher = (features.to(device) for features in teacher_rows(dataset))
    return teachers_first(*teacher, text_ids=None if by_index else text_ids(dataset))


def across_figures(
    image, text, teacher_image, teacher_text, groups, caption_to_image, text_ids: torch.Tensor | None
) -> dict[str, dict[str, float]]:
    """Recall of one model's queries on the other's index: {"teacher_index": figures, "student_index": figures}."""
    text_groups = groups[caption_to_image]
    figures = partial(retrieval_metrics, image_groups=groups, text_groups=text_groups, text_ids=text_ids)
    on_images = figures(teacher_image, text)  # student's captions, teacher's images
    on_texts = figures(image, teacher_text)  # student's images, teacher's captions
    ways = {"teacher_index": (on_texts, on_images), "student_index": (on_images, on_texts)}
    across = {}
    for index, (image_queries, text_queries) in ways.items():
        recalls = {name: value for name, value in image_queries.items() if name.startswith("image_to_text_r")}
        recalls |= {name: value for name, value in text_queries.items() if name.startswith("text_to_image_r")}
        across[index] = {**recalls, "rsum": sum(recalls.values())}
    return across
