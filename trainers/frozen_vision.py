"""What a frozen vision tower makes of the training images: computed once, where every epoch shows them alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import datasets
import torch
from tqdm.auto import tqdm

from modeling_dsmd import DSMDModel
from rows.images import load_rgb

from .batches import RetrievalDataset
from .evaluation_batches import image_loader, in_row_order
from .training_args import RetrievalTrainingArguments


logger = logging.getLogger(__name__)

MOST_BYTES = 2**30  # of the outputs, which every process of the machine holds


def keep_frozen_outputs(
    model: DSMDModel,
    rows: RetrievalDataset,
    image_processor,
    args: RetrievalTrainingArguments,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Lets `rows` give the pooled outputs of the frozen vision tower instead of images, where that is the same.

    It is not where views are drawn; and it is left out where the outputs would take over 1 GiB, where the rows are a
    stream, and for models that take no outputs of their tower.

    Args:
        model: the student, on `args.device`.
        rows: the training split.
        image_processor: the student's.
        args: `freeze`, views, batch size and loader workers.
        autocast: gives the context that the model is trained in.
    """
    if args.freeze != "vision" or args.random_shift or args.random_zoom:
        return
    if not isinstance(model, DSMDModel) or not isinstance(rows, RetrievalDataset):
        return
    size = 4 * len(rows) * model.visual_projection.in_features
    if size > MOST_BYTES:
        logger.info(f"The frozen tower runs in every epoch: its outputs would take {size / 2**30:.1f} GiB of memory.")
        return
    with autocast():
        rows.pooled_images = pooled_images(model, rows.rows, image_processor, args).share_memory_()


@torch.no_grad()
def pooled_images(
    model: DSMDModel, rows: datasets.Dataset, image_processor, args: RetrievalTrainingArguments
) -> torch.Tensor:
    """What the vision tower makes of each image, `[N, W]` float32 on the CPU; NaN for one that is missing or broken.

    Each process computes its share, and all have the whole.
    """
    model.vision_model.eval()
    loader = image_loader(rows.select_columns(["image"]), ReadableImages(image_processor), args)
    hidden = args.disable_tqdm or args.process_index != 0
    pooled = []
    for readable, pixel_values in tqdm(loader, desc="frozen tower", leave=False, disable=hidden):
        part = torch.full((len(readable), model.visual_projection.in_features), torch.nan)
        if pixel_values is not None:
            part[readable] = model.pooled_images(pixel_values.to(args.device)).float().cpu()
        pooled.append(part)
    return in_row_order(torch.cat(pooled).to(args.device), len(rows)).cpu()


class ReadableImages:
    """Collates rows to which of them can be read, `[B]` bool, and the pixels of these; None where there is none."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = []
        for row in rows:
            try:
                images.append(
                    None if row["image"] is None else load_rgb(row["image"])
                )  # None: a text without an image
            except ValueError:  # training names it when it meets it
                images.append(None)
        readable = [image for image in images if image is not None]
        pixels = self.image_processor(images=readable, return_tensors="pt")["pixel_values"] if readable else None
        return torch.tensor([image is not None for image in images]), pixels
