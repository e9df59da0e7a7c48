"""Few of a dataset's pairs, and what of a teacher can be read out of frozen features of so few."""

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows

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


def whole(with_groups=False):
    parts = {split: make_rows(9, seed=seed) for seed, split in enumerate(("train", "validation", "test"))}
    return datasets.DatasetDict(
        {split: few_pairs.grouped(rows) if with_groups else rows for split, rows in parts.items()}
    )


def made(tmp_path, monkeypatch, rows, *options):
    monkeypatch.setattr(few_pairs, "load_data", lambda arguments: rows)
    output = tmp_path / "few"
    few_pairs.main(["--dataset_name", "icons", "--validation", "2", "--output_dir", str(output), *options])
    return datasets.load_from_disk(output)


def test_a_dataset_with_few_pairs(tmp_path, monkeypatch, capsys):
    rows = whole()
    few = made(tmp_path, monkeypatch, rows, "--pairs", "4")
    said = capsys.readouterr().out
    for split, count in {"train": 4, "validation": 2, "test": 9}.items():
        assert f"{split}: {count} rows, {sum(map(len, few[split]['captions']))} captions" in said
    assert "; of train 4 are pairs\n" in said
    assert few["test"]["image_id"][:] == rows["test"]["image_id"][:]
    assert few["train"]["image_id"][:] == few_pairs.few_of(rows["train"], 4)["image_id"][:]
    assert few["train"].features == rows["train"].features


def test_refused_counts_leave_nothing(tmp_path, monkeypatch):
    for options in (["--pairs", "10"], ["--pairs", "10", "--pool"], ["--pairs", "0"], ["--pairs", "-1", "--pool"]):
        with pytest.raises((SystemExit, ValueError)):
            made(tmp_path, monkeypatch, whole(), *options)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pairs", [0, 4])
@pytest.mark.parametrize("with_groups", [False, True])
def test_a_pool_has_every_image_and_text_once_and_knows_no_pair(tmp_path, monkeypatch, pairs, with_groups):
    rows = whole(with_groups)
    kept = set(few_pairs.few_of(rows["train"], pairs)["image_id"])
    others = [row for row in rows["train"] if row["image_id"] not in kept]
    train = made(tmp_path, monkeypatch, rows, "--pairs", str(pairs), "--pool")["train"]
    paired, images, texts = [], [], []
    for row in train:
        (texts if row["image"] is None else paired if row["captions"] else images).append(row)
    assert {row["image_id"] for row in paired} == kept
    before = {row["image_id"]: row for row in others}
    assert {row["image_id"] for row in images} == before.keys() and len(images) == len(others)
    for row in images:
        assert row["teacher_image_embeds"] == before[row["image_id"]]["teacher_image_embeds"]
        assert row["image"] == before[row["image_id"]]["image"] and row["teacher_text_embeds"] == []
        assert row["group_id"] == row["image_id"]
    features = {}
    for row in others:
        for caption, embeds in zip(row["captions"], row["teacher_text_embeds"]):
            features.setdefault(caption, embeds)
    assert {row["captions"][0]: row["teacher_text_embeds"][0] for row in texts} == features and len(texts) == len(
        features
    )
    names = {row["image_id"] for row in texts}
    assert len(names) == len(texts) and not names & set(rows["train"]["image_id"])
    assert all(row["teacher_image_embeds"] is None and row["group_id"] == row["image_id"] for row in texts)
    order = [row["image"] is None for row in train]
    assert order != sorted(order)


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
