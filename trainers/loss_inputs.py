"""The rows that the losses compare: their containers, what tells equal things apart, and the check of their shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
) -> None:
    check_embeddings(student_image, student_text, teacher_image, teacher_text)
    for name, ids, rows in (
        ("image_groups", image_groups, student_image),
        ("caption_to_image", caption_to_image, student_text),
    ):
        if ids.shape != rows.shape[:1]:
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
