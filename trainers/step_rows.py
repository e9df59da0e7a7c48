"""The rows that a step's losses compare: the teacher's, of all its batches and ranks, and other ranks' students."""

from __future__ import annotations

import torch

from .loss_inputs import OtherStudents, Partners, TeacherRows
from .run import distributed


LONELY = ("paired_captions", "lonely_captions", "lonely_images")  # of a batch: who has a partner


def normalize(features: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    """Stored teacher features `[N, D]` as unit rows in float32, of the projection's width where there is one."""
    features = features.float() if projection is None else features.float() @ projection
    return torch.nn.functional.normalize(features, dim=-1)


def teacher_rows_of(batch: dict, projection: torch.Tensor | None) -> TeacherRows:
    """The teacher's rows of a micro-batch, see [`normalize`]."""
    return TeacherRows(
        image=normalize(batch["teacher_image"], projection),
        image_groups=batch["image_groups"],
        text=normalize(batch["teacher_text"], projection),
        text_groups=batch["text_groups"],
        image_texts=batch.get("image_texts"),
        text_ids=batch.get("text_ids"),
    )


def partners_of(batch: dict) -> Partners:
    """Which rows of a micro-batch have a partner in it."""
    return Partners.of(*(batch[name] for name in ("caption_to_image", *LONELY)))


def rows_of_the_step(batches: list[dict], counts: torch.Tensor) -> TeacherRows:
    """The teacher's rows of an optimiser step, of all ranks.

    Args:
        batches: this rank's micro-batches with their `teacher_rows`.
        counts: `[W, A, 2]`, images and captions of the micro-batches of all ranks.

    Without images or captions in the whole step, their rows are empty.
    """
    rows = [batch["teacher_rows"] for batch in batches]
    # Row by row, not by length as in the batches: a queue that is smaller than the step keeps the last.
    orders = [batch["caption_to_row"].argsort(stable=True) for batch in batches]
    images, captions = counts.unbind(dim=-1)

    def of_images(name: str) -> torch.Tensor | None:
        return _of_the_step([getattr(own, name) for own in rows], images)

    def of_captions(name: str) -> torch.Tensor | None:
        parts = [getattr(own, name) for own in rows]
        return _of_the_step([None if part is None else part[at] for part, at in zip(parts, orders)], captions)

    return TeacherRows(
        **{name: of_images(name) for name in ("image", "image_groups", "image_texts")},
        **{name: of_captions(name) for name in ("text", "text_groups", "text_ids")},
    )


def _of_the_step(parts: list[torch.Tensor | None], counts: torch.Tensor) -> torch.Tensor | None:
    """All ranks' rows of a step; `counts` `[W, A]` are those of their micro-batches."""
    if parts[0] is None:
        return None
    gathered = distributed.gather_rows(torch.cat(parts), counts.sum(dim=1).tolist())
    return distributed.in_order_of_batches(gathered, counts)


def other_students(image: torch.Tensor, text: torch.Tensor, batch: dict) -> OtherStudents | None:
    """All ranks' rows of a micro-batch, this rank's own still live among the others' constants; None for one rank.

    Args:
        image: this rank's student images, `[N, D]`.
        text: its student captions, `[C, D]`.
        batch: the micro-batch with its `teacher_rows` and the `row_counts` of all ranks.
    """
    world = distributed.world_size()
    if world == 1:
        return None
    own: TeacherRows = batch["teacher_rows"]
    images, captions, pairs, lonely_images = batch["row_counts"]
    lonely_captions = [count - paired for count, paired in zip(captions, pairs)]
    offset, text_offset = sum(images[: distributed.rank()]), sum(captions[: distributed.rank()])
    caption_to_image = batch["caption_to_image"]
    if sum(lonely_captions):
        caption_to_image = torch.where(caption_to_image < 0, caption_to_image - offset, caption_to_image)

    def gather(rows, counts):
        return None if rows is None else distributed.gather_rows(rows, counts)

    def splice(rows, counts, start):
        gathered = gather(rows, counts)
        return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])

    all_captions = gather(caption_to_image + offset, captions)
    nothing = all_captions[:0]
    partners, text_groups = (torch.arange(len(all_captions), device=image.device), nothing, nothing), None
    if sum(lonely_captions) + sum(lonely_images):
        text_groups = gather(own.text_groups, captions)
        partners = (
            gather(batch["paired_captions"] + text_offset, pairs),
            gather(batch["lonely_captions"] + text_offset, lonely_captions),
            gather(batch["lonely_images"] + offset, lonely_images),
        )
    return OtherStudents(
        student_image=splice(image, images, offset),
        student_text=splice(text, captions, text_offset),
        teacher_image=gather(own.image, images),
        teacher_text=gather(own.text, captions),
        image_groups=gather(own.image_groups, images),
        caption_to_image=all_captions,
        world_size=world,
        image_texts=gather(own.image_texts, images),
        text_ids=gather(own.text_ids, captions),
        text_groups=text_groups,
        partners=Partners.of(all_captions, *partners),
    )
