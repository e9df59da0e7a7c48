"""Few of a dataset's pairs, and what of a teacher can be read out of frozen features of so few."""

import datasets
import numpy as np
import pytest
import torch

from benchmarks import few_pairs
from benchmarks.few_pairs_probe import ridge


def rows_of(names):
    return datasets.Dataset.from_dict({"image_id": list(names)})


def test_the_kept_rows_do_not_depend_on_their_order_and_the_fewer_are_among_the_more():
    names = [f"row {i}" for i in range(50)]
    few, more = (few_pairs.few_of(rows_of(names), count)["image_id"][:] for count in (5, 20))
    assert len(set(few)) == 5 and more[:5] == few
    assert few_pairs.few_of(rows_of(reversed(names)), 5)["image_id"][:] == few
    assert few != names[:5]


def test_more_rows_than_there_are_is_refused():
    with pytest.raises(ValueError, match="60 images are asked for, and there are 50"):
        few_pairs.few_of(rows_of(map(str, range(50))), 60)


def test_a_dataset_with_few_pairs(tmp_path, monkeypatch, capsys):
    def part(name):
        ids = [f"{name} {i}" for i in range(9)]
        return datasets.Dataset.from_dict({"image_id": ids, "captions": [["a", "b"]] * 9})

    whole = datasets.DatasetDict({split: part(split) for split in ("train", "validation", "test")})
    monkeypatch.setattr(few_pairs, "load_data", lambda arguments: whole)
    command = ["--dataset_name", "icons", "--pairs", "4", "--validation", "2", "--output_dir", str(tmp_path / "few")]
    few_pairs.main(command)
    assert "train: 4 images, 8 captions, validation: 2 images, 4 captions, test: 9 images" in capsys.readouterr().out
    few = datasets.load_from_disk(tmp_path / "few")
    assert few["test"]["image_id"][:] == whole["test"]["image_id"][:]
    assert set(few["train"]["image_id"]) < set(whole["train"]["image_id"])
    for wrong in (command, [*command[:-1], str(tmp_path / "other"), "--pairs", "10"]):
        with pytest.raises(SystemExit):
            few_pairs.main(wrong)
    assert not (tmp_path / "other").exists()


def test_ridge_is_the_regression_of_the_normal_equations():
    generator = np.random.default_rng(0)
    shapes = ((40, 6), (40, 3), (5, 6))
    inputs, targets, new = (generator.normal(2, 3, shape) for shape in shapes)
    mean, deviation = inputs.mean(0), inputs.std(0, ddof=1)
    known = (inputs - mean) / deviation
    weights = np.linalg.inv(known.T @ known + 0.1 * 6 * np.eye(6)) @ known.T @ (targets - targets.mean(0))
    expected = (new - mean) / deviation @ weights + targets.mean(0)
    found = ridge(torch.tensor(inputs), torch.tensor(targets), 0.1)(torch.tensor(new))
    assert np.allclose(found.numpy(), expected, atol=1e-5)
