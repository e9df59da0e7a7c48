"""Training on pairs alone, without a teacher: for baselines, and to make a teacher."""

from __future__ import annotations

import datasets
import torch

from rows.columns import pairs_of

from .base_trainer import RetrievalTrainer
from .logsumexp import MASKED, join_equal_texts
from .run import distributed


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_groups: torch.Tensor,
    caption_to_image: torch.Tensor,
    scale: torch.Tensor,
    num_captions: int | None = None,
    image_texts: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE over (image, caption) pairs with other items of a pair's own group left out.

    Args:
        image_embeds: L2-normalised, `[N, D]`.
        text_embeds: L2-normalised, `[C, D]`.
        image_groups: `[N]`; items of equal groups are never each other's negatives.
        caption_to_image: `[C]`, the row of each caption's image.
        scale: inverse temperature, a scalar.
        num_captions: what the sum over the C pairs is divided by; default C.
        image_texts: `[N, K]` int64, ids of the texts that each image has: a caption with one of them is no negative of
            the image. Default: no text is equal to another.
        text_ids: `[C]` int64, the id of each caption's text.

    Returns:
        Scalar: the mean of both directions (CLIP's loss where every image has one caption and a group of its own).
    """
    logits = scale * (text_embeds.float() @ image_embeds.float().T)  # [C, N]
    text_groups = image_groups[caption_to_image]
    positive = logits.gather(1, caption_to_image[:, None]).squeeze(1)  # [C]
    # Struck out by a finite number: a row without negatives has finite (zero) gradients.
    same = text_groups[:, None] == image_groups[None, :]
    join_equal_texts(same, None if text_ids is None else text_ids[:, None], image_texts)
    negatives = logits.masked_fill(same, MASKED)
    # logaddexp has no gradient at (x, -inf) in some releases; softplus of the difference has.
    text_to_image = torch.nn.functional.softplus(negatives.logsumexp(dim=1) - positive)
    image_to_text = torch.nn.functional.softplus(negatives.logsumexp(dim=0)[caption_to_image] - positive)
    return 0.5 * (text_to_image + image_to_text).sum() / (num_captions or len(text_embeds))


def check_partners(rows: datasets.Dataset) -> None:
    """Refuses rows that have no partner: without a teacher they teach nothing.

    Raises:
        ValueError: there are such rows.
    """
    if not {"image", "captions"} <= set(rows.column_names):
        return  # a check that follows names them
    lonely = len(rows) - len(pairs_of(rows))
    if lonely:
        raise ValueError(
            f"{lonely:,} of {len(rows):,} rows of train have no partner (an image without captions, or a text without "
            "an image), and teach nothing by --method contrastive: leave them out, or distil from a teacher."
        )


class ContrastiveTrainer(RetrievalTrainer):
    """Plain contrastive training of a dual encoder, with the temperature learned as in CLIP."""

    method = "contrastive"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.logit_scale.requires_grad_(True)  # DSMDTrainer may have frozen it

    def check_rows(self, rows: datasets.Dataset) -> None:
        check_partners(rows)

    def begin_step(self, batches: list[dict]) -> None:
        """Of a stream nobody has seen all rows. The counts are of all ranks: all of them raise the error."""
        super().begin_step(batches)
        lonely_texts = self.num_captions - self.num_pairs
        if self.num_lonely_images or lonely_texts:
            raise ValueError(
                f"A step has {self.num_lonely_images} images without captions and {lonely_texts} texts without an "
                "image, which teach nothing by --method contrastive: leave such rows out, or distil from a teacher."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        image_embeds, text_embeds = self.embed(model, inputs)
        image_groups, caption_to_image = inputs["image_groups"], inputs["caption_to_image"]
        image_texts, text_ids = inputs.get("image_texts"), inputs.get("text_ids")
        if distributed.world_size() > 1:
            # Every rank computes the loss of all ranks' pairs, so that each gradient is that of the full batch.
            images, captions, *_ = inputs["row_counts"]
            offset = sum(images[: distributed.rank()])
            image_embeds = distributed.gather_rows(image_embeds, images, differentiable=True)
            text_embeds = distributed.gather_rows(text_embeds, captions, differentiable=True)
            image_groups = distributed.gather_rows(image_groups, images)
            caption_to_image = distributed.gather_rows(caption_to_image + offset, captions)
            if text_ids is not None:
                image_texts = distributed.gather_rows(image_texts, images)
                text_ids = distributed.gather_rows(text_ids, captions)
        scale = self.accelerator.unwrap_model(model).logit_scale.float().exp().clamp(max=100.0)
        whose = (image_groups, caption_to_image)
        loss = contrastive_loss(
            image_embeds, text_embeds, *whose, scale, self.num_captions, image_texts=image_texts, text_ids=text_ids
        )
        return (loss, None) if return_outputs else loss
