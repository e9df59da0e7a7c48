"""Which rows have a partner: found, given, or missing."""

import pytest
import torch
from loss_references import Batch, contrast, teacher_rows

from trainers.losses import Partners, contrastive_distillation, hard_negative_distillation


def test_partners_that_are_given_are_those_that_are_found():
    caption_to_image = torch.tensor([2, -1, 0, 2, -1])
    found = Partners.found(caption_to_image, images=4)
    given = Partners.of(caption_to_image, torch.tensor([0, 2, 3]), torch.tensor([1, 4]), torch.tensor([1, 3]))
    for own, other in zip(found, given):
        assert torch.equal(torch.as_tensor(own), torch.as_tensor(other))
    assert given.image_of_pair.tolist() == [2, 0, 2] and not given.all_captions


def test_a_text_without_image_needs_its_group():
    batch = Batch.mixed(3)
    inputs = batch.tensors()
    partners = Partners.found(inputs[5], len(inputs[0]))
    for loss in (contrastive_distillation, hard_negative_distillation):
        columns = {"dictionary": teacher_rows(batch)} if loss is contrastive_distillation else {}
        with pytest.raises(ValueError, match="text_groups is missing: a caption without an image needs its group"):
            loss(*inputs, partners=partners, **columns)
        with pytest.raises(ValueError, match=r"text_groups is missing: .* \(caption_to_image -1\) needs its group"):
            loss(*inputs, **columns)
    with pytest.raises(ValueError, match="targets is 'soft'"):
        contrast(batch, batch, targets="soft")
