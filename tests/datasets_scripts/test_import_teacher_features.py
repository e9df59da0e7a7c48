"""Features of the published scripts: keyed by row, or refused."""

import pickle

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows

from datasets_scripts import import_teacher_features as script
from rows.checks import check_dataset
from rows.teacher_columns import TEACHER_COLUMNS


@pytest.fixture
def made(tmp_path):
    """Rows of two splits, and their features as the published scripts save them."""
    parts = {"train": make_rows(9), "test": make_rows(4, seed=1)}
    options = [
        "--dataset_name",
        str(tmp_path / "data"),
        "--teacher_model_name_or_path",
        "BEiT-3",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    for split, part in parts.items():
        counts = [len(captions) for captions in part["captions"]]
        image = torch.tensor(part["teacher_image_embeds"]).repeat_interleave(torch.tensor(counts), dim=0)
        text = torch.cat([torch.tensor(rows) for rows in part["teacher_text_embeds"]])
        torch.save(image, tmp_path / f"{split}-image.pt")
        torch.save(text, tmp_path / f"{split}-text.pt")
        options += ["--features", split, str(tmp_path / f"{split}-image.pt"), str(tmp_path / f"{split}-text.pt")]
    plain = {split: part.remove_columns(TEACHER_COLUMNS) for split, part in parts.items()}
    datasets.DatasetDict(plain).save_to_disk(tmp_path / "data")
    return tmp_path, parts, options


def test_features_are_keyed(made):
    folder, parts, options = made
    script.main(options)
    out = datasets.load_from_disk(folder / "out")
    for split, part in parts.items():
        check_dataset(out[split], split, 16)
        for got, expected in zip(out[split], part):
            for name in ("image_id", "captions", *TEACHER_COLUMNS):
                assert got[name] == expected[name], name
    assert '"id": "BEiT-3"' in out["train"][0]["teacher"]


def refused(options, message):
    with pytest.raises(SystemExit, match=message):
        script.main(options)


def test_other_counts_and_orders_are_refused(made):
    folder, _, options = made
    image = torch.load(folder / "train-image.pt", weights_only=True)
    torch.save(image[:-1], folder / "train-image.pt")
    refused(options, "image features for the .* captions of the train split")
    torch.save(image.roll(1, dims=0), folder / "train-image.pt")
    refused(options, "train split, row .* not in the order")
    torch.save(image[:, :8], folder / "train-image.pt")
    refused(options, "8 wide, text features 16")
    part = datasets.load_from_disk(folder / "data")["train"]
    image[: len(part[0]["captions"])] = float("nan")
    torch.save(image, folder / "train-image.pt")
    refused(options, "1 image features are NaN")
    assert not (folder / "out").exists()


def test_half_precision_noise_among_an_images_rows_is_accepted(made):
    folder, parts, options = made
    image = torch.load(folder / "train-image.pt", weights_only=True)
    torch.save(image + 1e-3 * torch.randn_like(image), folder / "train-image.pt")
    script.main(options)
    got = datasets.load_from_disk(folder / "out")["train"]["teacher_image_embeds"][:]
    assert np.allclose(got, parts["train"]["teacher_image_embeds"][:], atol=1e-2)


class Mark:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_would_run_code_is_refused(made, capsys):
    folder, _, options = made
    for save in (lambda path: torch.save(Mark(), path), lambda path: path.write_bytes(pickle.dumps(Mark()))):
        save(folder / "train-image.pt")
        refused(options, "was not read")
        assert "this ran" not in capsys.readouterr().out
    torch.save({"features": torch.ones(2, 2)}, folder / "train-image.pt")
    refused(options, "holds dict")


def test_each_split_needs_its_features(made):
    _, _, options = made
    refused(options[:-4], "the dataset has train, test")
    refused([*options, *options[-4:]], "names train, test, test; the dataset has train, test. Give each once")


def test_a_row_without_captions_is_named(made):
    folder, _, options = made
    rows = datasets.load_from_disk(folder / "data")
    emptied = rows["train"].map(lambda row, i: {"captions": [] if i == 8 else row["captions"]}, with_indices=True)
    datasets.DatasetDict({"train": emptied, "test": rows["test"]}).save_to_disk(folder / "emptied")
    options[options.index("--dataset_name") + 1] = str(folder / "emptied")
    refused(options, "expected one string or more. Drop the row")
