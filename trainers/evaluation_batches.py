"""A split's images and captions as batches for the model, prepared by worker processes: each rank's share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from rows.columns import partners
from rows.images import load_rgb
from rows.texts import cut

from .run import distributed
from .run.loader_workers import shielded
from .training_args import RetrievalTrainingArguments


class PreparedBatches(torch.utils.data.Dataset):
    """This rank's share of a split: the batches of its images in row order, then those of its captions.

    Captions of like length go together: padding costs as much as words.

    Args:
        dataset: rows of the contract, with a partner or without.
        processor: its `image_processor` and `tokenizer`.
        args: batch size, longest caption.

    Attributes:
        images, captions: how many the split has.
        order: the numbers, among this rank's captions, of those that the batches bring one after the other.
    """

    def __init__(self, dataset: datasets.Dataset, processor, args: RetrievalTrainingArguments):
        has_image, _ = partners(dataset)
        images = dataset.select_columns(["image", "image_id"]).cast_column("image", datasets.Image(decode=False))
        images = images if has_image.all() else images.select(np.flatnonzero(has_image))
        captions = [caption for row in dataset["captions"] for caption in row]
        self.images, self.captions = len(images), len(captions)
        own = [captions[i] for i in _own_rows(len(captions))]
        self.order = sorted(range(len(own)), key=lambda i: len(own[i]))
        self._captions = [own[i] for i in self.order]
        self._images = images.with_format(None).select(_own_rows(len(images)))
        self._prepare = ImageCollator(processor.image_processor)
        self._tokenizer = processor.tokenizer
        self._max_length, self._size = args.max_caption_length, args.eval_batch_size
        self._of_images = -(-len(self._images) // self._size)  # batches

    def __len__(self) -> int:
        return self._of_images - (-len(self._captions) // self._size)

    def __getitem__(self, batch: int) -> dict[str, torch.Tensor]:
        """`pixel_values` `[B, 3, H, W]`, or `input_ids` and `attention_mask` `[B, L]`."""
        if batch < self._of_images:
            rows = range(batch * self._size, min((batch + 1) * self._size, len(self._images)))
            return {"pixel_values": self._prepare(self._images.__getitems__(list(rows)))}
        start = (batch - self._of_images) * self._size
        text = self._tokenizer(
            [cut(caption) for caption in self._captions[start : start + self._size]],
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        return {name: text[name] for name in ("input_ids", "attention_mask")}


def prepared_loader(batches: PreparedBatches, args: RetrievalTrainingArguments) -> Iterable[dict[str, torch.Tensor]]:
    """The batches in their order, read and prepared by the workers that `args` names; on a GPU from pinned memory."""
    return _loader(batches, args, batch_size=None, pin_memory=args.dataloader_pin_memory)


def image_loader(
    images: datasets.Dataset, collate: Callable[[list[dict]], object], args: RetrievalTrainingArguments
) -> Iterable:
    """Batches of this rank's share of a split's images, for [`in_row_order`].

    Args:
        images: a column `image`, not decoded.
        collate: makes a batch of rows.
        args: batch size and loader workers.
    """
    own = images.with_format(None).select(_own_rows(len(images)))
    return _loader(own, args, batch_size=args.eval_batch_size, collate_fn=collate)


def _loader(rows, args: RetrievalTrainingArguments, **how) -> DataLoader:
    loader = DataLoader(
        rows,
        num_workers=args.dataloader_num_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context if args.dataloader_num_workers else None,
        generator=torch.Generator(),  # the loader draws a number: this must not change the training
        **how,
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
