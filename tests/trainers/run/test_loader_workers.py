"""Loader workers that die, and errors that are not their death."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from tiny_trainer import make_trainer

from trainers.run.loader_workers import name_killed_workers


class Unreachable(torch.utils.data.Dataset):
    """A row of it is on a machine that hangs up."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ConnectionResetError("of a row")


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(error):
    """torch looks whether it lives at once, and where it still does passes on what the broken connection says."""
    batches = iter(torch.utils.data.DataLoader(range(4), num_workers=1))
    batches._data_queue.get = Mock(side_effect=error)
    with pytest.raises(RuntimeError, match="A worker of the data loader was killed"), name_killed_workers():
        next(batches)


def test_a_connection_that_breaks_elsewhere_is_no_worker():
    with pytest.raises(ConnectionResetError), name_killed_workers():
        raise ConnectionResetError
    with pytest.raises(ConnectionResetError, match="of a row"), name_killed_workers():
        next(iter(torch.utils.data.DataLoader(Unreachable(), num_workers=1)))


def test_an_error_in_a_loader_worker_is_not_taken_for_its_death(tmp_path, rows):
    def fail(examples):
        raise RuntimeError("of its own")

    trainer = make_trainer(tmp_path, rows, dataloader_num_workers=1)
    trainer.data_collator = fail
    with pytest.raises(RuntimeError, match="of its own"):
        trainer.train()
