"""Whose projection brings a teacher's features to a student's width."""

import datasets
import pytest
from conftest import DIM, make_rows

from datasets_scripts.data_loading import DataArguments
from datasets_scripts.projection import teacher_projection


def test_a_projection_that_cannot_be_names_the_way_out(tmp_path):
    rows = datasets.DatasetDict({"test": make_rows(6)})
    args = DataArguments(dataset_name=str(tmp_path))
    assert teacher_projection(rows, args, DIM, None) is None
    with pytest.raises(ValueError, match="a teacher_pca.safetensors to project with: .* --method contrastive"):
        teacher_projection(rows, args, DIM - 1, str(tmp_path))
