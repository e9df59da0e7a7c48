"""Whose projection brings a teacher's features to a student's width."""

import datasets
import pytest
import torch
from conftest import DIM, make_rows

from datasets_scripts.data_loading import DataArguments
from datasets_scripts.projection import teacher_projection
from trainers.teacher_pca import save_pca


def test_a_projection_that_cannot_be_names_the_way_out(tmp_path):
    rows = datasets.DatasetDict({"test": make_rows(6)})
    args = DataArguments(dataset_name=str(tmp_path))
    assert teacher_projection(rows, args, DIM, None) is None
    with pytest.raises(ValueError, match="a teacher_pca.safetensors to project with: .* --method contrastive"):
        teacher_projection(rows, args, DIM - 1, str(tmp_path))


def test_a_student_of_a_wider_teacher_learns_from_one_of_its_own_width_without_a_projection(tmp_path):
    """The matrix that it brings is of its earlier teacher's features: [24, 16], where these have width 16."""
    rows = datasets.DatasetDict({"train": make_rows(6)})
    args = DataArguments(dataset_name="rows")
    save_pca(torch.eye(DIM + 8)[:, :DIM], tmp_path)
    assert teacher_projection(rows, args, DIM, str(tmp_path)) is None
    rotation = torch.eye(DIM).flip(0)
    save_pca(rotation, tmp_path)
    assert torch.equal(teacher_projection(rows, args, DIM, str(tmp_path)), rotation)
    wide = datasets.DatasetDict({"train": make_rows(6, dim=DIM + 4)})
    save_pca(torch.eye(DIM + 8)[:, :DIM], tmp_path)
    with pytest.raises(ValueError, match=r"is \[24, 16\], expected \[20, 16 or more\]: it is of another teacher's"):
        teacher_projection(wide, args, DIM, str(tmp_path))
