"""The pictures of a report, the code on the card, and the card of a run that was pushed."""

import json
import re
import threading

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import make_rows
from huggingface_hub import hf_hub_download
from PIL import Image
from test_train import RECIPE

import inference.grid
import train
from rows.columns import rows_and_captions
from trainers.report import draw_grids, evenly, run_code, save_query, save_samples


def test_evenly():
    assert evenly("abcdef", 3) == ["b", "d", "f"] and evenly("ab", 3) == ["a", "b"] and evenly("", 3) == []
    assert evenly(range(1000), 2) == [250, 750]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """What a split of 40 images is drawn as: {file: (queries, rows of cells)}, its rows and embeddings."""
    rows = make_rows(40)
    generator = torch.Generator().manual_seed(0)
    groups, caption_to_image = rows_and_captions(rows)
    image = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    noise = torch.randn(len(caption_to_image), 6, generator=generator)
    text = torch.nn.functional.normalize(image[caption_to_image] + 0.4 * noise, dim=1)
    drawn = {}
    monkeypatch.setattr(
        inference.grid, "result_grid", lambda queries, cells, path: drawn.update({path.name: (queries, cells)})
    )
    draw_grids(rows, image, text, tmp_path)
    return drawn, rows, image, text


def test_grids_show_what_queries_find_and_what_they_miss(drawn):
    drawn, rows, image, text = drawn
    groups, caption_to_image = rows_and_captions(rows)
    captions = sum(rows["captions"], [])
    queries, cells = drawn["text_to_image.png"]
    assert len(queries) == 4 and [row[0].right for row in cells] == [True, True, False, False]
    for query, row in zip(queries, cells):
        asked = captions.index(query)
        scores = image @ text[asked]
        found = scores.sort(descending=True).indices[:5].tolist()
        assert [cell.note for cell in row] == [f"{scores[i]:.2f}" for i in found]
        assert [cell.right for cell in row] == [bool(groups[i] == groups[caption_to_image[asked]]) for i in found]
        for i, cell in zip(found, row):
            assert np.array_equal(np.asarray(cell.content), np.asarray(rows[i]["image"]))
    queries, cells = drawn["image_to_text.png"]
    assert [row[0].right for row in cells] == [True, True, False, False]
    pictures = [np.asarray(picture) for picture in rows["image"]]
    for query, row in zip(queries, cells):
        (asked,) = [i for i, picture in enumerate(pictures) if np.array_equal(np.asarray(query), picture)]
        scores = text @ image[asked]
        found = scores.sort(descending=True).indices[:5].tolist()
        assert [cell.content for cell in row] == [captions[i] for i in found]
        assert [cell.right for cell in row] == [bool(groups[caption_to_image[i]] == groups[asked]) for i in found]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_split_smaller_than_a_row_of_results_is_drawn(tmp_path, count):
    rows = make_rows(count)
    _, caption_to_image = rows_and_captions(rows)
    image = torch.nn.functional.normalize(torch.randn(count, 6), dim=1)
    draw_grids(rows, image, image[caption_to_image], tmp_path)
    assert Image.open(tmp_path / "text_to_image.png").width > 500
    assert len(save_query(rows, tmp_path)) == min(count, 3)


def test_samples_are_small_and_leave_out_what_cannot_be_read(tmp_path):
    rows = make_rows(9)
    pictures = [{"bytes": row["image"]["bytes"]} for row in rows.cast_column("image", datasets.Image(decode=False))]
    pictures[4] = {"bytes": b"no image"}
    rows = rows.remove_columns("image").add_column("image", pictures).cast_column("image", datasets.Image())
    captions = save_samples(rows, tmp_path)
    assert captions == [rows["captions"][1], rows["captions"][7]]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sample_2.png")), np.asarray(make_rows(9)[7]["image"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample_1.png", "sample_2.png"]


def test_code_that_fails_or_hangs_costs_only_its_output(caplog):
    assert run_code("print(1 + 1)\nprint('a')") == "2\na"
    assert run_code("print(1)\nraise OSError('no such model')") is None
    assert "no such model" in caplog.text
    release = threading.Event()
    train.release = release
    try:
        assert run_code("import train\ntrain.release.wait()", seconds=0.05) is None
    finally:
        release.set()
        del train.release
    assert "more than 0.05 seconds" in caplog.text


def test_the_card_of_a_pushed_run_names_the_weights_commit(tmp_path, hub):
    parts = {"train": make_rows(32), "validation": make_rows(8, seed=1), "test": make_rows(8, seed=2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    settings = {"dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "run"), "num_train_epochs": 1}
    settings |= {"push_to_hub": True, "hub_model_id": "user/student", "hub_strategy": "end", "report_to": "none"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **settings}))
    train.main(["--config", str(tmp_path / "recipe.yaml")])
    card = open(hf_hub_download("user/student", "README.md")).read()
    assert card == (tmp_path / "run" / "README.md").read_text()
    code, output = (re.search(rf"^```{of}\n(.*?)\n```$", card, re.S | re.M)[1] for of in ("python", "text"))
    (revision,) = set(re.findall(r'revision="(\w+)"', code))
    _, whole, card_alone = hub.commits("user/student")
    assert revision == whole.oid
    changed = {name for name, content in card_alone.files.items() if whole.files.get(name) != content}
    assert changed == {"README.md", "assets/card.json"}
    for name, content in card_alone.files.items():
        assert str(tmp_path).encode() not in content, name
    assert run_code(code) == output
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    pushed = json.loads(open(hf_hub_download("user/student", "all_results.json", revision=revision)).read())
    assert pushed == results
