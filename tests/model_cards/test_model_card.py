"""The card of a run: its YAML, sections and every number against what the run left, in each state a run can be in."""

import contextlib
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import datasets
import pytest
import yaml
from card_checks import FINISHED, RECALLS, assert_well_formed, blocks, front_matter, indexed, run, sections, table
from conftest import make_student
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file
from tiny_trainer import make_trainer
from transformers import TrainerCallback

from model_cards import RunFacts, RunRecord, render_card
from model_cards.pictures import PICTURES_OF_DATA
from trainers import ContrastiveTrainer


STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def on_the_hub(folder: Path) -> str:
    """The card of a run as it would be if its data had an id."""
    record = RunRecord.from_json((folder / "assets" / "card.json").read_text())
    facts = dataclasses.replace(record.facts, dataset_name="user/data")
    return render_card(dataclasses.replace(record, facts=facts))


def test_a_finished_run(distilled, contrastive, data):
    card = (distilled / "README.md").read_text()
    results = json.loads((distilled / "all_results.json").read_text())
    baseline = json.loads((contrastive / "all_results.json").read_text())
    assert_well_formed(card)
    assert sections(card) == FINISHED
    front = front_matter(card)
    assert front["license"] == "apache-2.0" and front["language"] == ["en", "de"] and "No licence" not in card
    assert front["pipeline_tag"] == "zero-shot-image-classification" and front["library_name"] == "transformers"
    assert {"image-text-retrieval", "image-retrieval", "distillation", "dual-encoder"} <= set(front["tags"])
    # All local, nothing measured: the Hub refuses a result of a dataset that has no id.
    assert not {"datasets", "model-index", "metrics", "base_model", "base_model_relation", "co2_eq_emissions"} & {
        *front
    }
    (example,) = front["widget"]
    assert (distilled / example["src"]).is_file() and example["src"] == "assets/query.png"
    labels = json.loads((distilled / "assets" / "card.json").read_text())["facts"]["usage"]["captions"]
    assert example["candidate_labels"].split(", ") == labels
    wanted = {("validation", name): results[f"eval_{name}"] for name in (*RECALLS, "rsum")}
    wanted |= {("test", name): results[f"test_{name}"] for name in (*RECALLS, "rsum")}
    wanted |= {("test", f"4_{name}"): results[f"test_4_{name}"] for name in (*RECALLS, "rsum")}
    assert indexed(on_the_hub(distilled)) == wanted
    header, *rows = table(card, "test split")
    assert header == ["test split, 12 images", "student", "teacher", "plain contrastive", "share kept"]
    rows = {row[0].replace(" ", "_"): row[1:] for row in rows}
    for name in (*RECALLS, "rsum"):
        own, its = results[f"test_{name}"], results[f"teacher_test_{name}"]
        plain = baseline[f"test_{name}"]
        assert rows[name] == [f"{own:.1f}", f"{its:.1f}", f"{plain:.1f}", f"{100 * own / its:.1f} %"]
        folds = results[f"test_4_{name}"], results[f"teacher_test_4_{name}"]
        assert rows[f"4_{name}"][:3] == [f"{folds[0]:.1f}", f"{folds[1]:.1f}", ""]
    millions = [f"{of['parameters'] / 1e6:.2f} M" for of in (results, {"parameters": 27_000_000}, baseline)]
    assert rows["parameters"][:3] == millions and f"{millions[0]} parameters" in card
    for name in ("image_batch_1", "image_batch_64", "caption_batch_1", "caption_batch_64"):
        of, batch = name.split("_batch_")
        figures = [f"{figures[f'ms_per_{name}']:.2f}" for figures in (results, baseline)]
        assert rows[f"ms_per_{of},_batch_{batch}"][0::2][:2] == figures
    across = " " * len("image to text r10") + " | student on teacher's index"
    for name, *values in table(card, across)[1:]:
        name = name.replace(" ", "_")
        assert values == [f"{results[f'{index}_index_test_{name}']:.1f}" for index in ("teacher", "student")]
    assert str(data.parent) not in card and data.parent.name not in card


def test_its_sentences_are_what_was_measured(distilled):
    card = (distilled / "README.md").read_text()
    results = json.loads((distilled / "all_results.json").read_text())
    log = json.loads((distilled / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert "distilled from user/teacher, on `data`" in card and "- `revision`: abc\n" in card
    best = json.loads((distilled / "checkpoint-6" / "trainer_state.json").read_text())["best_global_step"]
    assert f"step 6 of 6.{f' The weights are those of step {best},' if best != 6 else ''}" in card
    steps = [entry for entry in log if "weight_feature" in entry]
    first, last = (
        " : ".join(f"{entry[f'weight_{name}']:.3g}" for name in ("contrastive", "feature", "similarity"))
        for entry in (steps[0], steps[-1])
    )
    moved = re.search(r"contrastive : feature : similarity : hard negative moved from (.*) to (.*)\.\n", card)
    assert moved[1].startswith(first) and moved[1].endswith("at step 1")
    assert moved[2].startswith(last) and moved[2].endswith("at step 6")
    shares = {name: results[f"test_{name}"] / results[f"teacher_test_{name}"] for name in RECALLS}
    worst = min(shares, key=shares.get)
    limits = card[card.index("## Limits") :]
    if shares[worst] < 1:
        own, its = results[f"test_{worst}"], results[f"teacher_test_{worst}"]
        assert f"least of its teacher in {worst.replace('_', ' ')}: {own:.1f} of {its:.1f}," in limits
    assert f"{100 - results['test_text_to_image_r1']:.1f} % of the captions of the test split" in limits
    assert f"{results['train_runtime'] / 60:.1f} minutes" in card


def test_its_temperature_is_of_the_finished_student_alone(distilled, contrastive, data):
    """Never in a checkpoint, which training goes on from."""
    card = " ".join((distilled / "README.md").read_text().split())
    scale, candidates = re.search(
        r"are cosines times ([\d.]+), fitted once .* told from (\d+) candidates", card
    ).groups()
    weights = load_file(distilled / "model.safetensors")
    assert math.exp(weights["logit_scale"]) == pytest.approx(float(scale), abs=0.051)
    assert int(candidates) == len(set(datasets.load_from_disk(data)["validation"]["group_id"]))
    assert "are cosines times" not in (contrastive / "README.md").read_text()
    checkpoints = list(distilled.glob("checkpoint-*"))
    assert checkpoints
    for folder in checkpoints:
        assert load_file(folder / "model.safetensors")["logit_scale"].item() == pytest.approx(2.6592)
        assert "are cosines times" not in (folder / "README.md").read_text()


def test_its_data_and_settings(distilled, data):
    card = (distilled / "README.md").read_text()
    rows = datasets.load_from_disk(data)
    for name, images, captions, per_image, words in table(card, "split ")[1:]:
        counts = [len(own) for own in rows[name]["captions"]]
        lengths = [len(caption.split()) for own in rows[name]["captions"] for caption in own]
        assert (int(images), int(captions)) == (len(counts), len(lengths))
        assert per_image == f"{sum(counts) / len(counts):.1f} ({min(counts)} to {max(counts)})"
        assert words == f"{sum(lengths) / len(lengths):.1f} ({min(lengths)} to {max(lengths)})"
    assert "Licence of the data: cc0-1.0." in card
    samples = table(card, "image  ")[1:]
    assert len(samples) == 3 and all(text.split("; ")[0] in sum(rows["train"]["captions"], []) for _, text in samples)
    (settings,) = [yaml.safe_load(block) for block in blocks(card, "yaml")]
    saved = json.loads((distilled / "training_args.json").read_text())
    assert settings == saved
    differing = dict(re.findall(r"^- `(\w+)`: (.*)$", card[card.index("## Training") :], re.M))
    assert differing["queue_size"] == "40" and differing["learning_rate"] == "0.001"
    assert not {"use_cpu", "debug", "output_dir", "weight_decay"} & set(differing)


def test_its_pictures_are_there(distilled):
    card = (distilled / "README.md").read_text()
    shown = re.findall(r"\]\(assets/([^)]*)\)", card)
    assert {"curves.png", "text_to_image.png", "image_to_text.png", "sample_1.png"} <= set(shown)
    assert {path.name for path in (distilled / "assets").iterdir()} == {*shown, "query.png", "card.json"}


@pytest.mark.parametrize("shown", [True, False])
def test_pictures_of_the_data_are_pushed_only_where_they_may_be(data, hub, capsys, shown):
    """An earlier student's may lie in the repository."""
    HfApi().create_repo("user/student")
    for name in PICTURES_OF_DATA:
        HfApi().upload_file(path_or_fileobj=b"of before", path_in_repo=name, repo_id="user/student")
    push = {"push_to_hub": True, "hub_model_id": "user/student", "card_images": shown}
    folder = run(data.parent / f"shown_{shown}", data, **push)
    printed = capsys.readouterr().out
    said = (
        "The card of user/student will show pictures of data with their captions: --card_images False leaves them out."
    )
    assert (said in printed) == shown
    assert "The card will state no licence of the student's own: --license apache-2.0 states one." in printed
    files, card = HfApi().list_repo_files("user/student"), (folder / "README.md").read_text()
    assert set(PICTURES_OF_DATA) & {*files} == set(PICTURES_OF_DATA if shown else ())
    assert all((folder / name).is_file() == shown for name in PICTURES_OF_DATA) and "assets/curves.png" in files
    assert_well_formed(card)
    for name in ("query.png", "sample_1.png", "text_to_image.png", "widget"):
        assert (name in card) == shown
    captions = [
        caption for part in datasets.load_from_disk(data).values() for own in part["captions"] for caption in own
    ]
    assert any(caption in card for caption in captions) == shown
    if shown:
        for name in PICTURES_OF_DATA:
            assert Path(hf_hub_download("user/student", name)).read_bytes() != b"of before"
    else:
        assert '"photo.jpg"' in blocks(card, "python")[0]  # a picture of the reader's own


def printed_by(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue().strip()


def test_its_code_prints_what_the_card_says(distilled):
    card = (distilled / "README.md").read_text()
    ((code,), (output,)) = blocks(card, "python"), blocks(card, "text")
    assert 'repo = "student"' in code and "revision" not in code
    assert printed_by(code.replace('"student"', repr(str(distilled)))) == output
    assert len(output.splitlines()) == 3 and re.match(r"-?\d\.\d{3}  \w+", output)


def test_a_contrastive_run_says_nothing_of_a_teacher(contrastive):
    card = (contrastive / "README.md").read_text()
    results = json.loads((contrastive / "all_results.json").read_text())
    assert results["teacher_test_rsum"] > 0  # the data has one all the same
    assert_well_formed(card)
    assert sections(card) == [name for name in FINISHED if name not in ("Method", "Citation")]
    assert "distillation" not in front_matter(card)["tags"]
    assert not re.search("teacher|distil(?!bert)|DSMD|balancer|queue_size", card)
    assert table(card, "test split")[0] == ["test split, 12 images", "student"]
    assert indexed(on_the_hub(contrastive))["test", "rsum"] == results["test_rsum"]
    front = front_matter(card)
    assert (front["license"], front["license_name"]) == ("other", "of-data")
    assert "No licence was chosen for this student. That of its data is cc0-1.0." in card


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run(tmp_path, rows, validation_rows):
    trainer = make_trainer(
        tmp_path / "run", rows, eval_dataset=validation_rows, callbacks=[StopAt(4)], **{**STEPS, "max_steps": 9,
        "save_steps": 3}
    )  # fmt: skip
    trainer.facts = RunFacts(dataset_name="user/data")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    card = (tmp_path / "run" / "checkpoint-3" / "README.md").read_text()
    log = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    (evaluation,) = [entry for entry in log if "eval_rsum" in entry]
    assert_well_formed(card)
    assert sections(card) == ["Results", "Use", "Method", "Training", "Limits", "Citation"]
    assert "Training was at step 3 of 9." in card and "On the validation split, at step 2." in card
    assert indexed(card) == {("validation", name): evaluation[f"eval_{name}"] for name in (*RECALLS, "rsum")}
    assert front_matter(card)["datasets"] == ["user/data"]
    assert "test" not in card.split("## Limits")[0].split("## Training")[0] and "minutes" not in card
    assert "printed" not in card and str(tmp_path) not in card
    trainer.save_model(str(tmp_path / "by hand"))
    assert "Training was at step 4 of 9." in (tmp_path / "by hand" / "README.md").read_text()


def test_a_run_resumed_twice(tmp_path, rows, validation_rows):
    trainers = []
    for steps, checkpoint in ((4, None), (6, "checkpoint-2"), (6, "checkpoint-4")):
        settings = {**STEPS, "max_steps": steps, "allow_changes": True}
        trainer = make_trainer(tmp_path / "run", rows, eval_dataset=validation_rows, **settings)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / "run" / checkpoint))
        trainers.append(trainer)
    (tmp_path / "run" / "emissions.csv").write_text("emissions,cpu_model,gpu_model\n0.002,A CPU,\n")
    cards = []
    for trainer in trainers:
        trainer.facts.dataset_name = "data"
        trainer.save_model()
        cards.append((tmp_path / "run" / "README.md").read_text())
        assert_well_formed(cards[-1])
    assert "ended at step 4 of 4. No licence" in cards[0] and "minutes, evaluations included; 2 g of CO2" in cards[0]
    assert front_matter(cards[0])["co2_eq_emissions"] == {
        "emissions": 2.0,
        "source": "codecarbon",
        "training_type": "pre-training",
        "hardware_used": "A CPU",
    }
    assert "ended at step 6 of 6. The run was resumed at step 2. No" in cards[1]
    assert "ended at step 6 of 6. The run was resumed at step 2 and 4. No" in cards[2]
    for card in cards[1:]:  # of one sitting's part only
        assert "minutes" not in card and "co2_eq_emissions" not in front_matter(card)


def test_the_figures_are_of_the_best_weights(tmp_path, rows, validation_rows):
    settings = {**STEPS, "max_steps": 6, "load_best_model_at_end": True, "greater_is_better": False}
    trainer = make_trainer(tmp_path / "run", rows, eval_dataset=validation_rows, learning_rate=0.01, **settings)
    trainer.facts.dataset_name = "user/data"
    trainer.train()
    scores = {entry["step"]: entry["eval_rsum"] for entry in trainer.state.log_history if "eval_rsum" in entry}
    best = trainer.state.best_global_step
    assert best < 6 and scores[best] < scores[6]
    trainer.evaluate()
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"ended at step 6 of 6. The weights are those of step {best}, the best by rsum in validation." in card
    assert indexed(card)["validation", "rsum"] == scores[best] == trainer.evaluate()["eval_rsum"]
    assert "On the validation split." in card


def test_a_trainer_of_ones_own_code_gets_a_card_of_what_it_knows(tmp_path, rows):
    trainer = make_trainer(tmp_path / "run", rows)
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert_well_formed(card)
    assert sections(card) == ["Use", "Method", "Citation"] and "Training was" not in card
    assert not {"model-index", "datasets", "license", "language", "metrics"} & set(front_matter(card))


def test_a_second_training_forgets_what_the_first_scored(tmp_path, rows):
    trainer = make_trainer(tmp_path / "run", rows, save_strategy="steps", save_steps=1)
    trainer.facts.dataset_name = "data"
    trainer.facts.metrics = {"test_rsum": 600.0, "test_images": 3, **{f"test_{name}": 100.0 for name in RECALLS}}
    trainer.save_model()
    assert "| rsum " in (tmp_path / "run" / "README.md").read_text()
    trainer.train()
    assert "| rsum " not in (tmp_path / "run" / "checkpoint-1" / "README.md").read_text()


def test_a_contrastive_trainer_of_ones_own(tmp_path, rows):
    model, processor = make_student()
    args = make_trainer(tmp_path / "run", rows).args
    trainer = ContrastiveTrainer(model, args, train_dataset=rows, processing_class=processor)
    (tmp_path / "run").mkdir(exist_ok=True)
    record = trainer.write_card(tmp_path / "run")
    assert record.method == "contrastive" and "losses" not in record.settings
    assert sections((tmp_path / "run" / "README.md").read_text()) == ["Use"]
