"""The four distillation losses, as plain functions of named tensors.

Shapes: N local images, C local captions (flattened; the image of caption c is `caption_to_image[c]`), width D. All
embeddings are rows that the caller has L2-normalised, so that dot products are cosines; of rows of another length the
losses are the same formulas of dot products, without overflow. Similarities are in float32 whatever comes in, also
under autocast. A group says what counts as the same thing: a row of the query's own group is never a negative. Nor is
an equal text, where texts are given: a caption with the text of the query (TT) or with one that the query's image has
(IT), an image that has the query's text (TI). Images are told apart by their groups alone (II).

A pair names the query's side, then the target's: "II" and "TT" compare a student row with its teacher row in one
modality, "IT" and "TI" across modalities, with one query per (image, caption). Every returned scalar is the sum over
the local queries divided by a count of queries: `num_images` for II, `num_captions` for TT, IT and TI. The counts
default to the local ones; given those of the whole optimiser step (all ranks, all micro-batches), the scalars of its
micro-batches add up to the mean over the step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .logsumexp import MASKED, LogSumExp, join_equal_texts
from .loss_inputs import (
    Identity,
    OtherStudents,
    TeacherRows,
    check_batch,
    check_columns,
    check_embeddings,
    check_rows,
    identities,
)


PAIRS = ("II", "TT", "IT", "TI")


def feature_distillation(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    num_images: int | Tensor | None = None,
    num_captions: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Mean absolute difference between student and teacher rows (DSMD's published code).

    Args:
        student_image, teacher_image: `[N, D]`.
        student_text, teacher_text: `[C, D]`.
        num_images, num_captions: what the sums over queries are divided by (default: N, C).

    Returns: {"II": scalar, "TT": scalar}, each in [0, 2 / sqrt(D)].
    Raises: ValueError where shapes disagree.
    """
    check_embeddings(student_image, student_text, teacher_image, teacher_text)
    images = (student_image.float() - teacher_image.float()).abs().mean(dim=-1)
    captions = (student_text.float() - teacher_text.float()).abs().mean(dim=-1)
    return _means(images, captions, num_images, num_captions)


def similarity_distillation(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    num_images: int | Tensor | None = None,
    num_captions: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Half of one minus the dot product of student and teacher rows, which is their cosine (DSMD's published code).

    Args: as `feature_distillation`.
    Returns: {"II": scalar, "TT": scalar}, each in [0, 1].
    Raises: ValueError where shapes disagree.
    """
    check_embeddings(student_image, student_text, teacher_image, teacher_text)
    images = (1 - (student_image.float() * teacher_image.float()).sum(dim=-1)) / 2
    captions = (1 - (student_text.float() * teacher_text.float()).sum(dim=-1)) / 2
    return _means(images, captions, num_images, num_captions)


def contrastive_distillation(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_groups: Tensor,
    caption_to_image: Tensor,
    *,
    dictionary: TeacherRows,
    image_texts: Tensor | None = None,
    text_ids: Tensor | None = None,
    pairs: Sequence[str] = PAIRS,
    temperature: float = 0.05,
    num_images: int | Tensor | None = None,
    num_captions: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-entropy of a student row's own teacher row against a dictionary of teacher rows.

    Per query `-log(e^{p/tau} / (e^{p/tau} + sum_j e^{n_j/tau}))`, p its positive, n_j the dictionary rows of other
    groups; 0 without negatives. The dictionary is the content of the `FeatureQueue`s, or the teacher rows of the step.
    The formula is that of DSMD's published code, except that there rows of the query's own image were negatives too.

    Args:
        student_image, teacher_image: `[N, D]`.
        student_text, teacher_text: `[C, D]`.
        image_groups: `[N]` int64, the group of each image.
        caption_to_image: `[C]` int64, the image of each caption.
        dictionary: rows of other groups and texts are the negatives.
        image_texts: `[N, K]` int64, ids of the texts that each image has and others may have, any K; fill up with a
            number that is no id in the dictionary. Default: no text is equal to another.
        text_ids: `[C]` int64, the id of each caption's text.
        pairs: which of "II", "TT", "IT", "TI".
        temperature: tau, above 0.
        num_images, num_captions: what the sums over queries are divided by (default: N, C).

    Returns: one scalar per pair.
    Raises: ValueError for an unknown pair, a temperature of 0 or less, or shapes that disagree.
    """
    whose = (image_groups, caption_to_image, image_texts, text_ids)
    check_batch(student_image, student_text, teacher_image, teacher_text, *whose)
    check_rows("dictionary", dictionary, student_image)
    _check_pairs(pairs)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0 (the published one is 0.05)")

    with torch.autocast(student_image.device.type, enabled=False):
        student = {"I": student_image.float(), "T": student_text.float()}
        teacher = {"I": teacher_image.float(), "T": teacher_text.float()}
        columns = {"I": dictionary.image.float(), "T": dictionary.text.float()}
        of_queries = identities(image_groups, image_groups[caption_to_image], image_texts, text_ids)
        of_columns = _identities(dictionary)
        counts = {"I": _count(num_images, student_image), "T": _count(num_captions, student_text)}

        losses = {}
        for pair in pairs:
            query, target = pair
            negatives = LogSumExp.apply(
                student[query],
                image_groups,
                None if query == "I" else caption_to_image,
                columns[target],
                of_columns[target].groups,
                temperature,
                *((None, None) if pair == "II" else (of_queries[query].texts, of_columns[target].texts)),
            )
            # In IT the captions of an image share its negatives: the product is made once per image.
            negatives = _per_query(negatives, pair, query, caption_to_image)
            positives = _positives(student, teacher, pair, caption_to_image) / temperature
            # softplus(n - p) is log(e^p + e^n) - p without the cancellation
            losses[pair] = F.softplus(negatives - positives).sum() / counts["I" if pair == "II" else "T"]
        return losses


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
    pairs: Sequence[str] = PAIRS,
    margin: float = 0.2,
    margin_kind: str = "fixed",
    hardest: bool = True,
    num_images: int | Tensor | None = None,
    num_captions: int | Tensor | None = None,
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
        caption_to_image: `[C]` int64, the image of each caption.
        step: the teacher's rows of the whole optimiser step, all ranks; at least one image and one caption. None if
            the step is this micro-batch alone: then one matrix product serves both directions.
        others: the micro-batch of all ranks; None on one process, where the local rows are all there are.
        image_texts, text_ids: as in `contrastive_distillation`.
        pairs: which of "II", "TT", "IT", "TI".
        margin: m, a difference of cosines; not used where the margin follows the teacher.
        margin_kind: "fixed", or "teacher": `[(S_ij - S_ii) - (T_ij - T_ii)]+` with the teacher's own similarities T,
            which asks for no gap that the teacher does not have and is 0 for a perfect student.
        hardest: True counts only the largest violation of each query; False the sum of all its violations (the
            published default). Either is averaged over queries.
        num_images, num_captions: what the sums over queries are divided by (default: N, C; with `others`, those of all
            ranks).

    Returns: one scalar per pair. With `others`, values and gradients are shares of this rank: their sums over the
        ranks are the loss of the whole micro-batch and its gradient.
    Raises: ValueError for an unknown pair or margin kind, or shapes that disagree.
    """
    inputs = (student_image, student_text, teacher_image, teacher_text, image_groups, caption_to_image)
    check_batch(*inputs, image_texts, text_ids)
    local = OtherStudents(*inputs, 1, image_texts, text_ids)
    everyone = local if others is None else others
    if others is not None:
        check_batch(*others[:6], others.image_texts, others.text_ids)
        check_columns("others.student_image", others.student_image, others.image_groups, student_image)
    whole = step is None and others is None
    if step is None:
        text_groups = image_groups[caption_to_image]
        step = TeacherRows(teacher_image, image_groups, teacher_text, text_groups, image_texts, text_ids)
    check_rows("step", step, student_image, at_least=1)
    _check_pairs(pairs)
    if margin_kind not in ("fixed", "teacher"):
        raise ValueError(f'margin_kind is {margin_kind!r}; expected "fixed" or "teacher"')
    follow_teacher = margin_kind == "teacher"
    margin = 0.0 if follow_teacher else margin

    with torch.autocast(student_image.device.type, enabled=False):
        of_step = {"I": step.image.float(), "T": step.text.float()}
        of_columns = _identities(step)
        student, teacher, of_queries = _sides(local, follow_teacher)
        all_student, all_teacher, of_all = student, teacher, of_queries
        if others is not None:
            all_student, all_teacher, of_all = _sides(others, follow_teacher)
        counts = {"I": _count(num_images, everyone.student_image), "T": _count(num_captions, everyone.student_text)}

        losses = {}
        for pair in pairs:
            query, target = pair
            positives = _positives(student, teacher, pair, caption_to_image)
            rows, columns = student[query], of_step[target]
            similarities = _similarities(rows, columns, of_queries[query], of_columns[target], pair == "II", hardest)
            negatives = _negatives(similarities, rows, columns, hardest)
            first = _hinge(negatives, positives, pair, query, caption_to_image, margin)

            if others is not None:
                positives = _positives(all_student, all_teacher, pair, everyone.caption_to_image)
            rows, columns = all_teacher[target], all_student[query]
            if whole:
                similarities = similarities.T
            else:
                whose = of_all[target], of_all[query]
                similarities = _similarities(rows, columns, *whose, pair == "II", hardest)
            negatives = _negatives(similarities, rows, columns, hardest)
            second = _hinge(negatives, positives, pair, target, everyone.caption_to_image, margin)
            # Every rank computes this term over the rows of all ranks, but only its own rows carry gradients. These
            # are kept as they are, so that the ranks' gradients add up to that of the term; the value, which is the
            # same on every rank, is divided by world_size, so that the ranks' values add up to the term.
            second = second - second.detach() * (1 - 1 / everyone.world_size)
            losses[pair] = (first + second) / counts["I" if pair == "II" else "T"]
        return losses


def _sides(batch: OtherStudents, follow_teacher: bool) -> tuple[dict, dict, dict]:
    """By side ("I", "T"): student rows, teacher rows, and what they stand for."""
    student = {"I": batch.student_image.float(), "T": batch.student_text.float()}
    teacher = {"I": batch.teacher_image.float(), "T": batch.teacher_text.float()}
    if follow_teacher:
        # S_ij - T_ij = (s_i - t_i) . t_j: the teacher's similarities cost no product of their own and cancel exactly.
        student = {side: student[side] - teacher[side] for side in student}
    text_groups = batch.image_groups[batch.caption_to_image]
    return student, teacher, identities(batch.image_groups, text_groups, batch.image_texts, batch.text_ids)


def _identities(rows: TeacherRows) -> dict[str, Identity]:
    return identities(rows.image_groups, rows.text_groups, rows.image_texts, rows.text_ids)


def _per_query(rows: Tensor, pair: str, side: str, caption_to_image: Tensor) -> Tensor:
    """Rows of one side, one per query: in IT and TI an image's row is repeated for each of its captions."""
    return rows.index_select(0, caption_to_image) if side == "I" and pair != "II" else rows


def _positives(student: dict, teacher: dict, pair: str, caption_to_image: Tensor) -> Tensor:
    """Similarity of each query with its own teacher row."""
    query, target = pair
    queries = _per_query(student[query], pair, query, caption_to_image)
    return (queries * _per_query(teacher[target], pair, target, caption_to_image)).sum(dim=-1)


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
    largest, column = similarities.max(dim=1)
    again = (rows * columns.index_select(0, column)).sum(dim=-1)
    return torch.where(largest == MASKED, largest, again)[:, None]


def _hinge(
    negatives: Tensor, positives: Tensor, pair: str, side: str, caption_to_image: Tensor, margin: float
) -> Tensor:
    """Sum over queries of the violations `[margin + n - p]+`; the rows of `negatives` are those of `side`."""
    negatives = _per_query(negatives, pair, side, caption_to_image)
    return F.relu(margin + negatives - positives[:, None]).sum()


def _means(images: Tensor, captions: Tensor, num_images, num_captions) -> dict[str, Tensor]:
    """The losses of images `[N]` and of captions `[C]`, each summed and divided by its count of queries."""
    return {
        "II": images.sum() / _count(num_images, images),
        "TT": captions.sum() / _count(num_captions, captions),
    }


def _count(count: int | Tensor | None, rows: Tensor) -> int | Tensor:
    return rows.shape[0] if count is None else count


def _check_pairs(pairs: Sequence[str]) -> None:
    unknown = [pair for pair in pairs if pair not in PAIRS]
    if unknown or isinstance(pairs, str):
        raise ValueError(f"pairs is {pairs!r}; expected a list of some of {PAIRS}")
