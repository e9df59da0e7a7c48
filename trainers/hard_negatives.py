"""The hard-negative loss; its shapes and pairs are those of `losses`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .logsumexp import MASKED, join_equal_texts
from .loss_inputs import (
    Identity,
    OtherStudents,
    Partners,
    TeacherRows,
    check_batch,
    check_columns,
    check_rows,
    identities,
)
from .loss_queries import (
    PAIRS,
    check_pairs,
    identities_of,
    mean_over,
    partners_or_all,
    per_query,
    positives_of,
    query_counts,
    text_groups_of,
)


def hard_negative_distillation(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_groups: Tensor,
    caption_to_image: Tensor,
    *,
    step: TeacherRows | None = None,
    others: OtherStudents | None = None,
    image_texts: Tensor | None = None,
    text_ids: Tensor | None = None,
    text_groups: Tensor | None = None,
    partners: Partners | None = None,
    pairs: Sequence[str] = PAIRS,
    margin: float = 0.2,
    margin_kind: str = "fixed",
    hardest: bool = True,
    num_images: int | Tensor | None = None,
    num_captions: int | Tensor | None = None,
    num_pairs: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Hinge over hard negatives (VSE++, Faghri et al. 2018), both directions added up.

    First direction, a student query i against the teacher rows j of the whole step: `max_j [m + S_ij - S_ii]+`. Second
    direction, the query's positive teacher row against the other students k of the micro-batch: `max_k [m + S_ki -
    S_ii]+`. Only rows of other groups and texts count; without any the term is 0. The published code sums over
    queries; this is the mean per query, so that the scale does not depend on the batch size.

    Args:
        student_image, teacher_image: `[N, D]`.
        student_text, teacher_text: `[C, D]`.
        image_groups: `[N]` int64, the group of each image.
        caption_to_image: `[C]` int64, the image of each caption, -1 for a text without one.
        step: the teacher's rows of the whole optimiser step, all ranks. None if the step is this micro-batch alone:
            then one matrix product serves both directions.
        others: the micro-batch of all ranks; None on one process, where the local rows are all there are.
        image_texts, text_ids, text_groups, partners: as in `contrastive_distillation`.
        pairs: which of "II", "TT", "IT", "TI".
        margin: m, a difference of cosines; not used where the margin follows the teacher.
        margin_kind: "fixed", or "teacher": `[(S_ij - S_ii) - (T_ij - T_ii)]+` with the teacher's own similarities T,
            which asks for no gap that the teacher does not have and is 0 for a perfect student.
        hardest: True counts only the largest violation of each query; False the sum of all its violations (the
            published default). Either is averaged over queries.
        num_images, num_captions, num_pairs: what the sums over queries are divided by (default: N, C, `num_captions`
            or else the captions that have an image; with `others`, those of all ranks).

    Returns: one scalar per pair. With `others`, values and gradients are shares of this rank: their sums over the
        ranks are the loss of the whole micro-batch and its gradient.
    Raises: ValueError for an unknown pair or margin kind, or shapes that disagree.
    """
    inputs = (student_image, student_text, teacher_image, teacher_text, image_groups, caption_to_image)
    check_batch(*inputs, image_texts, text_ids, text_groups)
    partners = partners_or_all(partners, caption_to_image, text_groups, len(student_image))
    text_groups = text_groups_of(text_groups, image_groups, caption_to_image, partners)
    local = OtherStudents(*inputs, 1, image_texts, text_ids, text_groups, partners)
    everyone = local if others is None else others
    if others is not None:
        check_batch(*others[:6], others.image_texts, others.text_ids, others.text_groups)
        check_columns("others.student_image", others.student_image, others.image_groups, student_image)
        if others.partners is None:
            of_all = others.caption_to_image, others.text_groups, len(others.student_image)
            everyone = others._replace(partners=partners_or_all(None, *of_all))
    whole = step is None and others is None
    if step is None:
        step = TeacherRows(teacher_image, image_groups, teacher_text, text_groups, image_texts, text_ids)
    check_rows("step", step, student_image)
    check_pairs(pairs)
    if margin_kind not in ("fixed", "teacher"):
        raise ValueError(f'margin_kind is {margin_kind!r}; expected "fixed" or "teacher"')
    follow_teacher = margin_kind == "teacher"
    margin = 0.0 if follow_teacher else margin

    with torch.autocast(student_image.device.type, enabled=False):
        of_step = {"I": step.image.float(), "T": step.text.float()}
        of_columns = identities_of(step)
        student, teacher, of_queries = _sides(local, follow_teacher)
        all_student, all_teacher, of_all = student, teacher, of_queries
        if others is not None:
            all_student, all_teacher, of_all = _sides(everyone, follow_teacher)
        rows = (everyone.student_image, everyone.student_text, everyone.partners)
        counts = query_counts(*rows, num_images, num_captions, num_pairs)

        losses = {}
        for pair in pairs:
            query, target = pair
            if pair in ("IT", "TI") and not len(everyone.partners.paired_captions):
                losses[pair] = student[query][:0].sum()  # 0, of which nothing is left out of the graph
                continue
            positives = positives_of(student, teacher, pair, partners)
            rows, columns = student[query], of_step[target]
            similarities = _similarities(rows, columns, of_queries[query], of_columns[target], pair == "II", hardest)
            negatives = _negatives(similarities, rows, columns, hardest)
            first = _hinge(negatives, positives, pair, query, partners, margin)

            if others is not None:
                positives = positives_of(all_student, all_teacher, pair, everyone.partners)
            rows, columns = all_teacher[target], all_student[query]
            if whole:
                similarities = similarities.T
            else:
                whose = of_all[target], of_all[query]
                similarities = _similarities(rows, columns, *whose, pair == "II", hardest)
            negatives = _negatives(similarities, rows, columns, hardest)
            second = _hinge(negatives, positives, pair, target, everyone.partners, margin)
            # Every rank computes this term over the rows of all ranks, but only its own rows carry gradients. These
            # are kept as they are, so that the ranks' gradients add up to that of the term; the value, which is the
            # same on every rank, is divided by world_size, so that the ranks' values add up to the term.
            second = second - second.detach() * (1 - 1 / everyone.world_size)
            losses[pair] = mean_over(first + second, counts[pair])
        return losses


def _sides(batch: OtherStudents, follow_teacher: bool) -> tuple[dict, dict, dict]:
    """By side ("I", "T"): student rows, teacher rows, and what they stand for."""
    student = {"I": batch.student_image.float(), "T": batch.student_text.float()}
    teacher = {"I": batch.teacher_image.float(), "T": batch.teacher_text.float()}
    if follow_teacher:
        # S_ij - T_ij = (s_i - t_i) . t_j: the teacher's similarities cost no product of their own and cancel exactly.
        student = {side: student[side] - teacher[side] for side in student}
    text_groups = text_groups_of(batch.text_groups, batch.image_groups, batch.caption_to_image, batch.partners)
    return student, teacher, identities(batch.image_groups, text_groups, batch.image_texts, batch.text_ids)


def _similarities(
    rows: Tensor, columns: Tensor, of_rows: Identity, of_columns: Identity, by_groups_alone: bool, hardest: bool
) -> Tensor:
    """Dot products `[R, K]`; those of the same thing are MASKED, which no maximum, hinge or sum counts.

    Without gradient if only to find the hardest, see `_negatives`. Autograd does not know of the mask, which is set in
    place: a masked entry gets no gradient anyway, and recording it would cost another pass over the matrix.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not hardest):
        similarities = rows @ columns.T
    with torch.no_grad():
        same = of_rows.groups[:, None] == of_columns.groups[None, :]
        if not by_groups_alone:
            join_equal_texts(same, of_rows.texts, of_columns.texts)
        similarities.masked_fill_(same, MASKED)
    return similarities


def _negatives(similarities: Tensor, rows: Tensor, columns: Tensor, hardest: bool) -> Tensor:
    """The similarity of each row with its hardest column `[R, 1]`, or with all columns `[R, K]`.

    The hardest is computed again, with gradient: one dot product per row, instead of a backward through `[R, K]`.
    """
    if not hardest:
        return similarities
    if not len(columns):
        return similarities.new_full((len(rows), 1), MASKED)
    largest, column = similarities.max(dim=1)
    again = (rows * columns.index_select(0, column)).sum(dim=-1)
    return torch.where(largest == MASKED, largest, again)[:, None]


def _hinge(negatives: Tensor, positives: Tensor, pair: str, side: str, partners: Partners, margin: float) -> Tensor:
    """Sum over queries of the violations `[margin + n - p]+`; the rows of `negatives` are those of `side`."""
    negatives = per_query(negatives, pair, side, partners)
    return F.relu(margin + negatives - positives[:, None]).sum()
