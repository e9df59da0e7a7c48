"""A lock of a folder: of two that want it one has it."""

import os
import threading

import pytest

from trainers.run.locking import alone


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    lock, held = tmp_path / ".lock", []
    with alone(tmp_path, lock):
        with pytest.raises(ValueError, match="Another process is at work on"), alone(tmp_path, lock):
            pytest.fail("entered twice")
        waiting = threading.Thread(target=lambda: held.extend(_holds(tmp_path, lock)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not held
    waiting.join(60)
    assert held == [True] and os.listdir(tmp_path) == []


def _holds(folder, lock) -> list[bool]:
    with alone(folder, lock, wait=True):
        return [lock.exists()]
