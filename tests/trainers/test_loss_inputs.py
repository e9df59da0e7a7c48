"""What the losses take and refuse: types, pairs, shapes; nothing is read on the host."""

import dataclasses
from functools import partial

import pytest
import torch
from loss_references import Batch, contrast, gradients, hinge, teacher_rows
from torch._subclasses import FakeTensorMode

from trainers.loss_inputs import Partners
from trainers.losses import (
    PAIRS,
    OtherStudents,
    TeacherRows,
    contrastive_distillation,
    feature_distillation,
    hard_negative_distillation,
    similarity_distillation,
)


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
        nobody = inputs[5][:0]
        pairs = Partners.of(inputs[5], torch.arange(len(inputs[5])), nobody, nobody)  # a trainer has counted them
        texts["partners"] = pairs
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
