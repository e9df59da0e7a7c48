"""Who asks whom in a loss: the queries of a pair set, their positives, and what a sum over them is divided by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .loss_inputs import Identity, Partners, TeacherRows, identities


PAIRS = ("II", "TT", "IT", "TI")


def identities_of(rows: TeacherRows) -> dict[str, Identity]:
    return identities(rows.image_groups, rows.text_groups, rows.image_texts, rows.text_ids)


def partners_or_all(
    partners: Partners | None, caption_to_image: Tensor, text_groups: Tensor | None, images: int
) -> Partners:
    """The partners that are given; else those found in `caption_to_image`, or all where captions have no group of
    their own."""
    if partners is not None:
        return partners
    if text_groups is not None:
        return Partners.found(caption_to_image, images)
    if caption_to_image.device.type == "cpu" and (caption_to_image < 0).any():  # elsewhere it would be waited for
        raise ValueError("text_groups is missing: a caption without an image (caption_to_image -1) needs its group")
    nobody = caption_to_image[:0]
    return Partners.of(caption_to_image, torch.arange(len(caption_to_image), device=nobody.device), nobody, nobody)


def of_paired(rows: Tensor | None, partners: Partners) -> Tensor | None:
    """Of rows of captions `[C, ...]` those of the captions that have an image, `[P, ...]`."""
    return rows if rows is None or partners.all_captions else rows.index_select(0, partners.paired_captions)


def per_query(rows: Tensor, pair: str, side: str, partners: Partners) -> Tensor:
    """Rows of one side, one per query: in IT and TI an image's row is repeated for each of its captions."""
    if pair in ("II", "TT"):
        return rows
    return rows.index_select(0, partners.image_of_pair) if side == "I" else of_paired(rows, partners)


def positives_of(student: dict, teacher: dict, pair: str, partners: Partners) -> Tensor:
    """Similarity of each query with its own teacher row."""
    query, target = pair
    queries = per_query(student[query], pair, query, partners)
    return (queries * per_query(teacher[target], pair, target, partners)).sum(dim=-1)


def text_groups_of(given: Tensor | None, image_groups: Tensor, caption_to_image: Tensor, partners: Partners) -> Tensor:
    """The group of each caption `[C]`: as given, or that of its image."""
    if given is None and not partners.all_captions:
        raise ValueError("text_groups is missing: a caption without an image needs its group")
    return image_groups[caption_to_image] if given is None else given


def query_counts(
    images: Tensor, captions: Tensor, partners: Partners, num_images, num_captions, num_pairs
) -> dict[str, int | Tensor]:
    """The number of queries of each pair."""
    if num_pairs is None:
        num_pairs = num_captions
    pairs = count_of(num_pairs, partners.paired_captions)
    return {"II": count_of(num_images, images), "TT": count_of(num_captions, captions), "IT": pairs, "TI": pairs}


def mean_over(total: Tensor, count: int | Tensor) -> Tensor:
    """A sum over `count` queries as their mean; 0 of none."""
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def count_of(count: int | Tensor | None, rows: Tensor) -> int | Tensor:
    return rows.shape[0] if count is None else count


def check_pairs(pairs: Sequence[str]) -> None:
    unknown = [pair for pair in pairs if pair not in PAIRS]
    if unknown or isinstance(pairs, str):
        raise ValueError(f"pairs is {pairs!r}; expected a list of some of {PAIRS}")
