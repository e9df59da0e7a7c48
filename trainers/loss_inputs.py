"""The rows that the losses compare: their containers, what tells equal things apart, and the check of their shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherRows:
    """Teacher rows to compare with: those of a batch, of a whole optimiser step, or of the dictionary."""

    image: Tensor  # [P, D]
    image_groups: Tensor  # [P] int64
    text: Tensor  # [Q, D]
    text_groups: Tensor  # [Q] int64
    image_texts: Tensor | None = None  # [P, K] int64, ids of texts that each image has
    text_ids: Tensor | None = None  # [Q] int64, of the text of each caption


class Partners(NamedTuple):
    """Which rows of a micro-batch have a partner in it: the queries of IT and TI."""

    paired_captions: Tensor  # [P] int64, the captions that have an image
    lonely_captions: Tensor  # [C - P] int64, the captions that have no image
    lonely_images: Tensor  # [L] int64, the images that have no caption
    image_of_pair: Tensor  # [P] int64, the image of each paired caption
    all_captions: bool  # every caption has an image

    @classmethod
    def of(
        cls, caption_to_image: Tensor, paired_captions: Tensor, lonely_captions: Tensor, lonely_images: Tensor
    ) -> Partners:
        """Partners of known rows: no device is waited for."""
        all_captions = len(lonely_captions) == 0
        image_of_pair = caption_to_image if all_captions else caption_to_image.index_select(0, paired_captions)
        return cls(paired_captions, lonely_captions, lonely_images, image_of_pair, all_captions)

    @classmethod
    def found(cls, caption_to_image: Tensor, images: int) -> Partners:
        """Partners of captions whose images are `caption_to_image` `[C]`, -1 for none; waits for the device."""
        paired = (caption_to_image >= 0).nonzero().squeeze(1)
        captions = torch.zeros(images, dtype=torch.bool, device=caption_to_image.device)
        captions[caption_to_image[paired]] = True
        lonely = (caption_to_image < 0).nonzero().squeeze(1)
        return cls.of(caption_to_image, paired, lonely, (~captions).nonzero().squeeze(1))


class OtherStudents(NamedTuple):
    """The micro-batch of all ranks, for the second direction of `hard_negative_distillation`.

    The student rows of the other ranks are detached; this rank's, in their place among them, carry gradients. N and C
    count the rows of all ranks, and `caption_to_image` points into them.
    """

    student_image: Tensor  # [N, D]
    student_text: Tensor  # [C, D]
    teacher_image: Tensor  # [N, D]
    teacher_text: Tensor  # [C, D]
    image_groups: Tensor  # [N]
    caption_to_image: Tensor  # [C]
    world_size: int
    image_texts: Tensor | None = None  # [N, K]
    text_ids: Tensor | None = None  # [C]
    text_groups: Tensor | None = None  # [C], needed where a caption has no image
    partners: Partners | None = None  # of all ranks


class Identity(NamedTuple):
    """What rows stand for: two are the same thing where their groups are equal or they have a text in common."""

    groups: Tensor  # [R]
    texts: Tensor | None  # [R, K] text_ids; None: no text is equal to another


def identities(
    image_groups: Tensor, text_groups: Tensor, image_texts: Tensor | None, text_ids: Tensor | None
) -> dict[str, Identity]:
    """By side ("I", "T"): what images `[N]` and captions `[C]` stand for."""
    return {
        "I": Identity(image_groups, image_texts),
        "T": Identity(text_groups, None if text_ids is None else text_ids[:, None]),
    }


def check_embeddings(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> None:
    for name, student, teacher in (("image", student_image, teacher_image), ("text", student_text, teacher_text)):
        if student.ndim != 2 or student.shape[1] != student_image.shape[-1]:
            expected = f"[rows, {student_image.shape[-1]}], the width of student_image"
            raise ValueError(f"student_{name} has shape {list(student.shape)}; expected {expected}")
        if teacher.shape != student.shape:
            got, expected = list(teacher.shape), list(student.shape)
            raise ValueError(f"teacher_{name} has shape {got}; expected {expected}, that of student_{name}")


def check_batch(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_groups: Tensor,
    caption_to_image: Tensor,
    image_texts: Tensor | None = None,
    text_ids: Tensor | None = None,
    text_groups: Tensor | None = None,
) -> None:
    check_embeddings(student_image, student_text, teacher_image, teacher_text)
    for name, ids, rows in (
        ("image_groups", image_groups, student_image),
        ("caption_to_image", caption_to_image, student_text),
        ("text_groups", text_groups, student_text),
    ):
        if ids is not None and ids.shape != rows.shape[:1]:
            raise ValueError(f"{name} has shape {list(ids.shape)}; expected [{rows.shape[0]}], one per row")
    _check_texts("", image_texts, text_ids, student_image, student_text)


def check_rows(name: str, rows: TeacherRows, like: Tensor, at_least: int = 0) -> None:
    check_columns(f"{name}.image", rows.image, rows.image_groups, like, at_least)
    check_columns(f"{name}.text", rows.text, rows.text_groups, like, at_least)
    _check_texts(f"{name}.", rows.image_texts, rows.text_ids, rows.image, rows.text)


def check_columns(name: str, rows: Tensor, groups: Tensor, like: Tensor, at_least: int = 0) -> None:
    if rows.ndim != 2 or rows.shape[1] != like.shape[1] or rows.shape[0] < at_least:
        expected = f"[{at_least} or more, {like.shape[1]}], the width of student_image"
        raise ValueError(f"{name} has shape {list(rows.shape)}; expected {expected}")
    if groups.shape != rows.shape[:1]:
        raise ValueError(f"the groups of {name} have shape {list(groups.shape)}; expected [{rows.shape[0]}]")


def _check_texts(
    prefix: str, image_texts: Tensor | None, text_ids: Tensor | None, image: Tensor, text: Tensor
) -> None:
    if image_texts is not None and (image_texts.ndim != 2 or len(image_texts) != len(image)):
        expected = f"[{len(image)}, texts of an image]"
        raise ValueError(f"{prefix}image_texts has shape {list(image_texts.shape)}; expected {expected}")
    if text_ids is not None and text_ids.shape != text.shape[:1]:
        raise ValueError(f"{prefix}text_ids has shape {list(text_ids.shape)}; expected [{len(text)}], one per row")
