"""The teacher's columns, read and made."""

from __future__ import annotations

import pytest
import torch

from rows.teacher_columns import quantize


def test_quantize_by_hand():
    values, scale = quantize(torch.tensor([[1.27, -0.635, 0.01], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[127, -64, 1], [0, 0, 0]] or values.tolist() == [[127, -63, 1], [0, 0, 0]]
    assert scale[0].item() == pytest.approx(0.01, rel=1e-3)
