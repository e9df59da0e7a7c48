"""The dataset with features, as it is read again: its card, figures, projection and int8."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import DIM, make_rows, with_names
from tiny_features import add, arguments, contents
from torch.nn.functional import cosine_similarity, normalize

from datasets_scripts import add_teacher_features as script
from datasets_scripts.feature_shards import shard_file
from datasets_scripts.teacher_dataset import evaluate_teacher, figures_table
from rows.checks import check_dataset
from rows.columns import rows_and_captions
from rows.teacher_columns import TEACHER_COLUMNS, teacher_features, teacher_rows
from teachers import load_teacher
from trainers import retrieval_metrics
from trainers.batches import RetrievalDataset
from trainers.teacher_pca import load_pca


def test_what_the_folder_says_of_itself(output, teacher_folder):
    card = (output / "README.md").read_text()
    assert "teacher-features" in yaml.safe_load(card.split("---")[1])["tags"]
    assert "| train | 23 |" in card and str(teacher_folder.parent) not in card
    rows = datasets.load_dataset(str(output))
    described = json.loads(rows["train"][0]["teacher"])
    assert described["id"] == "tiny" and described["dim"] == 16 and described["revision"] is None
    assert {part["teacher"] for split in rows.values() for part in split} == {rows["train"][0]["teacher"]}
    assert not (output / "settings.json").exists() and not list(output.rglob("*.part"))
    for name, content in contents(output).items():
        assert str(teacher_folder.parent).encode() not in content, name
    image, text = teacher_rows(rows["test"])
    groups, caption_to_image = rows_and_captions(rows["test"])
    assert f"| test | 12 | {retrieval_metrics(image, text, groups, groups[caption_to_image])['rsum']:.2f} |" in card


def test_the_teachers_own_figures_count_equal_captions(tmp_path):
    parts = {"test": with_names(make_rows(20), every=1), "train": make_rows(6)}
    figures = {}
    for split, rows in parts.items():
        rows.to_parquet(shard_file(tmp_path, split, 0))
        figures[split] = evaluate_teacher(tmp_path, split, [0], None, DIM, False)
    groups, owner = rows_and_captions(parts["test"])
    names = [caption for own in parts["test"]["captions"] for caption in own]
    embeds = *teacher_rows(parts["test"]), groups, groups[owner]
    by_text, by_index = (retrieval_metrics(*embeds, text_ids=ids)["rsum"] for ids in (names, None))
    assert figures["test"] == {"images": 20, "rsum": by_text, "rsum_by_index": by_index} and by_text > by_index
    assert figures["train"].keys() == {"images", "rsum"}
    table = figures_table(figures)
    assert f"| test | 20 | {by_text:.2f} | {by_index:.2f} |" in table
    assert f"| train | 6 | {figures['train']['rsum']:.2f} |  |" in table and "| by index |" in table


def test_streamed_output_has_the_same_rows(output):
    rows = datasets.load_dataset(str(output))["train"].cast_column("image", datasets.Image(decode=False))
    stream = datasets.load_dataset(str(output), streaming=True)["train"]
    assert list(stream.cast_column("image", datasets.Image(decode=False))) == list(rows)


def test_int8_is_close_is_read_as_float_and_its_cost_is_shown(source, output, teacher_folder, tmp_path, capsys):
    script.main(arguments(source, teacher_folder, tmp_path / "int8", "--int8"))
    assert "before int8" in capsys.readouterr().out
    rows, exact = datasets.load_dataset(str(tmp_path / "int8")), datasets.load_dataset(str(output))
    assert rows["train"].features["teacher_image_embeds"].feature == datasets.Value("int8")
    assert not (tmp_path / "int8" / "exact").exists()
    for split in rows:
        check_dataset(rows[split], split, 16)
        for got, expected in zip(teacher_rows(rows[split]), teacher_rows(exact[split])):
            assert not torch.equal(got, expected)
            assert (cosine_similarity(got, expected) > 0.9999).all()
            assert (got - expected).abs().max() <= expected.abs().max() / 127
    examples = RetrievalDataset(rows["train"], with_teacher=True).__getitems__([3, 1])
    image, text = teacher_rows(rows["train"].select([3, 1]))
    assert np.array_equal(np.stack([example["teacher_image"] for example in examples]), image.numpy())
    assert np.array_equal(np.concatenate([example["teacher_text"] for example in examples]), text.numpy())
    assert (tmp_path / "int8" / "README.md").read_text().count("before int8") == 1


def test_the_projection_is_fitted_on_the_training_features(output):
    components = load_pca(output)
    image, text = teacher_rows(datasets.load_dataset(str(output))["train"])
    rows = np.concatenate(
        [normalize(part, dim=1).double().numpy() / len(part) ** 0.5 for part in (image, text)]
    )  # each modality counts the same
    _, _, expected = np.linalg.svd(rows)
    for k in (1, 4, 9):
        ours = components[:, :k].double().numpy()
        assert np.allclose(ours @ ours.T, expected[:k].T @ expected[:k], atol=1e-5)


def test_teacher_features_reads_what_was_stored():
    with pytest.raises(ValueError, match="no teacher_image_scale"):
        teacher_features(
            datasets.Dataset.from_dict(
                {"teacher_image_embeds": [[1, 2]]},
                features=datasets.Features({"teacher_image_embeds": datasets.List(datasets.Value("int8"), length=2)}),
            ).with_format("arrow")[:],
            "teacher_image_embeds",
        )


def test_folders_of_one_name_are_not_taken_for_each_other(teacher_folder, tmp_path):
    """`datasets` caches a local folder by its name alone where its card names the data files: ours must not."""
    for place, count in (("a", 3), ("b", 5)):
        (tmp_path / place).mkdir()
        rows = datasets.DatasetDict({"dev": make_rows(count).remove_columns(TEACHER_COLUMNS)})
        add(rows, [load_teacher(str(teacher_folder))], tmp_path / place / "same")
        loaded = datasets.load_dataset(str(tmp_path / place / "same"))
        assert {split: len(part) for split, part in loaded.items()} == {"dev": count}
