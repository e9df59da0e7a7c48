"""The flows of the documents end to end, by the commands as they are written there, on small data and tiny models."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from documents import commands, enter_place, run, save_models, write_photos, write_tars

from rows.teacher_columns import TEACHER_COLUMNS, teacher_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path, models, hub, monkeypatch):
    return enter_place(tmp_path, models, monkeypatch)


def results(run_name: str) -> dict:
    return json.loads((Path("runs") / run_name / "all_results.json").read_text())


BRING = ("datasets_scripts.own_data", "my_photos")
DISTIL = ("train.py --config recipes/own_data.yaml --dataset_name data/mine ", "runs/mine")
FEATURES = ("datasets_scripts.add_teacher_features", "data/mine_features")
OF_FEATURES = ("train.py", "--dataset_name data/mine_features")
STREAM = ("datasets_scripts.add_teacher_features", "--streaming")
OF_STREAM = ("train.py", "--streaming", "--validation_dataset_name")


def test_own_photos_as_few_as_twelve(place, capsys):
    write_photos(place / "my_photos", 12)
    run(commands(*BRING)[0])
    run(commands(*DISTIL)[0])
    assert results("mine")["teacher_test_rsum"] > 0
    printed = capsys.readouterr().out
    kept = re.search(r"The features are kept in (\S+), .* MB; `rm -r (\S+)` clears", printed)
    assert Path(kept[1]).parent == Path(kept[2]) == place / "cache" / "dsmd_teacher_features"
    images = [path for path in (place / "cache").rglob("*") if path.is_file() and b"\x89PNG" in path.read_bytes()]
    assert not images  # the dataset has them


def test_a_broken_file_in_each_split(place, capsys):
    for seed, split in enumerate(("train", "validation", "test")):
        folder = write_photos(place / "my_photos" / split, 8 if split == "train" else 4, seed)
        (folder / f"{seed}_001.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="3 images are missing or broken"):
        run(commands(*BRING)[0])
    run(commands(*BRING)[0], "--skip_broken")
    run(commands(*DISTIL)[0])
    assert results("mine")["test_images"] == 3 and results("mine")["eval_images"] == 3


def test_features_made_apart_are_used_whatever_teacher_the_recipe_names(place, models, capsys):
    write_photos(place / "my_photos", 24)
    run(commands(*BRING)[0])
    both = commands(*FEATURES)[0]
    one = [*both[: both.index("--teacher_model_name_or_path")], "--teacher_model_name_or_path", "data/beit3_base_coco"]
    run(one)
    run(commands(*OF_FEATURES)[0])
    printed = capsys.readouterr().out
    assert "data/mine_features has teacher features, of beit3_base_coco; the recipe's google/siglip2" in printed
    assert results("mine")["teacher_test_rsum"] > 0
    assert not (place / "cache" / "dsmd_teacher_features").exists()  # no teacher has run
    # Named on the command line, another teacher is refused; the way out that is named works: the line above.
    anew = ["--output_dir", "runs/anew", "--teacher_model_name_or_path"]
    with pytest.raises(SystemExit, match="leave --teacher_model_name_or_path out") as refusal:
        run(commands(*OF_FEATURES)[0], *anew, "google/siglip2-base-patch16-256")
    assert "of beit3_base_coco, not of google/siglip2-base-patch16-256" in str(refusal.value)
    run(commands(*OF_FEATURES)[0], *anew, "data/beit3_base_coco")
    assert results("anew")["teacher_test_rsum"] == results("mine")["teacher_test_rsum"]


def test_two_teachers_are_joined_apart_or_by_the_run(place, capsys):
    write_photos(place / "my_photos", 24)
    run(commands(*BRING)[0])
    run(commands(*FEATURES)[0])
    run(commands(*OF_FEATURES)[0])
    assert "of google/siglip2-base-patch16-256 + beit3_base_coco; the recipe's" in capsys.readouterr().out
    teachers = commands(*FEATURES)[0][-4:]
    assert teachers[::2] == ["--teacher_model_name_or_path"] * 2
    run(commands(*DISTIL)[0], *teachers, "--output_dir", "runs/at_once")
    apart, at_once = results("mine"), results("at_once")
    assert apart["teacher_test_rsum"] == at_once["teacher_test_rsum"] and apart["test_rsum"] == at_once["test_rsum"]


def test_imported_features(place, capsys):
    write_photos(place / "my_photos", 24)
    run(commands(*BRING)[0])
    options, generator = [], torch.Generator().manual_seed(0)
    for split, part in datasets.load_from_disk("data/mine").items():
        counts = torch.tensor([len(captions) for captions in part["captions"]])
        torch.save(torch.randn(len(part), 16, generator=generator).repeat_interleave(counts, dim=0), f"{split}_i.pt")
        torch.save(torch.randn(int(counts.sum()), 16, generator=generator), f"{split}_t.pt")
        options += ["--features", split, f"{split}_i.pt", f"{split}_t.pt"]
    imported = "python -m datasets_scripts.import_teacher_features --dataset_name data/mine --output_dir"
    run([*imported.split(), "data/mine_features", "--teacher_model_name_or_path", "my encoder", *options])
    run(commands(*OF_FEATURES)[0])
    assert "data/mine_features has teacher features, of my encoder; the recipe's" in capsys.readouterr().out
    run(commands(*OF_FEATURES)[0], "--teacher_model_name_or_path", "my encoder", "--output_dir", "runs/named")
    assert results("named")["test_rsum"] == results("mine")["test_rsum"]


def test_a_stream_with_a_validation_set_of_its_own(place, capsys):
    write_photos(place / "my_photos", 24)
    run(commands(*BRING)[0])
    run(commands(*FEATURES)[0])
    write_tars(place / "data" / "tars", write_photos(place / "more_photos", 12, seed=1))
    run(commands(*STREAM)[0])
    few = ["--max_steps", "2", "--eval_steps", "1", "--save_steps", "1"]
    run(commands(*OF_STREAM)[0], *few)
    printed = capsys.readouterr().out
    assert "those of the validation split are of google/siglip2-base-patch16-256 + beit3_base_coco and not" in printed
    validated = datasets.load_from_disk("data/mine")
    found = results("stream")
    assert [found["eval_images"], found["test_images"]] == [len(validated[split]) for split in ("validation", "test")]
    assert "teacher_test_rsum" not in found  # of another teacher
    # Without one, the last of its files is held out.
    words = commands(*OF_STREAM)[0]
    place_of_it = words.index("--validation_dataset_name")
    run([*words[:place_of_it], *words[place_of_it + 2 :]], *few, "--output_dir", "runs/held_out")
    found = results("held_out")
    assert found["eval_images"] == found["test_images"] == 2 and found["teacher_test_rsum"] > 0
    assert "the last of its 3 files is held out" in capsys.readouterr().out


def test_features_found_in_the_cache_of_an_earlier_release_are_those_of_today(place, monkeypatch):
    """It kept whole rows, images and all, under the same name."""
    from datasets_scripts import feature_job
    from datasets_scripts.data_loading import DataArguments, load_data
    from trainers.run.run_identity import rows_fingerprint

    write_photos(place / "my_photos", 24)
    run(commands(*BRING)[0])
    args = DataArguments(dataset_name="data/mine", teacher_model_name_or_path=["data/beit3_base_coco"])
    made = feature_job.make_teacher_features
    with monkeypatch.context() as patch:
        patch.setattr(feature_job, "make_teacher_features", lambda *a, **k: made(*a, **{**k, "columns_only": False}))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "earlier")
        earlier = load_data(args)
        assert list((place / "earlier" / "dsmd_teacher_features").glob("*/data/*.parquet"))
        patch.setattr(feature_job, "load_teacher", None)
        assert rows_fingerprint(load_data(args)["train"]) == rows_fingerprint(earlier["train"])
    today = load_data(args)
    for split, part in earlier.items():
        assert rows_fingerprint(today[split]) == rows_fingerprint(part)  # a checkpoint of then can be gone on from
        assert today[split].features == part.features and set(TEACHER_COLUMNS) <= set(part.column_names)
        for one, other in zip(teacher_rows(today[split]), teacher_rows(part)):
            assert torch.equal(one, other)
