"""The settings of a recipe and of the command line, as train.py reads them; the recipes that ship."""

import pytest
import yaml

import train
from trainers import RetrievalTrainingArguments


def write_recipe(folder, **settings):
    path = folder / "recipe.yaml"
    of_recipe = {"num_train_epochs": 2, "queue_size": 40, "output_dir": str(folder / "run"), "use_cpu": True}
    path.write_text(yaml.safe_dump({**of_recipe, **settings}))
    return ["--config", str(path)]


def refused(arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert str(stop.value).startswith("error: ")
    return str(stop.value)


def test_an_unknown_key_names_the_nearest(tmp_path):
    assert "learning_rate" in refused(write_recipe(tmp_path, learning_rat=1.0))


def test_a_missing_recipe_is_refused(tmp_path):
    assert "no such file" in refused(["--config", str(tmp_path / "none.yaml")])


def test_command_line_wins_over_the_recipe(tmp_path):
    _, _, args = train.parse_arguments([*write_recipe(tmp_path), "--learning_rate", "0.5", "--losses", "feature"])
    assert args.learning_rate == 0.5 and args.losses == ["feature"] and args.num_train_epochs == 2


def test_without_a_teacher_a_recipes_settings_of_the_distillation_are_passed_over(tmp_path, capsys):
    recipe = write_recipe(tmp_path, losses=["feature"])
    args = train.parse_arguments([*recipe, "--method", "contrastive", "--learning_rate", "0.5"])[2]
    assert type(args) is RetrievalTrainingArguments and args.learning_rate == 0.5
    assert capsys.readouterr().out.count("no teacher, and passes over the recipe's losses, queue_size") == 1
    assert "has no teacher: leave out --queue_size" in refused([*recipe, "--method=contrastive", "--queue_size", "8"])
    assert "has no teacher: leave out --losses" in refused([*recipe, "--method", "contrastive", "--losses=feature"])
    distilled = train.parse_arguments(recipe)[2]
    assert distilled.queue_size == 40 and distilled.losses == ["feature"] and not capsys.readouterr().out


@pytest.mark.parametrize("name", ["icons.yaml", "icons_teacher.yaml"])
def test_shipped_recipes_hold_known_settings(name):
    _, data, args = train.parse_arguments(["--config", f"recipes/{name}"])
    assert data.dataset_name == "icons" and args.load_best_model_at_end and args.metric_for_best_model == "rsum"


def test_teachers_of_the_command_line_take_the_place_of_the_recipes(tmp_path):
    of_recipe = {"teacher_model_name_or_path": ["a", "b"], "teacher_revision": ["1", "2"], "teacher_weights": [1, 2]}
    recipe = write_recipe(tmp_path, **of_recipe)

    def teachers(*more):
        args = train.parse_arguments([*recipe, *more])[1]
        return args.teachers, args.teacher_weights

    assert teachers() == ([("a", "1"), ("b", "2")], [1.0, 2.0])
    assert teachers("--teacher_weights", "3", "4") == ([("a", "1"), ("b", "2")], [3.0, 4.0])
    assert teachers("--teacher_model_name_or_path", "c") == ([("c", None)], None)
    again = ("--teacher_model_name_or_path", "c", "--teacher_model_name_or_path=d")
    assert teachers(*again) == teachers("--teacher_model_name_or_path", "c", "d") == ([("c", None), ("d", None)], None)
    for none in (["--teacher_model_name_or_path", "None"], ["--teacher_model_name_or_path=None"]):
        assert teachers(*none) == ([], None)


def test_none_unsets_what_a_recipe_sets(tmp_path):
    recipe = write_recipe(tmp_path, test_fold_size=4, captions_per_image=1)
    _, of_data, args = train.parse_arguments([*recipe, "--test_fold_size", "None", "--captions_per_image=None"])
    assert of_data.test_fold_size is None and args.captions_per_image is None
    assert "no_such" in refused([*recipe, "--no_such", "None"])


@pytest.mark.parametrize("name", ["flickr30k_beit3.yaml", "coco_beit3.yaml", "flickr30k_siglip2.yaml"])
def test_recipes_for_real_data_hold_known_settings(name):
    student, data, args = train.parse_arguments(["--config", f"recipes/{name}", "--use_cpu"])
    assert data.dataset_name.startswith("data/") and data.teacher_model_name_or_path
    assert student.vision_model_name_or_path and args.metric_for_best_model == "rsum"
    assert (data.test_fold_size == 1000) == ("coco" in name)


@pytest.mark.parametrize("name", ["own_data.yaml", "few_pairs.yaml"])
def test_the_recipe_for_own_data_needs_only_names(tmp_path, name):
    names = ["--dataset_name", "data/mine", "--output_dir", str(tmp_path)]
    student, data, args = train.parse_arguments(["--config", f"recipes/{name}", *names, "--use_cpu"])
    assert data.teacher_model_name_or_path and student.text_model_name_or_path and args.load_best_model_at_end
