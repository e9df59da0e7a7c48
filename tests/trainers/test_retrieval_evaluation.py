"""Embeddings of a split where memory is short."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import make_trainer


@pytest.mark.parametrize("fits", [1, 3, 7])
def test_an_evaluation_that_does_not_fit_is_made_in_smaller_parts(tmp_path, validation_rows, fits):
    trainer = make_trainer(tmp_path, None, per_device_eval_batch_size=8)
    expected = trainer.encode(validation_rows)
    sizes = hold_at_most(trainer.model, fits)
    found = trainer.encode(validation_rows)
    assert max(sizes) == 8 and 1 <= min(sizes) <= fits
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_single_row_that_does_not_fit_is_an_error_that_says_what_to_do(tmp_path, validation_rows):
    trainer = make_trainer(tmp_path, None)
    hold_at_most(trainer.model, 0)
    with pytest.raises(RuntimeError, match="evaluation of 1 rows: lower --per_device_eval_batch_size"):
        trainer.encode(validation_rows)


def test_a_sharded_model_is_not_evaluated_in_parts(tmp_path, validation_rows):
    trainer = make_trainer(tmp_path, None, per_device_eval_batch_size=8)
    sizes = hold_at_most(trainer.model, 4)
    trainer.is_fsdp_enabled = True
    with pytest.raises(RuntimeError, match="evaluation of 8 rows: lower --per_device_eval_batch_size"):
        trainer.encode(validation_rows)
    assert sizes == [8]


def hold_at_most(model, rows: int) -> list[int]:
    """Lets the model's forward run out of memory above so many rows; the list gets each batch's size."""
    sizes = []

    def check(module, args, kwargs):
        sizes.append(len(next(iter(kwargs.values()))))
        if sizes[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return sizes
