"""What a run reads besides its rows."""

from __future__ import annotations

import pytest

from datasets_scripts.data_loading import read_baseline


def test_a_baseline_that_is_none_is_refused(tmp_path):
    assert read_baseline(None, 3) is None
    path = tmp_path / "all_results.json"
    with pytest.raises(ValueError, match="cannot be read"):
        read_baseline(path, 3)
    path.write_text('{"eval_rsum": 1.0}')
    with pytest.raises(ValueError, match="no test_rsum"):
        read_baseline(path, 3)
    path.write_text('{"test_rsum": 1.0, "test_images": 4}')
    with pytest.raises(ValueError, match="of 4 test images, and this run has 3"):
        read_baseline(path, 3)
    assert read_baseline(path, 4)["test_rsum"] == 1.0
