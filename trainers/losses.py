"""The four distillation losses, as plain functions of named tensors.

Shapes: N local images, C local captions (flattened; the image of caption c is `caption_to_image[c]`), width D. All
embeddings are rows that the caller has L2-normalised, so that dot products are cosines; of rows of another length the
losses are the same formulas of dot products, without overflow. Similarities are in float32 whatever comes in, also
under autocast. A group says what counts as the same thing: a row of the query's own group is never a negative. Nor is
an equal text, where texts are given: a caption with the text of the query (TT) or with one that the query's image has
(IT), an image that has the query's text (TI). Images are told apart by their groups alone (II).

A pair names the query's side, then the target's: "II" and "TT" compare a student row with its teacher row in one
modality, "IT" and "TI" across modalities, with one query per (image, caption). Every returned scalar is the sum over
the local queries divided by a count of queries: `num_images` for II, `num_captions` for TT, `num_pairs` for IT and TI.
The counts default to the local ones; given those of the whole optimiser step (all ranks, all micro-batches), the
scalars of its micro-batches add up to the mean over the step.

A caption may be without an image (`caption_to_image` is -1, and `text_groups` gives its group), an image without a
caption: such rows are queries of TT or II, and negatives everywhere. A pair without any query is 0.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .hard_negatives import hard_negative_distillation
from .logsumexp import LogSumExp
from .loss_inputs import OtherStudents, Partners, TeacherRows, check_batch, check_embeddings, check_rows, identities
from .loss_queries import (
    PAIRS,
    check_pairs,
    count_of,
    identities_of,
    mean_over,
    of_paired,
    partners_or_all,
    positives_of,
    query_counts,
    text_groups_of,
)


__all__ = [
    "PAIRS",
    "TARGETS",
    "OtherStudents",
    "Partners",
    "TeacherRows",
    "contrastive_distillation",
    "feature_distillation",
    "hard_negative_distillation",
    "similarity_distillation",
]

TARGETS = ("pairs", "teacher")


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
    text_groups: Tensor | None = None,
    partners: Partners | None = None,
    pairs: Sequence[str] = PAIRS,
    temperature: float = 0.05,
    targets: str = "pairs",
    num_images: int | Tensor | None = None,
    num_captions: int | Tensor | None = None,
    num_pairs: int | Tensor | None = None,
    num_lonely_images: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-entropy of a student row's own teacher row against a dictionary of teacher rows.

    Per query `-log(e^{p/tau} / (e^{p/tau} + sum_j e^{n_j/tau}))`, p its positive, n_j the dictionary rows of other
    groups; 0 without negatives. The dictionary is the content of the `FeatureQueue`s, or the teacher rows of the step.
    The formula is that of DSMD's published code, except that there rows of the query's own image were negatives too.

    A row without a partner has no positive in IT and TI: its targets are the teacher's own similarities of the row to
    all rows d_j of the other side's dictionary. The term is the cross-entropy `-sum_j p_j log q_j`, with p the softmax
    of `t.d_j/tau` of its teacher row t and q that of `s.d_j/tau` of its student row s; 0 for an empty dictionary.
    IT is then the mean over pairs and images without a caption, TI that over all captions.

    Args:
        student_image, teacher_image: `[N, D]`.
        student_text, teacher_text: `[C, D]`.
        image_groups: `[N]` int64, the group of each image.
        caption_to_image: `[C]` int64, the image of each caption, -1 for a text without one.
        dictionary: rows of other groups and texts are the negatives.
        image_texts: `[N, K]` int64, ids of the texts that each image has and others may have, any K; fill up with a
            number that is no id in the dictionary. Default: no text is equal to another.
        text_ids: `[C]` int64, the id of each caption's text.
        text_groups: `[C]` int64, the group of each caption; default: that of its image, which it then must have.
        partners: which rows have partners. Default: found in `caption_to_image` where there are `text_groups`, which
            waits for the device; else every row has one.
        pairs: which of "II", "TT", "IT", "TI".
        temperature: tau, above 0.
        targets: "pairs", or "teacher": the teacher's similarities are the targets of all rows in IT and TI, one query
            an image in IT and one a caption in TI.
        num_images, num_captions, num_pairs, num_lonely_images: what the sums over queries are divided by (default: N,
            C, `num_captions` or else the captions that have an image, the images that have no caption).

    Returns: one scalar per pair.
    Raises: ValueError for an unknown pair or targets, a temperature of 0 or less, or shapes that disagree.
    """
    whose = (image_groups, caption_to_image, image_texts, text_ids, text_groups)
    check_batch(student_image, student_text, teacher_image, teacher_text, *whose)
    check_rows("dictionary", dictionary, student_image)
    check_pairs(pairs)
    if targets not in TARGETS:
        raise ValueError(f"targets is {targets!r}; expected one of {TARGETS}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0 (the published one is 0.05)")

    with torch.autocast(student_image.device.type, enabled=False):
        student = {"I": student_image.float(), "T": student_text.float()}
        teacher = {"I": teacher_image.float(), "T": teacher_text.float()}
        columns = {"I": dictionary.image.float(), "T": dictionary.text.float()}
        partners = partners_or_all(partners, caption_to_image, text_groups, len(student_image))
        text_groups = text_groups_of(text_groups, image_groups, caption_to_image, partners)
        of_queries = identities(image_groups, text_groups, image_texts, text_ids)
        of_columns = identities_of(dictionary)
        counts = query_counts(student_image, student_text, partners, num_images, num_captions, num_pairs)
        lonely = {"I": partners.lonely_images, "T": partners.lonely_captions}
        if targets == "pairs":
            counts["IT"] = counts["IT"] + count_of(num_lonely_images, partners.lonely_images)
        else:
            counts["IT"] = counts["II"]
        counts["TI"] = counts["TT"]

        losses = {}
        for pair in pairs:
            query, target = pair
            terms = []
            if pair in ("II", "TT") or (targets == "pairs" and len(partners.paired_captions) > 0):
                rows, groups, image_of_row, texts = student[query], image_groups, None, of_queries[query].texts
                if query == "T" and partners.all_captions:
                    image_of_row = caption_to_image
                elif query == "T":
                    groups = text_groups
                    if pair == "TI":
                        rows, groups, texts = (of_paired(of, partners) for of in (rows, groups, texts))
                negatives = LogSumExp.apply(
                    rows,
                    groups,
                    image_of_row,
                    columns[target],
                    of_columns[target].groups,
                    temperature,
                    *((None, None) if pair == "II" else (texts, of_columns[target].texts)),
                )
                # In IT the captions of an image share its negatives: the product is made once per image.
                negatives = negatives.index_select(0, partners.image_of_pair) if pair == "IT" else negatives
                positives = positives_of(student, teacher, pair, partners) / temperature
                # softplus(n - p) is log(e^p + e^n) - p without the cancellation
                terms.append(F.softplus(negatives - positives).sum())
            if pair in ("IT", "TI") and len(columns[target]):
                own = None if targets == "teacher" else lonely[query]
                if own is None or len(own):
                    terms.append(_to_the_teachers(student[query], teacher[query], own, columns[target], temperature))
            total = sum(terms[1:], terms[0]) if terms else student[query][:0].sum()
            losses[pair] = mean_over(total, counts[pair])
        return losses


def _to_the_teachers(
    student: Tensor, teacher: Tensor, own: Tensor | None, columns: Tensor, temperature: float
) -> Tensor:
    """Sum over rows of the cross-entropy between the teacher's and the student's softmax over all columns.

    `-sum_j p_j log q_j` is `logsumexp_j(s.d_j / tau) - s.m / tau`, where m is the mean of the d_j weighted by p: the
    gradient of the teacher's own log-sum-exp times tau. So neither softmax is stored.

    Args:
        student, teacher: `[R, D]`.
        own: rows that count; None: all.
        columns: `[Q, D]`, one or more.
    """
    if own is not None:
        student, teacher = student.index_select(0, own), teacher.index_select(0, own)
    of_rows = torch.zeros(len(student), dtype=torch.int64, device=student.device)  # no row is of a column's group
    of_columns = torch.ones(len(columns), dtype=torch.int64, device=student.device)
    with torch.enable_grad():
        teacher = teacher.detach().requires_grad_()
        of_teacher = LogSumExp.apply(teacher, of_rows, None, columns, of_columns, temperature)
        (mean,) = torch.autograd.grad(of_teacher.sum(), teacher)  # [R, D], over tau
    of_student = LogSumExp.apply(student, of_rows, None, columns, of_columns, temperature)
    return (of_student - (student * mean).sum(dim=-1)).sum()


def _means(images: Tensor, captions: Tensor, num_images, num_captions) -> dict[str, Tensor]:
    """The losses of images `[N]` and of captions `[C]`, each summed and divided by its count of queries."""
    return {
        "II": mean_over(images.sum(), count_of(num_images, images)),
        "TT": mean_over(captions.sum(), count_of(num_captions, captions)),
    }
