"""The losses against loops over single queries in float64, written from the definition of a pair set."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from loss_references import (
    WIDTH,
    Batch,
    check_gradients,
    contrast,
    gradients,
    hinge,
    reference_contrast,
    reference_hinge,
    teacher_rows,
)

from trainers import logsumexp
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
    check_gradients(gradients(losses, inputs[:2]), batch, value, pair)


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
