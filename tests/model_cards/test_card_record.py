"""A card made again from its record, with other facts in it; the example that is kept."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from card_checks import FINISHED, RECALLS, assert_well_formed, blocks, front_matter, indexed, sections, table
from huggingface_hub import ModelCard

from model_cards import RunRecord, render_card
from model_cards.example import EXAMPLE


@pytest.fixture
def record(distilled):
    return RunRecord.from_json((distilled / "assets" / "card.json").read_text())


def test_the_record_makes_the_same_card(record, distilled):
    assert render_card(record) == (distilled / "README.md").read_text()


def test_hub_ids_and_a_pinned_revision(record):
    facts = {
        "dataset_name": "user/data",
        "towers": ["facebook/dinov2-small", "bert-base-uncased"],
        "repo_id": "user/s",
        "revision": "c0de",
    }
    facts = dataclasses.replace(record.facts, **facts)
    card = render_card(dataclasses.replace(record, facts=facts, name="user/s"))
    front = front_matter(card)
    assert front["datasets"] == ["user/data"] and front["base_model"] == ["facebook/dinov2-small", "bert-base-uncased"]
    assert front["base_model_relation"] == "finetune"
    assert {result["dataset"]["type"] for result in front["model-index"][0]["results"]} == {"user/data"}
    assert front["model-index"][0]["name"] == "s" and card.split("---\n", 2)[2].startswith("\n# s\n")
    (code,) = blocks(card, "python")
    assert 'repo = "user/s"\nrevision = "c0de"\n' in code and code.count("revision=revision") == 3


@pytest.mark.parametrize("name", ["icons", "data", "/data/mine", "a/b/c", "a b/c", "../mine", "~/mine", ""])
def test_a_name_that_is_no_id_of_the_hub_is_on_no_list_of_it(record, name):
    card = render_card(dataclasses.replace(record, facts=dataclasses.replace(record.facts, dataset_name=name)))
    assert not {"datasets", "model-index", "metrics"} & set(front_matter(card))
    ModelCard(card, ignore_metadata_errors=False)  # as the Hub's client reads it


@pytest.mark.parametrize("teacher", [None, {"id": "user/teacher"}])
def test_a_student_without_a_licence_names_those_that_it_is_under(record, teacher):
    licences = {"license": None, "data_license": "cc-by-4.0", "teacher_license": "apache-2.0", "teacher": teacher}
    card = render_card(dataclasses.replace(record, facts=dataclasses.replace(record.facts, **licences)))
    front = front_matter(card)
    assert (front["license"], front["license_name"]) == ("other", "of-data-and-teacher" if teacher else "of-data")
    whose = ", that of its teacher apache-2.0" if teacher else ""
    assert f"No licence was chosen for this student. That of its data is cc-by-4.0{whose}." in card
    unknown = {**licences, "data_license": None, "teacher_license": None}
    card = render_card(dataclasses.replace(record, facts=dataclasses.replace(record.facts, **unknown)))
    assert "That of its data is not stated" in card


def test_labels_of_the_example_are_parted_by_commas_alone(record):
    captions = ["a cat, a dog", 'two\nlines: "x"', "- c"]
    facts = dataclasses.replace(record.facts, usage={"captions": captions, "output": None})
    (example,) = front_matter(render_card(dataclasses.replace(record, facts=facts)))["widget"]
    assert example["candidate_labels"] == 'a cat a dog, two lines: "x", - c'
    card = render_card(dataclasses.replace(record, facts=facts, assets=[]))
    assert "widget" not in front_matter(card)


def test_captions_are_text_whatever_they_hold(record):
    nasty = ["a | b", "``` `x` <script>alert(1)</script>", "two\nlines", "*{{ 7 * 7 }}* [x](y)", '"quoted" \\']
    facts = dataclasses.replace(record.facts, samples=[nasty], usage={"captions": nasty, "output": "1.000  a"})
    card = render_card(dataclasses.replace(record, facts=facts))
    assert "<script>" not in card.split("\n---\n", 1)[1].replace(blocks(card, "python")[0], "")
    assert "49" not in table(card, "image  ")[1][1] and "{{ 7 \\* 7 }}" in card
    assert len(re.findall(r"^\| !\[sample", card, re.M)) == 1
    code = blocks(card, "python")[0]
    shown = [" ".join(caption.split()) for caption in nasty]  # one line each
    assert shown == next(yaml.safe_load(line.split("=", 1)[1]) for line in code.splitlines() if "captions = " in line)


def test_what_is_not_beside_the_card_is_not_on_it(record):
    card = render_card(dataclasses.replace(record, assets=[]))
    assert_well_formed(card)
    assert "assets/" not in card and sections(card) == [name for name in FINISHED if name != "Queries and answers"]


def test_limits_of_a_student_better_than_its_teacher_and_worse_than_the_baseline(record):
    metrics = dict(record.metrics)
    for name in (*RECALLS, "rsum"):
        metrics[f"test_{name}"] = metrics[f"teacher_test_{name}"] + 1
    facts = dataclasses.replace(record.facts, baseline={**record.facts.baseline, "test_rsum": 599.0})
    card = render_card(dataclasses.replace(record, metrics=metrics, facts=facts))
    limits = card[card.index("## Limits") :]
    assert "least of its teacher" not in limits and "Trained without a teacher it does better: rsum 599.0" in limits


@pytest.mark.parametrize(
    ("figures", "by_index", "said"),
    [
        ({}, False, ""),
        ({"shared_captions": 12.345, "rsum_by_index": 3.21}, False, "12.3 % of the captions stand for several images, "
         "each of which is a right answer; if only its own was, rsum would be 3.2."),
        ({"shared_captions": 0.5, "rsum_by_text": 590.0}, True, "0.5 % of the captions stand for several images, "
         "of which only its own is a right answer; if all were, rsum would be 590.0."),
        ({"shared_captions": 0.5}, False, "0.5 % of the captions stand for several images, "
         "each of which is a right answer."),
    ],
)  # fmt: skip
def test_captions_of_several_images(record, figures, by_index, said):
    metrics = {**record.metrics, **{f"test_{name}": value for name, value in figures.items()}}
    settings = {**record.settings, "recall_by_index": by_index}
    facts = dataclasses.replace(record.facts, dataset_name="user/data")
    card = render_card(dataclasses.replace(record, facts=facts, metrics=metrics, settings=settings))
    assert_well_formed(card)
    assert (f"at most 600. {said}\n" if said else "at most 600.\n") in card
    assert bool(said) == ("stand for several images" in card)
    assert not any("by" in name or "shared" in name for _, name in indexed(card))


def test_a_teacher_without_a_name(record):
    card = render_card(dataclasses.replace(record, facts=dataclasses.replace(record.facts, teacher={"dim": 16})))
    assert "distilled from the features of a teacher, on `data`" in card and "- `dim`: 16\n" in card


def test_weights_that_stay_are_said_to_stay(record):
    course = [[1, {"feature": 1.0, "similarity": 2.0}], [9, {"feature": 1.0, "similarity": 2.0}]]
    assert "feature : similarity stayed at 1 : 2." in render_card(dataclasses.replace(record, weights=course))
    assert "feature : similarity were 1 : 2 at step 1." in render_card(dataclasses.replace(record, weights=course[:1]))


def test_template_and_what_fills_it_stay_short():
    folder = EXAMPLE.parent
    assert sum(len((folder / name).read_text().splitlines()) for name in ("template.md", "model_card.py")) <= 310


def numbers(card: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", card)


def test_the_example_is_the_quickstart_students_card():
    kept = (EXAMPLE / "README.md").read_text()
    record = RunRecord.from_json((EXAMPLE / "assets" / "card.json").read_text())
    again = render_card(record)
    assert sections(again) == sections(kept) == FINISHED
    assert front_matter(again) == front_matter(kept)
    assert numbers(again) == numbers(kept)
    assert_well_formed(kept)
    shown = set(re.findall(r"\]\(assets/([^)]*)\)", kept)) | {"query.png", "card.json"}
    assert {path.name for path in (EXAMPLE / "assets").iterdir()} == shown
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*") if path.is_file()) < 300_000
    recipe = yaml.safe_load(Path("recipes/icons.yaml").read_text())
    assert record.name == "icons" and record.step == record.max_steps
    assert {name: value for name, value in record.settings.items() if name in recipe} == {
        name: value if name != "report_to" else [value] for name, value in recipe.items() if name in record.settings
    }
