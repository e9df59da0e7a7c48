"""Whole runs without a pair: train.py from images without captions and texts without images, chosen by agreement."""

import json

import datasets
import pytest
from conftest import make_rows
from mixed_rows import without_partners
from tiny_runs import SETTINGS, VISION, arguments

import train
from model_cards.tables import results_table
from modeling_dsmd import DSMDModel


def apart(count, seed):
    """The images and the texts of so many rows, as rows of their own."""
    rows = make_rows(count, seed)
    images = without_partners(rows, lambda i: True, lambda i: False)
    texts = without_partners(rows, lambda i: False, lambda i: True)
    texts = texts.map(lambda row: {"image_id": f"text {row['image_id']}", "group_id": f"text {row['group_id']}"})
    return datasets.concatenate_datasets([images, texts.cast(images.features)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_pairs")
    parts = {"train": apart(16, 0), "validation": apart(24, 1), "test": apart(20, 2)}
    teacher = json.dumps({"id": "tiny", "revision": "1", "dim": 16})
    for split, part in parts.items():
        parts[split] = part.add_column("teacher", [teacher] * len(part))
    datasets.DatasetDict(parts).save_to_disk(folder / "mapped")
    return folder


SETTINGS_OF_RUN = {
    "vision_config": json.dumps(VISION["vit"]),
    "per_device_train_batch_size": 8,
    "max_steps": 6,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
}


def test_a_run_without_a_pair(tmp_path, data, capsys):
    train.main(arguments(tmp_path / "run", data, SETTINGS_OF_RUN))
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["test_images"] == 20 and results["test_captions"] >= 20
    assert not any("rsum" in name or "_r1" in name for name in results)
    assert 0 <= results["test_agreement"] <= 100 and results["test_agreement_by_chance"] == pytest.approx(10, abs=3)
    assert "agreement with the teacher" in said and "agreement by chance" in said
    states = [
        json.loads((path / "trainer_state.json").read_text()) for path in (tmp_path / "run").glob("checkpoint-*")
    ]
    last = max(states, key=lambda state: state["global_step"])
    evaluated = {entry["step"]: entry["eval_agreement"] for entry in last["log_history"] if "eval_agreement" in entry}
    assert last["best_metric"] == max(evaluated.values()) == evaluated[last["best_global_step"]]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Agreement with the teacher is the share" in card and "rsum is the sum" not in card
    assert "has no pairs: nobody has measured" in card
    DSMDModel.from_pretrained(tmp_path / "run")


def test_an_evaluation_without_a_pair(tmp_path, data, capsys):
    train.main(arguments(tmp_path / "run", data, {**SETTINGS_OF_RUN, "max_steps": 1, "eval_strategy": "no"} | NO_BEST))
    capsys.readouterr()
    again = {"do_train": False, "model_name_or_path": tmp_path / "run", "dataset_name": data / "mapped"}
    again |= {"output_dir": tmp_path / "again", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    again |= {"max_caption_length": SETTINGS["max_caption_length"]}
    train.main([part for name, value in again.items() for part in (f"--{name}", str(value))])
    results, other = (
        json.loads((tmp_path / folder / name).read_text())
        for folder, name in (("run", "all_results.json"), ("again", "eval_results.json"))
    )
    assert other["test_agreement"] == results["test_agreement"]


NO_BEST = {"load_best_model_at_end": False, "save_strategy": "no"}


def test_where_there_are_pairs_too_recall_is_of_these_and_agreement_of_all(tmp_path, data):
    mixed = datasets.load_from_disk(data / "mapped")
    pairs = make_rows(24, seed=1).add_column("teacher", [mixed["test"][0]["teacher"]] * 24)
    mixed["validation"] = datasets.concatenate_datasets([mixed["test"], pairs.cast(mixed["test"].features)])
    mixed.save_to_disk(tmp_path / "data" / "mapped")
    train.main(arguments(tmp_path / "run", tmp_path / "data", {**SETTINGS_OF_RUN, "max_steps": 2}))
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_images"] == 44 and "test_rsum" not in results
    assert results["eval_pairs"] == 24 and "| recall is of pairs " in results_table(results, "eval")
    mixed["validation"] = pairs.cast(mixed["test"].features)
    mixed.save_to_disk(tmp_path / "pairs" / "mapped")
    same = {**SETTINGS_OF_RUN, "max_steps": 2, "model_name_or_path": tmp_path / "run", "do_train": False}
    kept = ("per_device_train_batch_size", "model_name_or_path", "do_train")
    options = arguments(tmp_path / "again", tmp_path / "pairs", {name: same[name] for name in kept})
    options = [part for name, value in zip(options[::2], options[1::2]) for part in (name, value) if keeps(name)]
    train.main(options)
    alone = json.loads((tmp_path / "again" / "eval_results.json").read_text())
    assert alone["eval_rsum"] == results["eval_rsum"] and alone["teacher_eval_rsum"] == results["teacher_eval_rsum"]
    assert alone["eval_agreement"] != results["eval_agreement"]
    assert "eval_pairs" not in alone


def test_few_pairs_among_others_do_not_choose_the_checkpoint(tmp_path, data, caplog):
    """Recall over three pairs is 100 for nearly any student."""
    mixed = datasets.load_from_disk(data / "mapped")
    lonely, few = mixed["test"], make_rows(3, seed=1).add_column("teacher", [mixed["test"][0]["teacher"]] * 3)
    mixed["validation"] = datasets.concatenate_datasets([lonely, few.cast(lonely.features)])
    mixed.save_to_disk(tmp_path / "few" / "mapped")
    train.main(arguments(tmp_path / "run", tmp_path / "few", {**SETTINGS_OF_RUN, "max_steps": 2}))
    settings = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert settings["metric_for_best_model"] == "agreement"
    assert "has 3 pairs of an image and a caption, fewer than 20" in caplog.text
    part = lonely.select([*range(10), *range(20, 23)])
    mixed["validation"] = datasets.concatenate_datasets([part, few.cast(part.features)])
    mixed.save_to_disk(tmp_path / "fewer" / "mapped")
    train.main(arguments(tmp_path / "again", tmp_path / "fewer", {**SETTINGS_OF_RUN, "max_steps": 1}))
    assert json.loads((tmp_path / "again" / "training_args.json").read_text())["metric_for_best_model"] == "rsum"
    assert "Recall over the 3 pairs of the validation split says little, and it has" in caplog.text


def keeps(name: str) -> bool:
    return name not in ("--text_config", "--image_size", "--vocab_size")


def test_too_few_candidates_and_no_teacher_are_refused_before_training(tmp_path, data):
    few = datasets.load_from_disk(data / "mapped")
    few["validation"] = few["validation"].select([*range(19), *range(24, 30)])
    few.save_to_disk(tmp_path / "few" / "mapped")
    with pytest.raises(SystemExit, match="No row of the validation split is a pair, and it has 19 images"):
        train.main(arguments(tmp_path / "run", tmp_path / "few", SETTINGS_OF_RUN))
    without = datasets.load_from_disk(data / "mapped")
    names = ["teacher", "teacher_image_embeds", "teacher_text_embeds"]
    without["validation"] = without["validation"].remove_columns(names)
    without.save_to_disk(tmp_path / "without" / "mapped")
    with pytest.raises(SystemExit, match="no teacher features to compare with"):
        train.main(arguments(tmp_path / "run", tmp_path / "without", SETTINGS_OF_RUN))
