"""train.py with a teacher: features that it makes first, students cut from it, wider than it, or fed by a stream."""

import json

import datasets
import pytest
from conftest import DIM, make_rows, make_student
from test_train import RECIPE, refused, write_recipe

import train
from datasets_scripts import feature_job
from rows.teacher_columns import TEACHER_COLUMNS
from trainers.teacher_pca import load_pca


@pytest.fixture
def data(tmp_path):
    parts = {"train": make_rows(48), "validation": make_rows(12, seed=1), "test": make_rows(12, seed=2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def teacher(tmp_path):
    model, processor = make_student(text={**RECIPE["text_config"], "model_type": "distilbert"})
    model.save_pretrained(tmp_path / "tiny-teacher")
    processor.save_pretrained(tmp_path / "tiny-teacher")
    return tmp_path / "tiny-teacher"


def test_missing_features_are_made_once_and_the_student_may_be_narrower(tmp_path, data, teacher, monkeypatch, capsys):
    rows = datasets.load_from_disk(data)
    plain = datasets.DatasetDict({split: part.remove_columns(TEACHER_COLUMNS) for split, part in rows.items()})
    plain["train"].info.license = "cc0-1.0"
    plain.save_to_disk(tmp_path / "plain")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = {"dataset_name": str(tmp_path / "plain"), "teacher_model_name_or_path": str(teacher)}
    recipe = write_recipe(tmp_path, data, **settings, projection_dim=8, num_train_epochs=1, test_fold_size=4)
    train.main(recipe)
    run = tmp_path / "run"
    results = json.loads((run / "all_results.json").read_text())
    assert results["teacher_reduced_test_rsum"] > 0 and results["teacher_index_test_rsum"] > 0
    assert results["test_4_rsum"] > results["test_rsum"] and results["test_images"] == 12
    table = capsys.readouterr().out
    assert "rsum at the student's width" in table and "| 4 rsum" in table
    assert load_pca(run).shape == (DIM, 8)
    card = (run / "README.md").read_text()
    assert "tiny-teacher" in card and "Licence of the data: cc0-1.0." in card
    assert str(tmp_path) not in card
    monkeypatch.setattr("datasets_scripts.feature_job.load_teacher", None)  # a second run finds them
    train.main([*recipe, "--overwrite_output_dir", "True", "--data_license", "mine"])
    again = json.loads((run / "all_results.json").read_text())
    assert again["test_rsum"] == results["test_rsum"]
    assert "Licence of the data: mine." in (run / "README.md").read_text()


def test_a_student_cut_from_its_teacher(tmp_path, data, teacher, monkeypatch, capsys):
    rows = datasets.load_from_disk(data)
    plain = datasets.DatasetDict({split: part.remove_columns(TEACHER_COLUMNS) for split, part in rows.items()})
    plain.save_to_disk(tmp_path / "plain")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (teacher / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    settings = {"dataset_name": str(tmp_path / "plain"), "teacher_model_name_or_path": str(teacher)}
    settings |= {"vision_config": None, "text_config": None, "num_train_epochs": 1}
    settings |= dict.fromkeys(("vision_model_name_or_path", "text_model_name_or_path"), "teacher")
    recipe = write_recipe(tmp_path, data, **settings, text_layers=0, trim_vocabulary=280)
    with monkeypatch.context() as patch:  # what cannot be is said before the teacher runs
        patch.setattr("datasets_scripts.feature_job.load_teacher", None)
        assert "vision_layers=3: ViTConfig has 2 layers" in refused([*recipe, "--vision_layers", "3"])
        assert "the tokenizer has 261 special pieces" in refused([*recipe, "--trim_vocabulary", "9"])
    train.main([*recipe, "--vision_layers", "1"])
    run, printed = tmp_path / "run", capsys.readouterr().out
    parameters = json.loads((run / "all_results.json").read_text())["parameters"]
    assert f"| parameters              | {parameters / 1e6:.2f} M " in printed.split("| test split")[0]
    assert "word embeddings" in printed and "recipes/few_pairs.yaml" not in printed
    card = (run / "README.md").read_text()
    assert "cut from the teacher's, tiny-teacher: of its 2 layers it has 0 (counted from 0)." in card
    assert "cut from the teacher's, tiny-teacher: of its 1 layers it has none, the embeddings alone." in card
    assert "research or non-commercial use only" in card and "\nlicense: cc-by-nc-4.0\n" in card
    assert str(tmp_path) not in card
    config = json.loads((run / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 1 and config["text_config"]["n_layers"] == 0
    assert config["text_config"]["vocab_size"] >= 280


def test_only_another_teacher_on_the_command_line_is_refused(tmp_path, data, teacher):
    recipe = write_recipe(tmp_path, data, teacher_model_name_or_path=str(teacher))
    train.prepare(recipe)  # the recipe's is not used
    named = [*recipe, "--teacher_model_name_or_path", str(teacher)]
    assert "features of an unnamed teacher, not of tiny-teacher" in refused(named)
    train.prepare([*recipe, "--teacher_model_name_or_path", "None", "--output_dir", str(tmp_path / "other")])


def without_features(folder, data, **broken):
    """The rows of `data` without teacher features; of each split in `broken` the image of one row is no image."""
    parts = {split: part.remove_columns(TEACHER_COLUMNS) for split, part in datasets.load_from_disk(data).items()}
    for split, row in broken.items():
        features = datasets.Features({**parts[split].features, "image": datasets.Image(decode=False)})
        rows = [*parts[split].cast_column("image", datasets.Image(decode=False))]
        rows[row] = {**rows[row], "image": {"bytes": b"no image", "path": None}}
        parts[split] = datasets.Dataset.from_list(rows, features).cast_column("image", datasets.Image())
    datasets.DatasetDict(parts).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_caption_length": 4000}, "max_caption_length=4000: the text tower takes"),
        ({"vision_config": {"model_type": "vitt"}}, "vitt"),
        ({"text_config": None, "text_model_name_or_path": "no/such-tower"}, "no/such-tower"),
        ({"text_config": None}, "Which text tower"),
        (
            {"model_name_or_path": "saved", "text_config": None, "text_layers": 1},
            "takes a saved student as it is: leave out --text_layers",
        ),
    ],
)
def test_what_is_wrong_with_the_student_is_said_before_the_teacher_runs(
    tmp_path, data, teacher, monkeypatch, settings, message
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    calls, load = [], feature_job.load_teacher

    def counted(*args, **kwargs):
        calls.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(feature_job, "load_teacher", counted)
    plain = {"dataset_name": without_features(tmp_path / "plain", data), "teacher_model_name_or_path": str(teacher)}
    typed = [word for name, value in settings.items() if name == "text_layers" for word in (f"--{name}", str(value))]
    assert message in refused([*write_recipe(tmp_path, data, **plain, **settings), *typed])
    assert not calls
    few = {"validation": make_rows(12, seed=1).map(lambda row: {"captions": []})}
    parts = {**datasets.load_from_disk(plain["dataset_name"]), **few}
    parts["validation"] = parts["validation"].remove_columns(TEACHER_COLUMNS)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "few")
    of_few = write_recipe(tmp_path, data, **plain | {"dataset_name": str(tmp_path / "few")})
    assert "No row of the validation split is a pair, and it has 12 images and 0 different texts" in refused(of_few)
    assert not calls
    assert "such_a_key" in refused([*write_recipe(tmp_path, data, **plain), "--losses", "such_a_key"])
    assert not calls


def test_rows_that_a_teacher_cannot_read_are_left_out_where_one_says_so(tmp_path, data, teacher, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    plain = without_features(tmp_path / "plain", data, train=3, validation=0, test=11)
    settings = {"dataset_name": plain, "teacher_model_name_or_path": str(teacher), "num_train_epochs": 1}
    recipe = write_recipe(tmp_path, data, **settings)
    assert "train split, image_id '0/3': unreadable image" in (said := refused(recipe)) and "--skip_broken" in said
    assert "at most (--max_skipped)" in refused([*recipe, "--skip_broken", "--max_skipped", "0.01"])
    train.main([*recipe, "--skip_broken"])
    assert "3 rows are left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["test_images"] == 11
    # Features that are found in the cache were made without these rows: that is said each time, and refused likewise.
    assert "3 rows cannot be used" in (said := refused([*recipe, "--overwrite_output_dir"])) and "0/3" in said
    train.main([*recipe, "--skip_broken", "--overwrite_output_dir"])
    assert "3 rows are left out" in capsys.readouterr().out


def test_features_that_were_cached_by_the_earlier_name_are_found(tmp_path, data, teacher, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    plain = without_features(tmp_path / "plain", data)
    settings = {"dataset_name": plain, "teacher_model_name_or_path": str(teacher), "num_train_epochs": 1}
    recipe = write_recipe(tmp_path, data, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(feature_job, "teacher_fingerprint", feature_job.earlier_fingerprint)
        train.main(recipe)
    monkeypatch.setattr(feature_job, "load_teacher", None)
    train.main([*recipe, "--overwrite_output_dir"])
    assert len([path for path in (tmp_path / "cache" / "dsmd_teacher_features").iterdir() if path.is_dir()]) == 1


def test_a_student_wider_than_its_teacher_is_refused(tmp_path, data):
    said = refused(write_recipe(tmp_path, data, projection_dim=20))
    assert "projection_dim=20 is more than the 16" in said and "train with --projection_dim 16 or less" in said


def test_a_student_wider_than_its_teacher_is_refused_before_the_teachers_pass(tmp_path, data, teacher, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(feature_job, "make_teacher_features", lambda *_, **__: pytest.fail("the teacher runs"))
    plain = {"dataset_name": without_features(tmp_path / "plain", data), "teacher_model_name_or_path": str(teacher)}
    dim = feature_job.load_teacher(str(teacher)).dim
    said = refused(write_recipe(tmp_path, data, **plain, projection_dim=dim + 1))
    assert (
        f"projection_dim={dim + 1} is more than the {dim} of the" in said and f"--projection_dim {dim} or less" in said
    )


def test_a_student_wider_than_other_features_is_evaluated_as_the_refusal_says(tmp_path, data, capsys):
    train.main(write_recipe(tmp_path, data, num_train_epochs=1))
    rows = datasets.load_from_disk(data)
    narrow = {split: make_rows(len(part), seed=i, dim=8) for i, (split, part) in enumerate(rows.items())}
    datasets.DatasetDict(narrow).save_to_disk(tmp_path / "narrow")
    again = ["--dataset_name", str(tmp_path / "narrow"), "--do_train", "False", "--do_eval", "--use_cpu"]
    again += ["--model_name_or_path", str(tmp_path / "run"), "--report_to", "none"]
    assert "evaluate it by --method contrastive" in refused(again)
    train.main([*again, "--method", "contrastive"])
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert results["test_images"] == 12 and results["share_of_teacher"] > 0  # each at its own width
    assert "teacher_index_test_rsum" not in results


def parquet_folder(folder, rows, splits=("train", "validation", "test")):
    for split in splits:
        for i in range(2):
            path = folder / "data" / f"{split}-{i:05d}-of-00002.parquet"
            rows[split].shard(2, i, contiguous=True).to_parquet(path)
    return folder


def test_a_streamed_run(tmp_path, data):
    folder = parquet_folder(tmp_path / "parquet", datasets.load_from_disk(data))
    settings = {"dataset_name": str(folder), "streaming": True, "max_steps": 4, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "shuffle_buffer_size": 20}
    train.main(write_recipe(tmp_path, data, **settings))
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["test_images"] == 12 and results["teacher_test_rsum"] > 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "on `parquet`" in card and "| test       | 12 " in card and "| train " not in card
    recipe = write_recipe(tmp_path, data, **settings, projection_dim=8)
    assert "no teacher_pca.safetensors" in refused([*recipe, "--output_dir", str(tmp_path / "other")])


def test_a_stream_needs_max_steps_and_ready_features(tmp_path, data, teacher):
    folder = parquet_folder(tmp_path / "parquet", datasets.load_from_disk(data))
    settings = {"dataset_name": str(folder), "streaming": True}
    assert "max_steps" in refused(write_recipe(tmp_path, data, **settings))
    for path in folder.rglob("*.parquet"):
        datasets.Dataset.from_parquet(str(path)).remove_columns(TEACHER_COLUMNS).to_parquet(path)
    recipe = write_recipe(tmp_path, data, **settings, max_steps=2, teacher_model_name_or_path=str(teacher))
    assert "has no teacher features, which a stream needs beforehand" in refused(recipe)
