"""Agreement of a student with its teacher on what neither needs a partner for: whom each would find first."""

from __future__ import annotations

import numpy as np
import torch

from .metrics import MIN_TIE_TOLERANCE, TIE_TOLERANCE_PER_COLUMN, _exact_matmul, _normalised, _spans


FEWEST = 20  # candidates, with fewer there is no figure
MOST_FOUND = 10  # candidates that are compared, at most; a tenth of them, where that is less
SCORES_AT_ONCE = 2**24


def agreement_with_teacher(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teacher_image: torch.Tensor,
    teacher_text: torch.Tensor,
    *,
    text_ids: torch.Tensor | None = None,
) -> dict[str, float]:
    """The share of what the teacher finds first that the student finds first too, in percent, in both directions.

    Of a query on one side, the teacher's first k on the other side are its k largest cosines, k being 10 or a tenth of
    the candidates, whichever is less; one of these counts where at most k candidates score at least as much as it by
    the student, itself included. So ties count against the student, and one that maps everything to one point has 0.
    No pair is needed. A direction with fewer than 20 candidates has no figure.

    Args:
        image_embeds, text_embeds: the student's, `[N, D]` and `[M, D]`, floats of any scale.
        teacher_image, teacher_text: the teacher's of the same rows, `[N, W]` and `[M, W]`.
        text_ids: `[M]`, equal where texts are: of equal texts the first alone counts, as a query and a candidate.
            Default: no text is equal to another.

    Returns:
        `image_to_text_agreement` (images ask for texts), `text_to_image_agreement`, `agreement` (their mean, or the
        one there is) and `agreement_by_chance`, what a random ranking would have; empty without a figure.

    Raises:
        ValueError: embeds that are NaN, infinite or zero, or as many rows as they should not be.
    """
    if text_ids is not None:
        _, first = np.unique(np.asarray(text_ids.cpu()), return_index=True)
        kept = torch.from_numpy(np.sort(first)).to(text_embeds.device)
        text_embeds, teacher_text = text_embeds[kept], teacher_text[kept]
    if (len(image_embeds), len(text_embeds)) != (len(teacher_image), len(teacher_text)):
        raise ValueError(
            f"The student has {len(image_embeds)} images and {len(text_embeds)} texts, the teacher "
            f"{len(teacher_image)} and {len(teacher_text)}: expected the same rows."
        )
    if not len(image_embeds) or not len(text_embeds):
        return {}
    student = _normalised(image_embeds, "image_embeds"), _normalised(text_embeds, "text_embeds")
    teacher = _normalised(teacher_image, "teacher_image"), _normalised(teacher_text, "teacher_text")
    figures, chances = {}, []
    for name, query, answer in (("image_to_text", 0, 1), ("text_to_image", 1, 0)):
        candidates = len(student[answer])
        if candidates >= FEWEST:
            first = min(MOST_FOUND, candidates // 10)
            asked = (student[query], student[answer], teacher[query], teacher[answer])
            figures[f"{name}_agreement"] = 100.0 * _found_by_both(*asked, first)
            chances.append(100.0 * first / candidates)
    if not figures:
        return {}
    mean = sum(figures.values()) / len(figures)
    return {**figures, "agreement": mean, "agreement_by_chance": sum(chances) / len(chances)}


@torch.no_grad()
def _found_by_both(
    queries: torch.Tensor,
    answers: torch.Tensor,
    teacher_queries: torch.Tensor,
    teacher_answers: torch.Tensor,
    first: int,
) -> float:
    """The share, in [0, 1], of the teacher's `first` answers that are among the student's; see above."""
    tolerance = max(MIN_TIE_TOLERANCE, TIE_TOLERANCE_PER_COLUMN * queries.shape[1])
    found = torch.zeros((), dtype=torch.int64, device=queries.device)
    with _exact_matmul(queries.device):
        for start, stop in _spans(0, len(queries), max(1, SCORES_AT_ONCE // len(answers))):
            wanted = (teacher_queries[start:stop] @ teacher_answers.T).topk(first, dim=1).indices
            scores = queries[start:stop] @ answers.T
            # At most k candidates reach a score where the (k + 1)-th largest of all does not.
            next_one = scores.topk(first + 1, dim=1).values[:, -1:]
            found += (scores.gather(1, wanted) - tolerance > next_one).sum()
    return found.item() / (first * len(queries))
