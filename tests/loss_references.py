"""Random batches, and the losses as loops over single queries in float64, from the definition of a pair set."""

import math
from typing import NamedTuple

import numpy as np
import torch

from rows.columns import text_id
from trainers.batches import NO_TEXT
from trainers.losses import (
    TeacherRows,
    contrastive_distillation,
    hard_negative_distillation,
)


WIDTH = 6


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class Batch:
    """Random rows: several images a group, 1 to 7 captions an image, captions not in the order of their images.

    With texts, captions of different groups are often equal, and images have texts that are no caption of the batch.
    """

    def __init__(self, seed, num_images=7, num_groups=4, same_group=False, with_texts=False):
        rng = np.random.default_rng(seed)
        group_ids = np.array([-(2**62), 17, 3, 2**61 + 1, 99, 5, 6, 7, 8])[:num_groups]
        self.image_groups = np.full(num_images, 17) if same_group else rng.choice(group_ids, num_images)
        self.caption_to_image = rng.permutation(np.repeat(np.arange(num_images), rng.integers(1, 8, num_images)))
        num_captions = len(self.caption_to_image)
        self.student_image = unit(rng.normal(size=(num_images, WIDTH)))
        self.student_text = unit(rng.normal(size=(num_captions, WIDTH)))
        self.teacher_image = unit(rng.normal(size=(num_images, WIDTH)) + 0.5 * self.student_image)
        self.teacher_text = unit(rng.normal(size=(num_captions, WIDTH)) + 0.5 * self.student_text)
        self.texts = self.more_texts = None
        if with_texts:
            self.texts = rng.choice(["a photo", "cat", "dog", *map(str, range(15))], num_captions)
            self.more_texts = [
                set(rng.choice(["cat", "dog", "3", "14"], rng.integers(0, 3))) for _ in range(num_images)
            ]

    @classmethod
    def mixed(cls, seed, **shape):
        """A batch in which images 0 and 2 have no caption left, and image 3 perhaps fewer: these captions have no
        image, and half of them a group of their own."""
        batch = cls(seed, **shape)
        rng = np.random.default_rng(seed + 1000)
        count = len(batch.caption_to_image)
        is_lonely = np.isin(batch.caption_to_image, [0, 2])
        is_lonely |= (batch.caption_to_image == 3) & (rng.random(count) < 0.5)
        is_own_group = is_lonely & (rng.random(count) < 0.5)
        groups = np.where(is_own_group, 1000 + np.arange(count), batch.text_groups)
        return batch.copy(caption_to_image=np.where(is_lonely, -1, batch.caption_to_image), groups_of_texts=groups)

    groups_of_texts = None  # of a mixed batch: the group of each caption

    @property
    def text_groups(self):
        return self.image_groups[self.caption_to_image] if self.groups_of_texts is None else self.groups_of_texts

    def image_texts(self, image):
        return {*self.texts[self.caption_to_image == image], *self.more_texts[image]}

    def text_settings(self):
        """What the losses are told of texts."""
        if self.texts is None:
            return {}
        lists = [sorted(map(text_id, self.image_texts(i))) for i in range(len(self.image_groups))]
        width = max(map(len, lists), default=0) + 1
        lists = [[*own, *[NO_TEXT] * (width - len(own))] for own in lists]
        return {
            "image_texts": torch.tensor(lists, dtype=torch.int64).view(-1, width),
            "text_ids": torch.tensor(list(map(text_id, self.texts))),
        }

    def copy(self, **changes):
        other = object.__new__(Batch)
        other.__dict__ = {**self.__dict__, **changes}
        return other

    def select(self, images, lonely_captions=()):
        """The sub-batch of some images with all their captions, and of some captions without an image."""
        captions = np.flatnonzero(np.isin(self.caption_to_image, images))
        captions = np.concatenate([captions, np.array(lonely_captions, dtype=np.int64)])
        place = {-1: -1, **{image: i for i, image in enumerate(images)}}
        return self.copy(
            student_image=self.student_image[images],
            teacher_image=self.teacher_image[images],
            image_groups=self.image_groups[images],
            student_text=self.student_text[captions],
            teacher_text=self.teacher_text[captions],
            caption_to_image=np.array([place[i] for i in self.caption_to_image[captions]], dtype=np.int64),
            groups_of_texts=None if self.groups_of_texts is None else self.groups_of_texts[captions],
            texts=None if self.texts is None else self.texts[captions],
            more_texts=None if self.texts is None else [self.more_texts[i] for i in images],
        )

    def settings(self):
        """What a loss is told of texts and their groups."""
        groups = {} if self.groups_of_texts is None else {"text_groups": torch.tensor(self.groups_of_texts)}
        return {**self.text_settings(), **groups}

    def tensors(self, with_ids=True):
        def rows(array):
            return torch.tensor(array, dtype=torch.float32)

        student = [rows(self.student_image).requires_grad_(), rows(self.student_text).requires_grad_()]
        teacher = [rows(self.teacher_image), rows(self.teacher_text)]
        ids = [torch.tensor(self.image_groups), torch.tensor(self.caption_to_image)]
        return student + teacher + (ids if with_ids else [])


def teacher_rows(batch):
    return TeacherRows(
        torch.tensor(batch.teacher_image, dtype=torch.float32),
        torch.tensor(batch.image_groups),
        torch.tensor(batch.teacher_text, dtype=torch.float32),
        torch.tensor(batch.text_groups),
        **batch.text_settings(),
    )


def contrast(batch, columns, **settings):
    settings = {**settings, **batch.settings()}
    return contrastive_distillation(*batch.tensors(), dictionary=teacher_rows(columns), **settings)


def hinge(batch, columns=None, **settings):
    settings = {**settings, **batch.settings()}
    return hard_negative_distillation(*batch.tensors(), step=teacher_rows(columns or batch), **settings)


class Named(NamedTuple):
    """What a row stands for: an image its group and texts, a caption the group of its image and its own text."""

    group: int
    texts: set[str]
    is_image: bool


def named(batch, side, i):
    if side == "I":
        return Named(batch.image_groups[i], set() if batch.texts is None else batch.image_texts(i), True)
    return Named(batch.text_groups[i], set() if batch.texts is None else {batch.texts[i]}, False)


def same_thing(a, b):
    """The rule: of one group, or with an equal text, but for two images, of which no text takes part."""
    return a.group == b.group or (not (a.is_image and b.is_image) and bool(a.texts & b.texts))


def queries_of(batch, pair):
    """(what the query and its positive stand for, student row, its teacher row, teacher's own row of the query)."""
    of_pairs = [(c, i) for c, i in enumerate(batch.caption_to_image) if i >= 0]
    if pair == "TT":
        of_pairs = [(c, None) for c in range(len(batch.student_text))]
    places = [(i, i) for i in range(len(batch.student_image))] if pair == "II" else [
        tuple(i if side == "I" else c for side in pair) for c, i in of_pairs
    ]  # fmt: skip
    student = {"I": batch.student_image, "T": batch.student_text}
    teacher = {"I": batch.teacher_image, "T": batch.teacher_text}
    for q, t in places:
        names = named(batch, pair[0], q), named(batch, pair[1], t)
        yield names, student[pair[0]][q], teacher[pair[1]][t], teacher[pair[0]][q]


def columns_of(batch, side):
    rows = (batch.teacher_image, batch.student_image) if side == "I" else (batch.teacher_text, batch.student_text)
    return [(named(batch, side, i), *both) for i, both in enumerate(zip(*rows, strict=True))]


def reference_contrast(batch, columns, pair, temperature):
    losses = []
    for (name, _), query, positive, _ in queries_of(batch, pair):
        negatives = [row for other, row, _ in columns_of(columns, pair[1]) if not same_thing(name, other)]
        scores = [query @ positive / temperature] + [query @ row / temperature for row in negatives]
        losses.append(math.log(sum(math.exp(score - scores[0]) for score in scores)))
    return sum(losses) / len(losses)


def soft_terms(batch, columns, pair, temperature, places):
    """Cross-entropies between the teacher's and the student's softmax over the whole dictionary, both written out."""
    student, teacher = (
        (batch.student_image, batch.teacher_image) if pair[0] == "I" else (batch.student_text, batch.teacher_text)
    )
    rows = np.array([row for _, row, _ in columns_of(columns, pair[1])])
    for place in places:
        p, q = (np.exp(of[place] @ rows.T / temperature) for of in (teacher, student))
        yield -float(np.sum(p / p.sum() * np.log(q / q.sum())))


def lonely_places(batch, side):
    """Images without a caption, captions without an image."""
    if side == "T":
        return [c for c, i in enumerate(batch.caption_to_image) if i < 0]
    return [i for i in range(len(batch.student_image)) if i not in batch.caption_to_image]


def reference_contrast_of_mixed(batch, columns, pair, temperature, targets):
    """IT and TI: pairs by their partners and the rest by the teacher's similarities; or all by these."""
    if pair in ("II", "TT"):
        return reference_contrast(batch, columns, pair, temperature)
    everything = range(len(batch.student_image if pair[0] == "I" else batch.student_text))
    soft = list(soft_terms(batch, columns, pair, temperature, everything))
    if targets == "teacher":
        return sum(soft) / len(soft)
    lonely, pairs = lonely_places(batch, pair[0]), int((batch.caption_to_image >= 0).sum())
    of_pairs = pairs * reference_contrast(batch, columns, pair, temperature) if pairs else 0.0
    return (of_pairs + sum(soft[i] for i in lonely)) / (pairs + len(lonely))


def reference_hinge(batch, columns, pair, margin, kind, hardest):
    total, count = 0.0, 0
    for (name, name_of_positive), query, positive, teacher_query in queries_of(batch, pair):
        count += 1
        s_ii, t_ii = query @ positive, teacher_query @ positive
        violations = ([], [])
        for other, row, _ in columns_of(columns, pair[1]):
            if not same_thing(name, other):
                gap = query @ row - s_ii
                violations[0].append(margin + gap if kind == "fixed" else gap - (teacher_query @ row - t_ii))
        for other, teacher_row, student_row in columns_of(batch, pair[0]):
            if not same_thing(name_of_positive, other):
                gap = student_row @ positive - s_ii
                violations[1].append(margin + gap if kind == "fixed" else gap - (teacher_row @ positive - t_ii))
        for direction in violations:
            direction = [max(v, 0.0) for v in direction]
            total += (max(direction) if hardest else sum(direction)) if direction else 0.0
    return total / count


def gradients(losses, student):
    return torch.autograd.grad(sum(losses.values()), student, allow_unused=True)


def check_gradients(gradients, batch, value, pair: str) -> None:
    """The gradients of student images and captions are the differences of `value(batch)`, a reference in numpy.

    Args:
        gradients: of `student_image` `[N, D]` and `student_text` `[C, D]`, None for the side that `pair` does not ask.
    """
    for side, gradient in zip(("student_image", "student_text"), gradients, strict=True):
        if gradient is None:
            assert side[8] != pair[0].lower()
            continue
        rows = getattr(batch, side)
        expected = np.zeros_like(rows)
        for place in np.ndindex(*rows.shape):
            moved = np.zeros_like(rows)
            moved[place] = 1e-6
            up, down = value(batch.copy(**{side: rows + moved})), value(batch.copy(**{side: rows - moved}))
            expected[place] = (up - down) / 2e-6
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-5)
