"""A split's embeddings on any number of processes, and the figures that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rows.columns import partners, text_ids
from rows.images import load_rgb
from rows.teacher_columns import teacher_rows
from rows.texts import cut

from .agreement import TeachersFirst, teachers_first
from .metrics import fold_metrics, retrieval_metrics
from .run import distributed
from .run.loader_workers import name_killed_workers, shielded
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
    has_image, _ = partners(dataset)
    images = dataset.select_columns(["image", "image_id"]).cast_column("image", datasets.Image(decode=False))
    images = images if has_image.all() else images.select(np.flatnonzero(has_image))
    captions = [caption for row in dataset["captions"] for caption in row]
    loader = image_loader(images, ImageCollator(processor.image_processor), args) if len(images) else ()
    tokenizer = processor.tokenizer
    own = _own_rows(len(captions)) if captions else []
    # Captions of like length go together: padding costs as much as words.
    by_length = sorted(range(len(own)), key=lambda i: len(captions[own[i]]))
    bar = tqdm(
        total=len(images) + len(captions),
        desc="encode",
        leave=False,
        disable=args.disable_tqdm or args.process_index != 0,
    )

    def embed(output: str, **inputs: torch.Tensor) -> torch.Tensor:
        return getattr(model(**{name: tensor.to(args.device) for name, tensor in inputs.items()}), output).float()

    with autocast(), name_killed_workers():
        image_embeds = [torch.empty((0, model.config.projection_dim), device=args.device)]
        for pixel_values in loader:
            image_embeds.append(_in_memory(partial(embed, "image_embeds"), is_sharded, pixel_values=pixel_values))
            bar.update(len(image_embeds[-1]) * distributed.world_size())
        text_embeds = torch.empty((len(own), model.config.projection_dim), device=args.device)
        for start in range(0, len(own), args.eval_batch_size):
            rows = by_length[start : start + args.eval_batch_size]
            text = tokenizer(
                [cut(captions[own[i]]) for i in rows],
                padding=True,
                truncation=True,
                max_length=args.max_caption_length,
                return_tensors="pt",
            )
            inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
            text_embeds[rows] = _in_memory(partial(embed, "text_embeds"), is_sharded, **inputs)
            bar.update(len(rows) * distributed.world_size())
    bar.close()
    model.train(was_training)
    return in_row_order(torch.cat(image_embeds), len(images)), in_row_order(text_embeds, len(captions))


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


def image_loader(
    images: datasets.Dataset, collate: Callable[[list[dict]], object], args: RetrievalTrainingArguments
) -> Iterable:
    """Batches of this rank's share of a split's images, for [`in_row_order`].

    Args:
        images: a column `image`, not decoded.
        collate: makes a batch of rows.
        args: batch size and loader workers.
    """
    loader = DataLoader(
        images.with_format(None).select(_own_rows(len(images))),
        batch_size=args.eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context if args.dataloader_num_workers else None,
        generator=torch.Generator(),  # the loader draws a number: this must not change the training
    )
    return shielded(loader)


def _own_rows(rows: int) -> list[int]:
    """This rank's rows. Every rank has as many, some with a first row again: all make a sharded forward together."""
    world = distributed.world_size()
    return [(start + distributed.rank()) % rows for start in range(0, rows, world)]


def in_row_order(own: torch.Tensor, rows: int) -> torch.Tensor:
    """All ranks' rows, of which rank r holds rows r, r + W, r + 2W, ..."""
    world = distributed.world_size()
    by_rank = distributed.gather_rows(own, [len(own)] * world).unflatten(0, (world, len(own)))
    return by_rank.transpose(0, 1).flatten(0, 1)[:rows]


class ImageCollator:
    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, rows: list[dict]) -> torch.Tensor:
        images = []
        for row in rows:
            try:
                images.append(load_rgb(row["image"]))
            except ValueError as error:
                raise ValueError(
                    f"The image of {row['image_id']!r} cannot be evaluated: {error}. Bring it back or drop the row."
                ) from error
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]


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
