"""The losses against loops over single queries in float64, written from the definition of a pair set."""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from rows.columns import text_id
from trainers import logsumexp
from trainers.batches import NO_TEXT
from trainers.feature_queue import UNKNOWN_TEXT
from trainers.losses import (
    PAIRS,
    OtherStudents,
    TeacherRows,
    contrastive_distillation,
    feature_distillation,
    hard_negative_distillation,
    similarity_distillation,
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

    @property
    def text_groups(self):
        return self.image_groups[self.caption_to_image]

    def image_texts(self, image):
        return {*self.texts[self.caption_to_image == image], *self.more_texts[image]}

    def text_settings(self):
        """What the losses are told of texts."""
        if self.texts is None:
            return {}
        lists = [sorted(map(text_id, self.image_texts(i))) for i in range(len(self.image_groups))]
        width = max(map(len, lists)) + 1
        return {
            "image_texts": torch.tensor([[*own, *[NO_TEXT] * (width - len(own))] for own in lists]),
            "text_ids": torch.tensor(list(map(text_id, self.texts))),
        }

    def copy(self, **changes):
        other = object.__new__(Batch)
        other.__dict__ = {**self.__dict__, **changes}
        return other

    def select(self, images):
        """The sub-batch of some images with all their captions."""
        captions = np.flatnonzero(np.isin(self.caption_to_image, images))
        place = {image: i for i, image in enumerate(images)}
        return self.copy(
            student_image=self.student_image[images],
            teacher_image=self.teacher_image[images],
            image_groups=self.image_groups[images],
            student_text=self.student_text[captions],
            teacher_text=self.teacher_text[captions],
            caption_to_image=np.array([place[i] for i in self.caption_to_image[captions]], dtype=np.int64),
            texts=None if self.texts is None else self.texts[captions],
            more_texts=None if self.texts is None else [self.more_texts[i] for i in images],
        )

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
    settings = {**settings, **batch.text_settings()}
    return contrastive_distillation(*batch.tensors(), dictionary=teacher_rows(columns), **settings)


def hinge(batch, columns=None, **settings):
    settings = {**settings, **batch.text_settings()}
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
    of_pairs = [(c, i) for c, i in enumerate(batch.caption_to_image)]
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


@pytest.mark.parametrize("seed", range(3))
def test_feature_and_similarity(seed):
    batch = Batch(seed)
    inputs = batch.tensors(with_ids=False)
    features, similarities = feature_distillation(*inputs), similarity_distillation(*inputs)
    for pair, student, teacher in (
        ("II", batch.student_image, batch.teacher_image),
        ("TT", batch.student_text, batch.teacher_text),
    ):
        by_hand = np.mean([np.abs(student[i] - teacher[i]).sum() / WIDTH for i in range(len(student))])
        assert features[pair].item() == pytest.approx(by_hand, abs=1e-6)
        by_hand = np.mean([(1 - student[i] @ teacher[i]) / 2 for i in range(len(student))])
        assert similarities[pair].item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("block", [5, 4096])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_texts", [False, True])
def test_contrastive_against_loops(monkeypatch, seed, temperature, block, with_texts):
    monkeypatch.setattr(logsumexp, "DICTIONARY_BLOCK", block)
    batch, queue = Batch(seed, with_texts=with_texts), Batch(seed + 100, num_images=12, with_texts=with_texts)
    for columns in (queue, batch):
        losses = contrast(batch, columns, pairs=PAIRS, temperature=temperature)
        assert tuple(losses) == PAIRS
        for pair in PAIRS:
            assert losses[pair].item() == pytest.approx(
                reference_contrast(batch, columns, pair, temperature), abs=1e-5
            )


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("kind", ["fixed", "teacher"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_texts", [False, True])
def test_hinge_against_loops(seed, kind, hardest, with_texts):
    batch, step = Batch(seed, with_texts=with_texts), Batch(seed + 100, num_images=12, with_texts=with_texts)
    losses = hinge(batch, step, margin=0.3, margin_kind=kind, hardest=hardest)
    assert tuple(losses) == PAIRS
    for pair in PAIRS:
        by_hand = reference_hinge(batch, step, pair, 0.3, kind, hardest)
        assert losses[pair].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("kind", ["fixed", "teacher"])
@pytest.mark.parametrize("with_texts", [False, True])
def test_a_step_of_one_batch_need_not_be_given(kind, hardest, with_texts):
    batch = Batch(21, with_texts=with_texts)
    settings = {"margin": 0.3, "margin_kind": kind, "hardest": hardest, **batch.text_settings()}
    found = []
    for step in (None, teacher_rows(batch)):
        inputs = batch.tensors()
        losses = hard_negative_distillation(*inputs, step=step, **settings)
        found.append([*losses.values(), *gradients(losses, inputs[:2])])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0][-1].abs().max() > 0


def test_the_largest_logits_may_come_last_and_be_large(monkeypatch):
    """Blocks whose own groups are struck out, and logits that overflow unless the largest is taken off."""
    monkeypatch.setattr(logsumexp, "DICTIONARY_BLOCK", 2)
    query = torch.tensor([[1.0, 0.0]]).requires_grad_()
    columns = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    groups, temperature = torch.tensor([7, 7, 1, 2, 3]), 1e-3
    value = logsumexp.LogSumExp.apply(query, torch.tensor([7]), None, columns, groups, temperature)
    assert value.item() == pytest.approx(600)  # cosine 0.6 over 0.001; the own group's 1.0 would give 1,000
    (gradient,) = torch.autograd.grad(value, query)
    torch.testing.assert_close(gradient, columns[-1:] / temperature)


@pytest.mark.parametrize("temperature", [0.05, 1 / 59.9, 1 / 60.1, 0.002])  # on both sides of NO_SHIFT
@pytest.mark.parametrize("what", ["alike", "opposite", "random", "none"])
def test_log_sum_exp_against_float64(temperature, what):
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=-1).requires_grad_()
    rows = torch.nn.functional.normalize(torch.randn(9000, 8, generator=generator), dim=-1)
    if what in ("alike", "opposite"):
        rows = query.detach()[:1].repeat(9000, 1) * (1 if what == "alike" else -1)
    groups = torch.full((9000,), 5) if what == "none" else torch.arange(9000)
    images, image_of_query = torch.tensor([5, 9001]), torch.tensor([0, 1, 0])
    value = logsumexp.LogSumExp.apply(query, images, image_of_query, rows, groups, temperature)
    logits = query.double() @ rows.double().T / temperature
    logits = logits.masked_fill(images[image_of_query][:, None] == groups, -torch.inf)
    expected = logits.logsumexp(dim=1)
    alone = torch.isinf(expected)
    assert (value[alone] == logsumexp.MASKED).all() and alone.sum() == (2 if what == "none" else 0)
    torch.testing.assert_close(value[~alone].double(), expected[~alone], rtol=1e-5, atol=1e-4)
    (found,) = torch.autograd.grad(value.sum(), query)
    (gradient,) = torch.autograd.grad(expected[~alone].sum(), query)
    torch.testing.assert_close(found[~alone].double(), gradient[~alone].double(), rtol=2e-4, atol=1e-4 / temperature)


@pytest.mark.parametrize("lengths", [(1, 0.01), (0.5, 3), (5, 1), (1, 40), (12, 12), (300, 300)])
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_rows_of_any_length_against_float64(monkeypatch, lengths, order):
    """One's own loop may leave rows that are not normalised: the formula's value, not an infinite one."""
    monkeypatch.setattr(logsumexp, "DICTIONARY_BLOCK", 7)
    batch = Batch(31)
    student_image, student_text, *teacher, groups, owners = (tensor.detach() for tensor in batch.tensors())
    inputs = [(rows * lengths[0]).requires_grad_() for rows in (student_image, student_text)]
    teacher = [rows * lengths[1] for rows in teacher]
    columns = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1)) * lengths[1]
    if order != "random":  # of the first caption's logits
        columns = columns[(columns @ student_text[0]).argsort(descending=order == "falling")]
    column_groups = groups[torch.arange(50) % len(groups)]
    whole = TeacherRows(columns, column_groups, columns.flip(0), column_groups.flip(0))
    losses = contrastive_distillation(*inputs, *teacher, groups, owners, dictionary=whole, num_captions=1)
    found = torch.autograd.grad(sum(losses.values()), inputs)

    exact = [rows.detach().double().requires_grad_() for rows in inputs]
    student, own = dict(zip("IT", exact)), dict(zip("IT", (rows.double() for rows in teacher)))
    expected = {}
    for pair in PAIRS:
        of_query, of_target = (
            torch.arange(len(groups)) if pair == "II" else owners if side == "I" else torch.arange(len(owners))
            for side in pair
        )
        queries = student[pair[0]][of_query]
        positives = (queries * own[pair[1]][of_target]).sum(dim=1, keepdim=True)
        rows, of_rows = (columns, column_groups) if pair[1] == "I" else (columns.flip(0), column_groups.flip(0))
        negatives = queries @ rows.double().T
        query_groups = groups if pair == "II" else groups[owners]
        negatives = negatives.masked_fill(query_groups[:, None] == of_rows, -torch.inf)
        logits = torch.cat([positives, negatives], dim=1) / 0.05
        total = (logits.logsumexp(dim=1) - logits[:, 0]).sum()
        expected[pair] = total / (len(groups) if pair == "II" else 1)
    for pair in PAIRS:
        assert losses[pair].item() == pytest.approx(expected[pair].item(), rel=1e-5, abs=1e-5)
    for gradient, of_exact in zip(found, torch.autograd.grad(sum(expected.values()), exact), strict=True):
        scale = of_exact.abs().max()
        torch.testing.assert_close(gradient.double() / scale, of_exact / scale, rtol=0, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.05, 1 / 59.9])
def test_of_unit_rows_nothing_is_taken_off(temperature):
    """Bit for bit the plain sum of exponentials: what a run with the published temperature was made with."""
    generator = torch.Generator().manual_seed(0)
    query, rows = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (20, 9000))
    query.requires_grad_()
    value = logsumexp.LogSumExp.apply(query, torch.arange(20), None, rows, torch.arange(9000), temperature)
    (found,) = torch.autograd.grad(value.sum(), query)
    total, weighted, scaled = torch.zeros(20, 1), torch.zeros(20, 16), query.detach() / temperature
    for start in range(0, 9000, logsumexp.DICTIONARY_BLOCK):
        block = rows[start : start + logsumexp.DICTIONARY_BLOCK]
        logits = scaled @ block.T
        logits[torch.arange(20)[:, None] == torch.arange(9000)[start : start + len(block)]] = logsumexp.MASKED
        total += logits.exp_().sum(dim=1, keepdim=True)
        weighted.addmm_(logits, block)
    assert torch.equal(value, total.log().squeeze(1)) and torch.equal(found, weighted / (total * temperature))


@pytest.mark.parametrize("name", ["contrastive", "fixed", "teacher"])
@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_against_differences_of_the_loops(monkeypatch, name, pair):
    monkeypatch.setattr(logsumexp, "DICTIONARY_BLOCK", 5)
    batch, step = Batch(11, num_images=4, with_texts=True), Batch(111, num_images=6, with_texts=True)

    def value(changed):
        if name == "contrastive":
            return reference_contrast(changed, step, pair, 0.2)
        return reference_hinge(changed, step, pair, 0.2, name, True)

    inputs, settings = batch.tensors(), {"pairs": [pair], **batch.text_settings()}
    if name == "contrastive":
        losses = contrastive_distillation(*inputs, dictionary=teacher_rows(step), temperature=0.2, **settings)
    else:
        losses = hard_negative_distillation(*inputs, step=teacher_rows(step), margin_kind=name, **settings)
    found = gradients(losses, inputs[:2])
    for side, gradient in zip(("student_image", "student_text"), found, strict=True):
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


def test_two_images_by_hand():
    """Width 2, one caption each: student images lie on the axes, the teacher's at 0 and 60 degrees."""
    half, root = 0.5, math.sqrt(3) / 2
    axes, teacher = torch.eye(2), torch.tensor([[1.0, 0.0], [half, root]])
    ids = [torch.tensor([5, 9]), torch.tensor([0, 1])]
    inputs = [axes, axes, teacher, teacher, *ids]

    features = feature_distillation(*inputs[:4])["II"]
    assert features.item() == pytest.approx((0 + (half + 1 - root) / 2) / 2)
    assert similarity_distillation(*inputs[:4])["TT"].item() == pytest.approx((0 + (1 - root) / 2) / 2)

    columns = TeacherRows(teacher, ids[0], teacher, ids[0])
    contrastive = contrastive_distillation(
        *inputs,
        dictionary=columns,
        pairs=PAIRS,
        temperature=1.0,
    )
    # query 0: positive 1, negative 1/2; query 1: positive sqrt(3)/2, negative 0
    by_hand = (math.log(1 + math.exp(half - 1)) + math.log(1 + math.exp(-root))) / 2
    assert all(loss.item() == pytest.approx(by_hand) for loss in contrastive.values())

    fixed = hard_negative_distillation(*inputs, step=columns, margin=0.6)
    # student to teacher: 0.6 + 0.5 - 1 and 0; teacher to student: 0.6 + 0 - 1 and 0.6 + 0.5 - 0.866
    assert all(loss.item() == pytest.approx((0.1 + 0 + 0 + 1.1 - root) / 2, abs=1e-6) for loss in fixed.values())
    follow = hard_negative_distillation(*inputs, step=columns, margin_kind="teacher")
    # the teacher's own gaps are -1/2 everywhere; the student's -1/2, -0.866; -1, 0.5 - 0.866
    assert all(loss.item() == pytest.approx((0 + 0 + 0 + 1 - root) / 2, abs=1e-6) for loss in follow.values())


def test_order_and_names_of_rows_do_not_matter():
    batch, queue = Batch(3), Batch(103, num_images=12)
    rng = np.random.default_rng(0)
    images, captions = rng.permutation(len(batch.student_image)), rng.permutation(len(batch.student_text))
    place = np.argsort(images)
    shuffled = batch.copy(
        student_image=batch.student_image[images],
        teacher_image=batch.teacher_image[images],
        image_groups=batch.image_groups[images],
        student_text=batch.student_text[captions],
        teacher_text=batch.teacher_text[captions],
        caption_to_image=place[batch.caption_to_image[captions]],
    )
    new_names = {old: i * 1000 - 7 for i, old in enumerate(np.unique([*batch.image_groups, *queue.image_groups]))}

    def rename(b):
        return b.copy(image_groups=np.array([new_names[group] for group in b.image_groups]))

    for function, settings in ((contrast, {"pairs": PAIRS}), (hinge, {}), (hinge, {"margin_kind": "teacher"})):
        expected = function(batch, queue, **settings)
        for changed in (function(shuffled, queue, **settings), function(rename(batch), rename(queue), **settings)):
            for pair in PAIRS:
                assert changed[pair].item() == pytest.approx(expected[pair].item(), rel=1e-5)


def test_parts_add_up_to_the_whole():
    batch, queue = Batch(4, num_images=9, with_texts=True), Batch(104, num_images=12, with_texts=True)
    counts = {"num_images": len(batch.student_image), "num_captions": len(batch.student_text)}
    parts = [batch.select([0, 3, 4]), batch.select([1, 2, 5, 6, 7, 8])]

    def check(function):
        whole, shares = function(batch, {}), [function(part, counts) for part in parts]
        for pair in whole:
            assert sum(share[pair].item() for share in shares) == pytest.approx(whole[pair].item(), rel=1e-5)

    check(lambda b, settings: contrast(b, queue, pairs=PAIRS, **settings))
    check(lambda b, settings: feature_distillation(*b.tensors(with_ids=False), **settings))
    check(lambda b, settings: similarity_distillation(*b.tensors(with_ids=False), **settings))


@pytest.mark.parametrize("given_counts", [True, False])
@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("kind", ["fixed", "teacher"])
def test_hinge_on_two_ranks_is_that_of_one_process(kind, hardest, given_counts):
    batch = Batch(5, num_images=9, with_texts=True)
    settings = {"margin_kind": kind, "hardest": hardest}
    parts = [[0, 1, 2], [3, 4, 5, 6, 7, 8]]
    # the order in which the ranks' rows are gathered
    captions = np.concatenate([np.flatnonzero(np.isin(batch.caption_to_image, part)) for part in parts])
    batch = batch.copy(
        student_text=batch.student_text[captions],
        teacher_text=batch.teacher_text[captions],
        caption_to_image=batch.caption_to_image[captions],
        texts=batch.texts[captions],
    )
    inputs, texts = batch.tensors(), batch.text_settings()
    whole = hard_negative_distillation(*inputs, step=teacher_rows(batch), **settings, **texts)
    expected = gradients(whole, inputs[:2])
    counts = {"num_images": 9, "num_captions": len(captions)} if given_counts else {}

    values, found, first_text = dict.fromkeys(PAIRS, 0.0), [[], []], 0
    for images in parts:
        part = batch.select(images)
        local, settings = part.tensors(), {**settings, **part.text_settings()}
        student_image, student_text = inputs[0].detach().clone(), inputs[1].detach().clone()
        student_image[images[0] : images[-1] + 1] = local[0]
        student_text[first_text : first_text + len(local[1])] = local[1]
        first_text += len(local[1])
        others = OtherStudents(student_image, student_text, *inputs[2:], world_size=2, **texts)
        losses = hard_negative_distillation(*local, step=teacher_rows(batch), others=others, **settings, **counts)
        for pair in PAIRS:
            values[pair] += losses[pair].item()
        for rows, gradient in zip(found, gradients(losses, local[:2]), strict=True):
            rows.append(gradient)

    for pair in PAIRS:
        assert values[pair] == pytest.approx(whole[pair].item(), rel=1e-5)
    for rows, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(rows), gradient, rtol=1e-5, atol=1e-6)


def test_images_encoded_once_are_images_encoded_per_caption():
    """IT with its shared product equals IT where each caption brings its own copy of the image."""
    batch, queue = Batch(6), Batch(106, num_images=12)
    per_caption = batch.copy(
        student_image=batch.student_image[batch.caption_to_image],
        teacher_image=batch.teacher_image[batch.caption_to_image],
        image_groups=batch.text_groups,
        caption_to_image=np.arange(len(batch.student_text)),
    )
    once, copies = contrast(batch, queue, pairs=["IT"]), contrast(per_caption, queue, pairs=["IT"])
    assert once["IT"].item() == pytest.approx(copies["IT"].item(), rel=1e-6)
    once, copies = hinge(batch, queue, pairs=["IT"]), hinge(per_caption, queue, pairs=["IT"])
    assert once["IT"].item() == pytest.approx(copies["IT"].item(), rel=1e-6)


def test_perfect_student_has_nothing_to_learn():
    batch = Batch(7, num_images=9)
    perfect = batch.copy(student_image=batch.teacher_image, student_text=batch.teacher_text)
    for hardest in (True, False):
        for loss in hinge(perfect, margin_kind="teacher", hardest=hardest).values():
            assert loss.item() == 0
        # a fixed margin asks a perfect student for more
        assert all(loss.item() > 0 for loss in hinge(perfect, margin=1.5, hardest=hardest).values())
        assert any(loss.item() > 0.01 for loss in hinge(batch, margin_kind="teacher", hardest=hardest).values())
    for function in (feature_distillation, similarity_distillation):
        assert all(abs(loss.item()) < 1e-6 for loss in function(*perfect.tensors(with_ids=False)).values())


@pytest.mark.parametrize("num_images", [1, 5])
def test_without_negatives_losses_and_gradients_are_zero(num_images):
    batch = Batch(8, num_images=num_images, same_group=True)
    rows, groups = torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)
    empty = TeacherRows(rows, groups, rows, groups)
    inputs = batch.tensors()
    for losses in (
        contrastive_distillation(*inputs, dictionary=teacher_rows(batch), pairs=PAIRS),
        contrastive_distillation(*inputs, dictionary=empty, pairs=PAIRS),
        hard_negative_distillation(*inputs, step=teacher_rows(batch)),
        hard_negative_distillation(*inputs, step=teacher_rows(batch), hardest=False, margin_kind="teacher"),
    ):
        assert all(loss.item() == 0 for loss in losses.values())
        for gradient in gradients(losses, inputs[:2]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_captions_that_are_all_equal_leave_no_negative_but_other_images():
    """Class names, in the extreme: any teacher's picture is right for the text, and so is any of the texts."""
    batch = Batch(16, num_images=6, num_groups=6, with_texts=True)
    batch = batch.copy(texts=np.full(len(batch.texts), "cat"))
    for hardest in (True, False):
        losses = {**contrast(batch, batch), **{f"hinge_{k}": v for k, v in hinge(batch, hardest=hardest).items()}}
        for pair in ("TT", "IT", "TI"):
            assert losses[pair].item() == losses[f"hinge_{pair}"].item() == 0
        assert losses["II"].item() > 0 and losses["hinge_II"].item() > 0


def test_where_no_captions_are_equal_texts_change_no_bit():
    batch, queue = Batch(17), Batch(117, num_images=12)
    for count, each in enumerate((batch, queue)):
        each.texts = np.array([f"{count} {c}" for c in range(len(each.student_text))])
        each.more_texts = [set() for _ in each.image_groups]
    for function, settings in ((contrast, {}), (hinge, {}), (hinge, {"hardest": False})):
        found = []
        for told in (True, False):
            changed = [each if told else each.copy(texts=None) for each in (batch, queue)]
            inputs, texts = changed[0].tensors(), changed[0].text_settings()
            assert bool(texts) == told
            columns = {"dictionary" if function is contrast else "step": teacher_rows(changed[1])}
            loss = contrastive_distillation if function is contrast else hard_negative_distillation
            losses = loss(*inputs, **columns, **settings, **texts)
            found.append([*losses.values(), *gradients(losses, inputs[:2])])
        assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_texts_that_one_side_does_not_know_are_equal_to_none():
    batch, queue = Batch(18, with_texts=True), Batch(118, num_images=12, with_texts=True)
    expected = contrast(batch.copy(texts=None), queue.copy(texts=None))
    for changed in ((batch, queue.copy(texts=None)), (batch.copy(texts=None), queue)):
        assert contrast(*changed) == expected
    inputs, rows = batch.tensors(), teacher_rows(queue)
    unknown = dataclasses.replace(  # as a queue has them after a run of an earlier release was resumed
        rows,
        image_texts=torch.full_like(rows.image_texts, UNKNOWN_TEXT),
        text_ids=torch.full_like(rows.text_ids, UNKNOWN_TEXT),
    )
    assert contrastive_distillation(*inputs, dictionary=unknown, **batch.text_settings()) == expected


def test_one_row_without_negatives_among_others_keeps_gradients_finite():
    batch = Batch(9, num_images=4)
    queue = Batch(109, num_images=6).copy(image_groups=np.full(6, batch.image_groups[0]))
    inputs = batch.tensors()
    losses = contrastive_distillation(*inputs, dictionary=teacher_rows(queue), pairs=PAIRS, temperature=0.01)
    found = gradients(losses, inputs[:2])
    assert all(torch.isfinite(gradient).all() for gradient in found)
    assert torch.equal(found[0][0], torch.zeros(WIDTH))
    assert any(gradient.abs().max() > 0 for gradient in found)


def test_rows_of_the_own_group_are_ignored_whatever_they_hold():
    batch, queue = Batch(10), Batch(110, num_images=12)
    only = batch.select([0])
    nearest = queue.copy(  # as good a negative as can be, were it one
        teacher_image=np.vstack([queue.teacher_image, only.student_image]),
        teacher_text=np.vstack([queue.teacher_text, only.student_image]),
        student_image=np.vstack([queue.student_image, only.student_image]),
        image_groups=np.append(queue.image_groups, only.image_groups),
        caption_to_image=np.append(queue.caption_to_image, 12),
    )
    for function, settings in ((contrast, {"pairs": PAIRS}), (hinge, {}), (hinge, {"hardest": False})):
        plain, with_own = function(only, queue, **settings), function(only, nearest, **settings)
        for pair in PAIRS:
            assert with_own[pair].item() == pytest.approx(plain[pair].item(), rel=1e-6)
    stranger = nearest.copy(image_groups=np.append(queue.image_groups, 123456))
    assert contrast(only, stranger)["II"].item() > contrast(only, queue)["II"].item() + 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_similarities_are_float32_under_autocast(dtype):
    batch, queue = Batch(12), Batch(112, num_images=12)
    inputs = [t.detach().to(dtype) if t.is_floating_point() else t for t in batch.tensors()]
    widened = [t.float() if t.is_floating_point() else t for t in inputs]
    for function, columns in (
        (contrastive_distillation, {"dictionary": teacher_rows(queue)}),
        (hard_negative_distillation, {"step": teacher_rows(queue)}),
    ):
        expected = function(*widened, **columns)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(*inputs, **columns)
        for pair, loss in found.items():
            assert loss.dtype == torch.float32
            assert torch.equal(loss, expected[pair])


def test_nothing_waits_for_the_device():
    """Tensors without values: whatever would read one on the host raises."""
    batch = Batch(15, with_texts=True)
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(t) for t in batch.tensors()]
    texts = {name: mode.from_tensor(t) for name, t in batch.text_settings().items()}
    rows = TeacherRows(**{name: mode.from_tensor(t) for name, t in vars(teacher_rows(batch)).items()})
    with mode:
        others = OtherStudents(*inputs, world_size=2, **texts)
        for losses in (
            contrastive_distillation(*inputs, dictionary=rows, pairs=PAIRS, **texts),
            hard_negative_distillation(*inputs, step=rows, others=others, **texts),
            hard_negative_distillation(*inputs, step=rows, margin_kind="teacher", hardest=False, **texts),
        ):
            assert all(loss.shape == () for loss in losses.values())
            gradients(losses, inputs[:2])
        with pytest.raises(RuntimeError):
            losses["II"].item()


def test_pairs_are_a_choice():
    batch = Batch(13)
    for loss in (hinge, partial(contrast, columns=batch)):
        everything = loss(batch)
        assert tuple(everything) == PAIRS
        assert loss(batch, pairs=["TI"]) == {"TI": everything["TI"]}
    assert contrast(batch, batch, pairs=()) == {}


def test_bad_input_is_refused():
    batch = Batch(14, with_texts=True)
    inputs, rows = batch.tensors(), teacher_rows(batch)
    num_captions = len(batch.student_text)

    for at, message in ((0, "teacher_image"), (1, "student_text"), (2, "teacher_image"), (3, "teacher_text")):
        wrong = [t[:, :-1] if i == at else t for i, t in enumerate(inputs)]
        for call in (
            lambda w: feature_distillation(*w[:4]),
            lambda w: similarity_distillation(*w[:4]),
            lambda w: contrastive_distillation(*w, dictionary=rows),
            lambda w: hard_negative_distillation(*w, step=rows),
        ):
            with pytest.raises(ValueError, match=message):
                call(wrong)
    for at, message in ((4, "image_groups"), (5, f"caption_to_image.*{num_captions - 1}.*{num_captions}")):
        wrong = [t[:-1] if i == at else t for i, t in enumerate(inputs)]
        with pytest.raises(ValueError, match=message):
            contrastive_distillation(*wrong, dictionary=rows)
        with pytest.raises(ValueError, match=message):
            hard_negative_distillation(*wrong, step=rows)
        with pytest.raises(ValueError, match=message):
            hard_negative_distillation(*inputs, step=rows, others=OtherStudents(*wrong, world_size=2))
    for given, function in (("dictionary", contrastive_distillation), ("step", hard_negative_distillation)):
        for name, value in vars(rows).items():
            is_wide = value.ndim == 2 and name != "image_texts"  # any number of texts is right
            wrong = dataclasses.replace(rows, **{name: value[:, :-1] if is_wide else value[:-1]})
            with pytest.raises(ValueError, match=rf"{given}\.{name.removesuffix('_groups')}"):
                function(*inputs, **{given: wrong})
        for pairs in (["II", "XY"], "II"):
            with pytest.raises(ValueError, match="pairs"):
                function(*inputs, **{given: rows}, pairs=pairs)
        for name, value in batch.text_settings().items():
            with pytest.raises(ValueError, match=f"^{name}"):
                function(*inputs, **{given: rows}, **{name: value[:-1]})
    with pytest.raises(ValueError, match="temperature"):
        contrastive_distillation(*inputs, dictionary=rows, temperature=0.0)
    with pytest.raises(ValueError, match="margin_kind"):
        hard_negative_distillation(*inputs, step=rows, margin_kind="learned")
