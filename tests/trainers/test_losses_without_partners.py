"""The losses where captions have no image and images no caption: against loops, and when batches are cut."""

import numpy as np
import pytest
import torch
from loss_references import (
    Batch,
    check_gradients,
    contrast,
    gradients,
    hinge,
    lonely_places,
    reference_contrast_of_mixed,
    reference_hinge,
    soft_terms,
    teacher_rows,
)

from trainers import logsumexp
from trainers.losses import (
    PAIRS,
    TARGETS,
    contrastive_distillation,
    feature_distillation,
    hard_negative_distillation,
    similarity_distillation,
)


@pytest.mark.parametrize("block", [5, 4096])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_texts", [False, True])
def test_contrastive_against_loops(monkeypatch, seed, targets, block, with_texts):
    monkeypatch.setattr(logsumexp, "DICTIONARY_BLOCK", block)
    batch = Batch.mixed(seed, with_texts=with_texts)
    queue = Batch.mixed(seed + 100, num_images=12, with_texts=with_texts)
    assert lonely_places(batch, "I")[:1] == [0] and lonely_places(batch, "T")
    for columns in (queue, batch):
        losses = contrast(batch, columns, temperature=0.2, targets=targets)
        assert tuple(losses) == PAIRS
        for pair in PAIRS:
            by_hand = reference_contrast_of_mixed(batch, columns, pair, 0.2, targets)
            assert losses[pair].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("seed", range(2))
def test_the_teachers_targets_of_a_batch_with_all_partners(seed, targets):
    batch, queue = Batch(seed), Batch(seed + 100, num_images=12)
    losses = contrast(batch, queue, temperature=0.1, targets=targets)
    for pair in PAIRS:
        by_hand = reference_contrast_of_mixed(batch, queue, pair, 0.1, targets)
        assert losses[pair].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["pairs", "teacher", "fixed", "follow"])
@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_against_differences_of_the_loops(monkeypatch, name, pair):
    monkeypatch.setattr(logsumexp, "DICTIONARY_BLOCK", 5)
    batch, step = Batch.mixed(11, num_images=5, with_texts=True), Batch.mixed(111, num_images=6, with_texts=True)
    kind = "teacher" if name == "follow" else "fixed"

    def value(changed):
        if name in TARGETS:
            return reference_contrast_of_mixed(changed, step, pair, 0.2, name)
        return reference_hinge(changed, step, pair, 0.2, kind, True)

    inputs, settings = batch.tensors(), {"pairs": [pair], **batch.settings()}
    if name in TARGETS:
        settings |= {"temperature": 0.2, "targets": name}
        losses = contrastive_distillation(*inputs, dictionary=teacher_rows(step), **settings)
    else:
        losses = hard_negative_distillation(*inputs, step=teacher_rows(step), margin_kind=kind, **settings)
    check_gradients(gradients(losses, inputs[:2]), batch, value, pair)


def every_loss(batch, step, **counts):
    of_pairs = {name: count for name, count in counts.items() if name != "num_lonely_images"}
    plain = {name: count for name, count in of_pairs.items() if name != "num_pairs"}
    rows = batch.tensors()
    losses = {
        "feature": feature_distillation(*rows[:4], **plain),
        "similarity": similarity_distillation(*rows[:4], **plain),
        **{
            targets: contrastive_distillation(
                *rows, dictionary=teacher_rows(step), targets=targets, **counts, **batch.settings()
            )
            for targets in TARGETS
        },
    }
    # The hinge's second direction compares with the students of a micro-batch: its parts do not add up.
    assert all(torch.isfinite(value) for value in hinge(batch, step, **of_pairs).values())
    return {f"{name} {pair}": value for name, own in losses.items() for pair, value in own.items()}


@pytest.mark.parametrize("with_texts", [False, True])
def test_cut_into_batches_the_losses_add_up(with_texts):
    """Into one of pairs, one of images alone, one of texts alone, and one that has all three."""
    whole = Batch.mixed(5, with_texts=with_texts, num_images=7)
    lonely = lonely_places(whole, "T")
    counts = {
        "num_images": len(whole.student_image),
        "num_captions": len(whole.student_text),
        "num_pairs": int((whole.caption_to_image >= 0).sum()),
        "num_lonely_images": len(lonely_places(whole, "I")),
    }
    parts = [whole.select([1, 4]), whole.select([0]), whole.select([], lonely[:1])]
    parts.append(whole.select([2, 3, 5, 6], lonely[1:]))
    expected = every_loss(whole, whole)
    found = [every_loss(part, whole, **counts) for part in parts]
    for name, value in expected.items():
        total = sum(part[name].item() for part in found)
        assert total == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("side", ["image", "text"])
def test_one_side_alone_gives_finite_losses_and_gradients(side):
    whole = Batch.mixed(5)
    alone = whole.select([0, 2]) if side == "image" else whole.select([], lonely_places(whole, "T"))
    pairs_there = {"image": "II", "text": "TT"}[side]
    for losses in (
        contrast(alone, alone),
        contrast(alone, alone, targets="teacher"),
        hinge(alone, alone),
        hinge(alone, alone, margin_kind="teacher", hardest=False),
        feature_distillation(*alone.tensors()[:4]),
    ):
        assert all(value.item() == 0 for pair, value in losses.items() if pair != pairs_there)
        assert losses[pairs_there].item() > 0
        assert all(value.requires_grad for value in losses.values())
    # In a step that has rows of the other side too, the teacher's similarities to these are learned.
    losses = contrast(alone, whole)
    assert losses["IT" if side == "image" else "TI"].item() > 0


@pytest.mark.parametrize("pair", ["IT", "TI"])
def test_the_teacher_itself_has_the_least_cross_entropy(pair):
    batch, queue = Batch.mixed(3), Batch(103, num_images=12)
    perfect = batch.copy(student_image=batch.teacher_image, student_text=batch.teacher_text)
    inputs = perfect.tensors()
    settings = {"pairs": [pair], "targets": "teacher", "temperature": 0.1, **perfect.settings()}
    losses = contrastive_distillation(*inputs, dictionary=teacher_rows(queue), **settings)
    places = range(len(batch.student_image if pair == "IT" else batch.student_text))
    entropies = list(soft_terms(perfect, queue, pair, 0.1, places))
    assert losses[pair].item() == pytest.approx(np.mean(entropies), rel=1e-5)
    found = gradients(losses, inputs[:2])[0 if pair == "IT" else 1]
    assert found.abs().max() < 1e-5
    assert contrast(batch, queue, pairs=[pair], targets="teacher", temperature=0.1)[pair] > losses[pair] + 0.1


@pytest.mark.parametrize("targets", TARGETS)
def test_no_logits_are_kept_for_the_backward_pass(targets):
    batch, queue = Batch.mixed(3), Batch(103, num_images=400)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.shape) or kept, lambda kept: kept):
        contrast(batch, queue, targets=targets)
    columns = min(len(queue.student_image), len(queue.student_text))
    assert sizes and not any(columns in shape for shape in sizes if shape[-1:] != (6,) or len(shape) != 2)
