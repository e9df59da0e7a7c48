"""Splits by a hash: the same for an image whatever else there is, and none empty."""

from datasets_scripts.arrow_files import Row
from datasets_scripts.splits import assign_splits


def test_shares():
    rows = [Row(str(i), ["x"], bytes) for i in range(20_000)]
    parts = assign_splits({None: rows}, 0.1, 0.2)
    assert abs(len(parts["validation"]) - 2000) < 150 and abs(len(parts["test"]) - 4000) < 200
    assert sum(map(len, parts.values())) == 20_000
    # With a test split of its own, only validation is taken, and from training alone.
    parts = assign_splits({"train": rows[:10_000], "test": rows[10_000:]}, 0.1, 0.2)
    assert parts["test"] == rows[10_000:] and abs(len(parts["validation"]) - 1000) < 100
