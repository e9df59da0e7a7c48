"""Agreement of a student with its teacher on what neither needs a partner for: whom each would find first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .metrics import MIN_TIE_TOLERANCE, TIE_TOLERANCE_PER_COLUMN, _exact_matmul, _normalised, _spans


FEWEST = 20  # candidates, with fewer there is no figure
MOST_FOUND = 10  # candidates that are compared, at most; a tenth of them, where that is less
SCORES_AT_ONCE = 2**24


@dataclass(frozen=True)
class TeachersFirst:
    """What a teacher finds first on a split, see [`teachers_first`].

    Attributes:
        images, texts: how many it has, N and M.
        kept: `[K]`, which of the texts count, ascending; None: all M.
        of_images: `[N, k]`, for each image the places among these texts of those that the teacher finds first; None:
            they are too few.
        of_texts: `[K, k]`, for each of these texts the images, the same way.
    """

    images: int
    texts: int
    kept: torch.Tensor | None
    of_images: torch.Tensor | None
    of_texts: torch.Tensor | None


@torch.no_grad()
def teachers_first(
    teacher_image: torch.Tensor, teacher_text: torch.Tensor, text_ids: torch.Tensor | None = None
) -> TeachersFirst:
    """The teacher's half of [`agreement_with_teacher`], which no student changes.

    Of a query on one side, the teacher's first k on the other side are its k largest cosines, k being 10 or a tenth of
    the candidates, whichever is less. There is none of fewer than 20 candidates.

    Args:
        teacher_image, teacher_text: `[N, W]` and `[M, W]`, floats of any scale.
        text_ids: `[M]`, equal where texts are: of equal texts the first alone counts, as a query and a candidate.
            Default: no text is equal to another.

    Raises:
        ValueError: embeds that are NaN, infinite or zero.
    """
    images, texts, kept = len(teacher_image), len(teacher_text), None
    if text_ids is not None:
        _, first = np.unique(np.asarray(text_ids.cpu()), return_index=True)
        kept = torch.from_numpy(np.sort(first)).to(teacher_text.device)
        teacher_text = teacher_text[kept]
    if not images or not texts:
        return TeachersFirst(images, texts, kept, None, None)
    image, text = _normalised(teacher_image, "teacher_image"), _normalised(teacher_text, "teacher_text")
    return TeachersFirst(images, texts, kept, _first_answers(image, text), _first_answers(text, image))


@torch.no_grad()
def _first_answers(queries: torch.Tensor, answers: torch.Tensor) -> torch.Tensor | None:
    """The `[Q, k]` answers with the largest cosines with each query; None where they are too few."""
    if len(answers) < FEWEST:
        return None
    first = min(MOST_FOUND, len(answers) // 10)
    with _exact_matmul(queries.device):
        spans = _spans(0, len(queries), max(1, SCORES_AT_ONCE // len(answers)))
        return torch.cat([(queries[a:b] @ answers.T).topk(first, dim=1).indices for a, b in spans])


def agreement_with_teacher(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, wanted: TeachersFirst
) -> dict[str, float]:
    """The share of what the teacher finds first that the student finds first too, in percent, in both directions.

    One of the teacher's first k counts where at most k candidates score at least as much as it by the student, itself
    included. So ties count against the student, and one that maps everything to one point has 0. No pair is needed. A
    direction with fewer than 20 candidates has no figure.

    Args:
        image_embeds, text_embeds: the student's, `[N, D]` and `[M, D]`, floats of any scale.
        wanted: the teacher's of the same rows, on the same device.

    Returns:
        `image_to_text_agreement` (images ask for texts), `text_to_image_agreement`, `agreement` (their mean, or the
        one there is) and `agreement_by_chance`, what a random ranking would have; empty without a figure.

    Raises:
        ValueError: embeds that are NaN, infinite or zero, or as many rows as they should not be.
    """
    if (len(image_embeds), len(text_embeds)) != (wanted.images, wanted.texts):
        raise ValueError(
            f"The student has {len(image_embeds)} images and {len(text_embeds)} texts, the teacher "
            f"{wanted.images} and {wanted.texts}: expected the same rows."
        )
    if not len(image_embeds) or not len(text_embeds):
        return {}
    text_embeds = text_embeds if wanted.kept is None else text_embeds[wanted.kept]
    image, text = _normalised(image_embeds, "image_embeds"), _normalised(text_embeds, "text_embeds")
    figures, chances = {}, []
    for name, queries, answers, first in (
        ("image_to_text", image, text, wanted.of_images),
        ("text_to_image", text, image, wanted.of_texts),
    ):
        if first is not None:
            figures[f"{name}_agreement"] = 100.0 * _found_by_both(queries, answers, first)
            chances.append(100.0 * first.shape[1] / len(answers))
    if not figures:
        return {}
    mean = sum(figures.values()) / len(figures)
    return {**figures, "agreement": mean, "agreement_by_chance": sum(chances) / len(chances)}


@torch.no_grad()
def _found_by_both(queries: torch.Tensor, answers: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share, in [0, 1], of the teacher's answers `[Q, k]` that are among the student's; see above."""
    tolerance = max(MIN_TIE_TOLERANCE, TIE_TOLERANCE_PER_COLUMN * queries.shape[1])
    found, first = torch.zeros((), dtype=torch.int64, device=queries.device), wanted.shape[1]
    with _exact_matmul(queries.device):
        for start, stop in _spans(0, len(queries), max(1, SCORES_AT_ONCE // len(answers))):
            scores = queries[start:stop] @ answers.T
            # At most k candidates reach a score where the (k + 1)-th largest of all does not.
            next_one = scores.topk(first + 1, dim=1).values[:, -1:]
            found += (scores.gather(1, wanted[start:stop]) - tolerance > next_one).sum()
    return found.item() / wanted.numel()
